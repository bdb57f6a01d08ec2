// nf4_small_m: y[M, N] = x[M, K] @ dequant(weight[N, K]).T + bias for up to 32 tokens, straight from the stored bytes.
// Bytes per weight at block 64, double quantized: 0.516. Floors at 4.28 TB/s: 4096->4096 2.0 us, 4096->11008 5.4,
// 8192->28672 28.3.
//
// Weights are the A operand of mma.m16n8k16 and tokens its 8 columns, so few tokens waste no tensor cores and each
// weight is decoded once: one conflict-free shared-memory load turns a byte into the pair of its codes in x's dtype.
// The order of K inside a product is free as long as both operands agree: lane t of a quad takes 8 consecutive bytes of
// a block and the 16 activations that meet them, which therefore need no shuffling either. Sums of 64 are scaled in
// fp32.
//
// Work: a CTA owns an even share of the rows, whatever N is; its warps split K. A warp keeps the
// activations of its slice in registers while 16-row tiles of the slice stream through its private ring in shared
// memory, which no other warp waits for; once per tile the slices' sums meet. Longer K takes several passes, each with
// the next activations, sums parked in shared memory between them. Sums run in a fixed order: results repeat bitwise.
//
// Latency: before it may read anything an earlier kernel wrote, a launch has fetched its first weights into L2 and
// filled its table, both beside the earlier kernel. A settled weight's first stages are in shared memory by then.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dependent_launch.cuh"
#include "nf4/low_rank.cuh"
#include "nf4/low_rank_parts.cuh"
#include "nf4/small_m_config.h"
#include "nf4/small_m_device.cuh"

namespace peftkern {

struct SmallMArguments {
  const void* x;
  NF4DeviceWeight weight;
  const void* bias;
  void* y;
  int64_t M, N, K;
  uint32_t scales;  // of the whole weight
  int passes;
  int group_rows, longer_groups;  // rows of a CTA; the first CTAs have one more
  bool whole_words;               // a row's 4 scale codes of a quad are one aligned word, under one nested scale
  bool settled;                   // as in NF4Matmul
};

struct SmallMLowRankArguments : SmallMArguments {
  NF4LowRank low_rank;
  int parts, makers;  // as in SmallMConfig
  int parked_bytes;   // of parked sums; S comes to lie behind them
};

// The end of a launch with a low-rank term: adds it to the parked sums, a tile a warp, and writes y.
template <typename T, int kTokenTiles, int kWarps>
__device__ __forceinline__ void add_low_rank(const SmallMLowRankArguments& a, uint32_t parked, int row_begin,
                                             int row_end, int cta, int ctas) {
  constexpr int kRows = kSmallMTileRows, kCells = kRows * 8 * kTokenTiles;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int tokens = static_cast<int>(a.M);
  const NF4LowRank& l = a.low_rank;
  const uint32_t S_at = parked + a.parked_bytes;
  RawFour top, bottom;
  const auto load_B = [&](int row, int step) {
    top.load(l, row, step * 16 + t * 4, row < row_end);
    bottom.load(l, row + 8, step * 16 + t * 4, row + 8 < row_end);
  };
  load_B(row_begin + warp * kRows + g, 0);
  take_parts<T>(l, a.parts, tokens, ctas, S_at, cta == 0, kWarps * 32);
#pragma unroll 1
  for (int tile = warp; row_begin + tile * kRows < row_end; tile += kWarps) {
    const int row = row_begin + tile * kRows + g;
    float sum[kTokenTiles][4] = {};
#pragma unroll 1
    for (int step = 0; step * 16 < l.padded; ++step) {
      if (tile != warp || step > 0) load_B(row, step);
      const uint2 high = top.convert<T>(l), low = bottom.convert<T>(l);
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const uint2 own = load_shared_pair(S_at + ((8 * j + g) * l.padded + step * 16 + t * 4) * 2);
        mma<T>(sum[j], high.x, low.x, high.y, low.y, own.x, own.y);
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * kTokenTiles; ++i) {  // as mma leaves them: rows g and g + 8, tokens 2 t and 2 t + 1 of 8
      const int token = i / 4 * 8 + 2 * t + i % 2, half = i / 2 % 2 * 8;
      if (token >= tokens || row + half >= row_end) continue;
      const float rest = load_shared(parked + (tile * kCells + token * kRows + g + half) * 4);
      static_cast<T*>(a.y)[token * a.N + row + half] = round_to<T>(fmaf(l.factor, sum[i / 4][i % 4], rest));
    }
  }
}

// A warp's way through its chunks: passes, in each the tiles of the CTA's rows. column: of chunks along K.
struct SmallMWalk {
  int pass, row, column;
};

template <typename T, bool kNested, class Arguments, int kTokenTiles, int kQuads, int kWarps, int kWarpRows,
          int kStages, int kMinCtas>
__global__ void __launch_bounds__(kWarps * 32, kMinCtas) nf4_small_m_kernel(const __grid_constant__ Arguments a) {
  constexpr bool kLowRank = std::is_same<Arguments, SmallMLowRankArguments>::value;
  constexpr SmallMShape kShape{kTokenTiles, kQuads, kWarps, kWarpRows, kStages, kMinCtas};
  constexpr int kRows = kShape.rows(), kCells = kShape.cells(), kSlices = kShape.slices();
  constexpr int kStageBytes = kShape.stage_bytes(), kWarpSums = kShape.tokens() * kSmallMTileRows * 4;
  constexpr uint32_t kMap = kSharedStart + kSmallMTableBytes, kRing = kMap + kSmallMMapBytes;
  constexpr uint32_t kSums = kRing + kWarps * kStages * kStageBytes, kParked = kSums + 2 * kWarps * kWarpSums;
  static_assert(kWarps % kWarpRows == 0 && (kWarps * 32) % kRows == 0, "a thread keeps its row from cell to cell");

  extern __shared__ uint8_t smem[];
  if (static_cast<uint32_t>(__cvta_generic_to_shared(smem)) > kSharedStart) __trap();

  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int slice = warp / kWarpRows, warp_row = warp % kWarpRows * kSmallMTileRows;
  const int tokens = static_cast<int>(a.M);
  int cta = static_cast<int>(blockIdx.x), ctas = static_cast<int>(gridDim.x);
  if constexpr (kLowRank) {
    cta -= a.makers, ctas -= a.makers;
    if (cta < 0) {
      allow_next_kernel();
      make_part<T, kTokenTiles, kWarps>(a.low_rank, a.parts, static_cast<const T*>(a.x), tokens, a.K, blockIdx.x,
                                        kSums);
      if (threadIdx.x == 0) count_release(a.low_rank, part_tasks(a.low_rank, a.parts) + ctas - 1);
      return;
    }
  }
  const int row_begin = cta * a.group_rows + min(cta, a.longer_groups);
  const int row_end = row_begin + a.group_rows + (cta < a.longer_groups);
  const int blocks = static_cast<int>(a.K / 64);
  const uint32_t row_bytes = static_cast<uint32_t>(a.K / 2);
  const NF4DeviceWeight& w = a.weight;
  const int scale_shift = w.log2_blocksize - 6;

  auto column_of = [&](int pass) { return pass * kSlices + slice; };
  auto has_quad = [&](int column, int q) { return (column * kQuads + q) * 4 < blocks; };
  auto ended = [&](const SmallMWalk& at) { return at.pass == a.passes || !has_quad(at.column, 0); };
  auto advance = [&](SmallMWalk& at) {
    if ((at.row += kRows) < row_end) return;
    at = {at.pass + 1, row_begin, column_of(at.pass + 1)};
  };
  auto codes_of = [&](int row, int column) {
    return w.packed + static_cast<uint64_t>(static_cast<uint32_t>(row)) * row_bytes + column * (kQuads * 128);
  };
  // Blocks of 64 before this one in the weight; its scale has this index shifted by scale_shift.
  auto block_at = [&](int row, int column, int q) {
    return static_cast<uint32_t>(row) * static_cast<uint32_t>(blocks) + (column * kQuads + q) * 4;
  };

  // A chunk's lines of codes and of scales into L2.
  auto fetch = [&](const SmallMWalk& at) {
    const int row = min(at.row + warp_row + (lane & 15), row_end - 1);
    const uint32_t scale = block_at(row, at.column, 0) >> scale_shift;
    const uint8_t* const codes = codes_of(row, at.column);
    const uint8_t* const scales = kNested ? w.absmax_codes + scale : reinterpret_cast<const uint8_t*>(w.absmax + scale);
    prefetch_l2(lane < 16 ? codes : scales);
    if (kQuads == 2 && lane < 16 && has_quad(at.column, 1)) prefetch_l2(codes + 128);
  };
  // A chunk into a stage, per quad 4 rows of 8 16-byte pieces an instruction. A row's block b lies at b ^ (row & 3), so
  // that the 4 rows a half-warp reads meet no bank twice. Then what the scales are made from: nested, the two aligned
  // words of codes that hold a row's 4, and the two nested scales these can need; otherwise one scale per lane and
  // half.
  const uint32_t ring = kRing + warp * kStages * kStageBytes;
  const uint32_t piece_at = (lane >> 3) * 128 + ((((lane & 7) >> 1) ^ (lane >> 3)) << 5) + (lane & 1) * 16;
  auto copy = [&](const SmallMWalk& at, int stage) {
    const uint32_t to = ring + stage * kStageBytes;
    const uint8_t* const from = codes_of(at.row + warp_row + (lane >> 3), at.column) + (lane & 7) * 16;
    const int rows_left = row_end - at.row - warp_row;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const uint32_t quad_to = to + q * (kSmallMQuadBytes + kSmallMQuadScaleBytes);
      const int block = (at.column * kQuads + q) * 4;
      const bool piece = block + ((lane & 7) >> 1) < blocks;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        copy16(quad_to + piece_at + i * 512, from + i * 4 * static_cast<uint64_t>(row_bytes) + q * 128,
               piece && (lane >> 3) + i * 4 < rows_left);
      }
      const uint32_t words = quad_to + kSmallMQuadBytes + lane * 4;
      if constexpr (kNested) {
        const uint32_t first = block_at(at.row + warp_row + (lane & 15), at.column, q) >> scale_shift;
        const bool valid = (lane & 15) < rows_left && block < blocks;
        const uint32_t word = (first & ~3u) + (lane >> 4) * 4;
        if (valid && word < a.scales && word + 4 > a.scales) {  // the weight's last codes, short of a word
          uint32_t tail = 0;
#pragma unroll 1
          for (uint32_t i = word; i < a.scales; ++i) tail |= static_cast<uint32_t>(w.absmax_codes[i]) << (i - word) * 8;
          store_shared(words, __uint_as_float(tail));
        } else {
          copy4(words, w.absmax_codes + word, valid && word < a.scales);
        }
        const uint32_t nested = (first >> w.log2_nested_blocksize) + (lane >> 4);
        copy4(words + 128, w.nested_absmax + nested,
              valid && (static_cast<uint64_t>(nested) << w.log2_nested_blocksize) < a.scales);
      } else {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t scale = (block_at(at.row + warp_row + g + 8 * h, at.column, q) + t) >> scale_shift;
          copy4(words + h * 128, w.absmax + scale, g + 8 * h < rows_left && block + t < blocks);
        }
      }
    }
  };
  // The scale of row g + 8 * half and block t of a quad, from its stage.
  float offset = 0.0f;
  auto scale_of = [&](uint32_t quad, int row, int column, int q, int half) {
    const uint32_t words = quad + kSmallMQuadBytes;
    if constexpr (kNested) {
      uint32_t code_at = words + (g + 8 * half) * 4, nested_at = code_at + 128, byte = t;
      if (!a.whole_words) {
        const uint32_t block = block_at(row, column, q), first = block >> scale_shift;
        const uint32_t index = (block + t) >> scale_shift, shift = w.log2_nested_blocksize;
        if ((index ^ first) > 3) code_at += 64;
        if (index >> shift != first >> shift) nested_at += 64;
        byte = index & 3;
      }
      const uint32_t code = load_shared_word(code_at) >> byte * 8 & 255;
      return __fadd_rn(__fmul_rn(load_shared(kMap + code * 4), load_shared(nested_at)), offset);
    } else {
      return load_shared(words + half * 128 + lane * 4);
    }
  };
  uint32_t x[kQuads][4][kTokenTiles][8];  // [quad][block][token tile]: 16 activations of token g
  auto load_x = [&](int column, int q) {
#pragma unroll
    for (int b = 0; b < 4; ++b) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int block = (column * kQuads + q) * 4 + b;
        uint4 part[2] = {};
        if (8 * j + g < tokens && block < blocks) {
          const T* from = static_cast<const T*>(a.x) + (8 * j + g) * a.K + block * 64 + t * 16;
          part[0] = reinterpret_cast<const uint4*>(from)[0];
          part[1] = reinterpret_cast<const uint4*>(from)[1];
        }
        x[q][b][j][0] = part[0].x, x[q][b][j][1] = part[0].y, x[q][b][j][2] = part[0].z, x[q][b][j][3] = part[0].w;
        x[q][b][j][4] = part[1].x, x[q][b][j][5] = part[1].y, x[q][b][j][6] = part[1].z, x[q][b][j][7] = part[1].w;
      }
    }
  };

  // Where this weight may be news, the next kernel starts only once all before this one has ended: its weight may be
  // read at once on the word that it is settled.
  if (a.settled) allow_next_kernel();
  SmallMWalk next{0, row_begin, column_of(0)};
  SmallMWalk ahead = next;
#pragma unroll 1
  for (int i = 0; i < kStages && !ended(ahead); ++i, advance(ahead)) fetch(ahead);
  if constexpr (kLowRank) prefetch_rows(a.low_rank, row_begin, row_end, threadIdx.x, kWarps * 32);
  fill_pair_table<T>(threadIdx.x, kWarps * 32);
  if (!a.settled) {
    wait_for_earlier_kernels();
    allow_next_kernel();
  }
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    if (!ended(next)) {
      copy(next, stage);
      advance(next);
    }
    copy_commit();
  }
  if constexpr (kNested) {
    offset = *w.nested_offset;
    for (int i = threadIdx.x; i < 256; i += kWarps * 32) store_shared(kMap + i * 4, w.nested_code[i]);
  }
  if (a.settled) wait_for_earlier_kernels();
#pragma unroll
  for (int q = 0; q < kQuads; ++q) load_x(column_of(0), q);
  __syncthreads();

  const uint32_t bank = lane * 0x01010101u * 4;
  const uint32_t code_at = ring + g * 128 + ((g & 3) << 5) + t * 8;
  const int live_cells = tokens * kRows;
  const int cell_row = threadIdx.x % kRows;
  int stage = 0, buffer = 0;
  for (int pass = 0; pass < a.passes; ++pass) {
    const bool last_pass = pass + 1 == a.passes;
    const int column = column_of(pass);
    for (int tile = 0, row0 = row_begin; row0 < row_end; ++tile, row0 += kRows, buffer ^= 1) {
      float bias = 0.0f;  // loaded here so that its latency ends before the sums meet
      if (a.bias != nullptr && last_pass && row0 + cell_row < row_end) {
        bias = static_cast<float>(static_cast<const T*>(a.bias)[row0 + cell_row]);
      }
      float sum[kTokenTiles][4] = {};
      if (has_quad(column, 0)) {
        copy_wait<kStages - 1>();
        __syncwarp();
#pragma unroll
        for (int q = 0; q < kQuads; ++q) {
          const uint32_t quad = stage * kStageBytes + q * (kSmallMQuadBytes + kSmallMQuadScaleBytes);
          const float top_scales = scale_of(ring + quad, row0 + warp_row + g, column, q, 0);
          const float bottom_scales = scale_of(ring + quad, row0 + warp_row + g + 8, column, q, 1);
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            const uint2 top_codes = load_shared_pair((quad + code_at) ^ (b << 5));
            const uint2 bottom_codes = load_shared_pair(((quad + code_at) ^ (b << 5)) + 8 * 128);
            float product[kTokenTiles][4] = {};
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              uint32_t top[4], bottom[4];
              look_up(half ? top_codes.y : top_codes.x, bank, top);
              look_up(half ? bottom_codes.y : bottom_codes.x, bank, bottom);
#pragma unroll
              for (int p = 0; p < 2; ++p) {
#pragma unroll
                for (int j = 0; j < kTokenTiles; ++j) {
                  mma<T>(product[j], top[2 * p], bottom[2 * p], top[2 * p + 1], bottom[2 * p + 1],
                         x[q][b][j][4 * half + 2 * p], x[q][b][j][4 * half + 2 * p + 1]);
                }
              }
            }
            const float top_scale = __shfl_sync(0xffffffffu, top_scales, (lane & 28) | b);
            const float bottom_scale = __shfl_sync(0xffffffffu, bottom_scales, (lane & 28) | b);
#pragma unroll
            for (int j = 0; j < kTokenTiles; ++j) {
              sum[j][0] = fmaf(top_scale, product[j][0], sum[j][0]);
              sum[j][1] = fmaf(top_scale, product[j][1], sum[j][1]);
              sum[j][2] = fmaf(bottom_scale, product[j][2], sum[j][2]);
              sum[j][3] = fmaf(bottom_scale, product[j][3], sum[j][3]);
            }
          }
          // The last tile of a pass is done with these: the next pass's arrive during its other work.
          if (!last_pass && row0 + kRows >= row_end) load_x(column_of(pass + 1), q);
        }
        __syncwarp();  // all lanes have read the stage
        if (!ended(next)) {
          copy(next, stage);
          advance(next);
        }
        copy_commit();
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }

      // The slices' sums meet. Two tokens of a row side by side, rows permuted per token pair: no bank conflicts.
      const uint32_t mine = kSums + (buffer * kWarps + warp) * kWarpSums + t * (kSmallMTileRows * 8);
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        store_shared(mine + j * (kSmallMTileRows * 32) + (g ^ (4 * t)) * 8, sum[j][0], sum[j][1]);
        store_shared(mine + j * (kSmallMTileRows * 32) + ((g + 8) ^ (4 * t)) * 8, sum[j][2], sum[j][3]);
      }
      __syncthreads();  // of the two buffers, the other is read no more
#pragma unroll 1
      for (int cell = threadIdx.x; cell < live_cells; cell += kWarps * 32) {
        const int token = cell / kRows, pair = token >> 1;
        const uint32_t from = kSums + (buffer * kWarps + cell_row / kSmallMTileRows) * kWarpSums + (token & 1) * 4 +
                              (pair * kSmallMTileRows + (cell_row % kSmallMTileRows ^ (4 * (pair & 3)))) * 8;
        float value = bias;
#pragma unroll
        for (int s = 0; s < kSlices; ++s) value += load_shared(from + s * kWarpRows * kWarpSums);
        const uint32_t parked = kParked + (tile * kCells + cell) * 4;
        if (pass > 0) value += load_shared(parked);
        if (kLowRank || !last_pass) {
          store_shared(parked, value);
        } else if (row0 + cell_row < row_end) {
          static_cast<T*>(a.y)[token * a.N + row0 + cell_row] = round_to<T>(value);
        }
      }
    }
  }
  if constexpr (kLowRank) {
    static_assert(kWarpRows == 1, "a tile is of 16 rows");
    add_low_rank<T, kTokenTiles, kWarps>(a, kParked, row_begin, row_end, cta, ctas);
  }
}

}  // namespace peftkern
