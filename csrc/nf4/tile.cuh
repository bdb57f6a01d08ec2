// nf4_tile: y[M, outs] = x[M, contraction] W^T on wgmma (sm_90a), reading the stored weight: forward, and dX (kDx).
//
// A block makes tiles of 128 outs x kTokens tokens. The weight is the A operand: it goes from packed bytes through a
// table to registers, in T. The tokens are the B operand and come through the copy engine. Warpgroup 0 produces: one
// warp loads tokens and codes, the others decode scales. Warpgroups 1 and 2 take 64 outs each: they decode step i + 1
// while the tensor cores do step i. What they then read from shared memory and issue delays the tensor cores, so a pair
// of weights takes one 4-byte lookup and two packed multiplications: by the scale's low and high part in T, the sum
// rounded once. Only the rounding of the code itself to T comes on top of what dequantize rounds.
//
// Small problems split the contraction over a cluster, which adds up its parts in rank order through distributed
// shared memory; large ones give each multiprocessor several tiles.
// Floor: 2 M outs contraction / the card's matrix rate.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "common/hopper.cuh"
#include "common/nf4_code.h"
#include "common/wgmma.cuh"
#include "nf4/decode.cuh"
#include "nf4/tile_config.h"

namespace peftkern {

struct TileProblem {
  NF4DeviceWeight weight;
  int64_t weight_rows, weight_cols;
  const void* bias;  // [outs] or null
  int64_t M, outs;
  int token_tiles, out_tiles;
  int first_tile, last_tile;  // of this launch
  int steps;                  // of kTileDepth along the contraction
  int split;
};

template <int kTokens>
struct TileShared {
  static constexpr int kTokenStages = tile_token_stages(kTokens), kWeightStages = tile_weight_stages(kTokens);
  static constexpr int kTokenBytes = kTokens * kTileDepth * 2;
  static constexpr int kCodeBytes = kTileOuts * kTileDepth / 2 * kTileChunk;
  static constexpr int kOutBytes = kTileBatch * kTileOuts / 2 * 2;  // a batch of tokens, 64 outs of one warpgroup

  alignas(1024) uint8_t tokens[kTokenStages][kTokenBytes];
  alignas(1024) uint8_t codes[kWeightStages][kCodeBytes];
  alignas(1024) uint8_t out[2][2][kOutBytes];
  alignas(128) uint32_t pairs[256][32];  // byte -> its two codes in T, a copy for each lane in its own bank
  alignas(8) uint2 scales[kWeightStages][kTileChunk][kTileOuts];  // high and low part in T, each twice
  float nested_code[256];
  uint64_t tokens_full[kTokenStages], tokens_empty[kTokenStages];
  uint64_t weights_full[kWeightStages], weights_empty[kWeightStages];
};

// A position in a ring of kStages buffers, and the parity of its barriers.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// The chunks of the contraction [first, last) that a block of the cluster takes, and where its steps end.
struct ChunkRange {
  int first, last, last_step;
};

__device__ __forceinline__ ChunkRange chunk_range(const TileProblem& p, int rank) {
  const int chunks = (p.steps + kTileChunk - 1) / kTileChunk;
  const int first = chunks * rank / p.split, last = chunks * (rank + 1) / p.split;
  return {first, last, last * kTileChunk < p.steps ? last * kTileChunk : p.steps};
}

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

__device__ __forceinline__ float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
__device__ __forceinline__ float to_float(__half v) {
  return __half2float(v);
}

__device__ __forceinline__ __nv_bfloat162 as_pair(uint32_t v, __nv_bfloat16) {
  return *reinterpret_cast<const __nv_bfloat162*>(&v);
}
__device__ __forceinline__ __half2 as_pair(uint32_t v, __half) {
  return *reinterpret_cast<const __half2*>(&v);
}

// A scale as the sum of two numbers of T, each twice over.
template <typename T>
__device__ __forceinline__ uint2 split_scale(float scale) {
  const float high = to_float(round_to<T>(scale));
  return {pack_pair<T>(high, high), pack_pair<T>(scale - high, scale - high)};
}

// The pair of weights in byte `selector` of `word`, rounded once. `table`: this lane's column of the table.
template <typename T>
__device__ __forceinline__ uint32_t decode_pair(uint32_t table, uint32_t word, uint32_t selector, uint2 scale) {
  uint32_t codes;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(codes) : "r"(table + __byte_perm(word, 0, selector) * 128));
  const auto pair = as_pair(codes, T());
  const auto weights = __hfma2(pair, as_pair(scale.x, T()), __hmul2(pair, as_pair(scale.y, T())));
  return *reinterpret_cast<const uint32_t*>(&weights);
}

__device__ __forceinline__ uint32_t transpose_8x8(uint32_t v) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(v));
  return out;
}

// What a lane decodes in one step, as it lies in shared memory: the packed words and scales of rows lane / 4 and
// lane / 4 + 8 of the warp's 16 outs, in dX those of weight rows 8 i + lane / 4.
template <bool kDx>
struct RawStep {
  uint4 words[2][2];  // [half of the 64 columns][row, row + 8]
  uint2 scales[2];
};
template <>
struct RawStep<true> {
  uint2 words[8];
  uint2 scales[8];
};

template <bool kDx, int kTokens>
__device__ __forceinline__ void load_step(RawStep<kDx>& raw, const TileShared<kTokens>& s, int stage, int sub,
                                          int group, int warp, int lane) {
  const int row = lane / 4;
  const uint8_t* codes = s.codes[stage];
  const uint2* scales = s.scales[stage][sub] + group * 64;
  if constexpr (!kDx) {
    // Codes [128 rows][128 bytes]. The 128-byte swizzle permutes a row's 16-byte chunks by row % 8.
    const uint8_t* base = codes + (group * 64 + warp * 16 + row) * 128;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int chunk = ((2 * sub + half) ^ row) * 16;
      raw.words[half][0] = *reinterpret_cast<const uint4*>(base + chunk);
      raw.words[half][1] = *reinterpret_cast<const uint4*>(base + 8 * 128 + chunk);
    }
    raw.scales[0] = scales[warp * 16 + row];
    raw.scales[1] = scales[warp * 16 + row + 8];
  } else {
    // Codes [256 weight rows][64 bytes = 128 outs]. The 64-byte swizzle permutes a row's 16-byte chunks by row / 2.
    const int chunk = group * 2 + warp / 2, within = (warp % 2) * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = 8 * i + row;
      const uint8_t* from = codes + (sub * 64 + n) * 64 + ((chunk ^ ((n >> 1) & 3)) * 16) + within;
      raw.words[i] = *reinterpret_cast<const uint2*>(from);
      raw.scales[i] = scales[n];
    }
  }
}

// A fragments of a step for this warp's 16 outs: a[q] multiplies contraction columns 16 q to 16 q + 15.
template <typename T, bool kDx>
__device__ __forceinline__ void decode_step(uint32_t (&a)[4][4], const RawStep<kDx>& raw, uint32_t table, int lane) {
  const uint32_t selector = 0x4440 | (lane % 4);
  if constexpr (!kDx) {
    // Word j of a row's 32 bytes holds contraction columns 8 j to 8 j + 7, this lane's pair in byte lane % 4.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4 w = raw.words[half][r];
        a[2 * half][r] = decode_pair<T>(table, w.x, selector, raw.scales[r]);
        a[2 * half][2 + r] = decode_pair<T>(table, w.y, selector, raw.scales[r]);
        a[2 * half + 1][r] = decode_pair<T>(table, w.z, selector, raw.scales[r]);
        a[2 * half + 1][2 + r] = decode_pair<T>(table, w.w, selector, raw.scales[r]);
      }
    }
  } else {
    // Pairs lie along the outs, so each 8x8 block is transposed.
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint2 w = raw.words[i];
      a[i / 2][2 * (i % 2)] = transpose_8x8(decode_pair<T>(table, w.x, selector, raw.scales[i]));
      a[i / 2][2 * (i % 2) + 1] = transpose_8x8(decode_pair<T>(table, w.y, selector, raw.scales[i]));
    }
  }
}

struct TilePosition {
  int token_tile, out_tile;
};

// Eight consecutive tiles along the tokens share their outs, so that the weight is read once for them all and their
// tokens stay in the L2 cache.
__device__ __forceinline__ TilePosition tile_position(const TileProblem& p, int tile) {
  constexpr int kGroup = 8;
  const int group = tile / (kGroup * p.out_tiles), first = group * kGroup;
  const int height = p.token_tiles - first < kGroup ? p.token_tiles - first : kGroup;
  const int within = tile - group * kGroup * p.out_tiles;
  return {first + within % height, within / height};
}

// Fetches what the block's first tile starts with into the L2 cache: weights, which an earlier kernel may be writing,
// so that they may not be read yet, and whose first touch costs the most.
template <bool kDx>
__device__ __forceinline__ void prefetch_weights(const TileProblem& p, const ChunkRange& range) {
  const NF4DeviceWeight& w = p.weight;
  const int outs = tile_position(p, p.first_tile + blockIdx.x / p.split).out_tile * kTileOuts;
  const int depth = range.first * kTileChunk * kTileDepth;
  for (int i = threadIdx.x; i < (kDx ? kTileChunk * kTileDepth : kTileOuts); i += kTileThreads) {
    const int64_t row = (kDx ? depth : outs) + i, col = kDx ? outs : depth;
    if (row >= p.weight_rows || col >= p.weight_cols) continue;
    const int64_t element = row * p.weight_cols + col, block = element >> w.log2_blocksize;
    prefetch_l2(w.packed + element / 2);
    if (w.absmax_codes == nullptr) {
      prefetch_l2(w.absmax + block);
    } else {
      prefetch_l2(w.absmax_codes + block);
      if (i % 32 == 0) prefetch_l2(w.nested_absmax + (block >> w.log2_nested_blocksize));
    }
  }
  if (w.nested_code != nullptr && threadIdx.x < 9) {
    prefetch_l2(threadIdx.x < 8 ? w.nested_code + threadIdx.x * 32 : w.nested_offset);
  }
}

// Decodes the scales of every kWeightStages-th chunk, the loads of all its steps in flight together. A warp thus always
// fills the same stage: it could not tell the parities of a stage two rounds apart.
template <typename T, bool kDx, int kTokens>
__device__ __forceinline__ void produce_scales(TileShared<kTokens>& s, const TileProblem& p, const ChunkRange& range,
                                               int tile_blocks, int warp, int lane) {
  using Shared = TileShared<kTokens>;
  constexpr int kRows = kTileOuts / 32;
  const NF4DeviceWeight& w = p.weight;
  const bool nested = w.absmax_codes != nullptr;
  const float offset = nested ? __ldg(w.nested_offset) : 0.0f;
  bool code_ready = !nested;
  RingPosition<Shared::kWeightStages> at;
  for (int tile = p.first_tile + blockIdx.x / p.split; tile < p.last_tile; tile += tile_blocks) {
    const TilePosition where = tile_position(p, tile);
    for (int chunk = range.first; chunk < range.last; ++chunk) {
      if (at.stage == warp) {
        constexpr int kTogether = kTokens == 256 ? 2 : kTileChunk;  // steps, limited by the producers' registers
#pragma unroll
        for (int sub0 = 0; sub0 < kTileChunk; sub0 += kTogether) {
          float value[kTogether][kRows];
          int code[kTogether][kRows];
#pragma unroll
          for (int sub = 0; sub < kTogether; ++sub) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              const int e = lane + 32 * i;
              const int64_t depth = int64_t{chunk * kTileChunk + sub0 + sub} * kTileDepth;
              const int64_t row = kDx ? depth + e % 64 : where.out_tile * kTileOuts + e;
              const int64_t col = kDx ? where.out_tile * kTileOuts + e / 64 * 64 : depth;
              value[sub][i] = 0.0f;  // of rows and columns beyond the weight
              code[sub][i] = -1;
              if (row < p.weight_rows && col < p.weight_cols) {
                const int64_t block = (row * p.weight_cols + col) >> w.log2_blocksize;
                if (nested) {
                  code[sub][i] = __ldg(w.absmax_codes + block);
                  value[sub][i] = __ldg(w.nested_absmax + (block >> w.log2_nested_blocksize));
                } else {
                  value[sub][i] = __ldg(w.absmax + block);
                }
              }
            }
          }
          if (!code_ready) {  // the consumers fetch it meanwhile
            named_barrier(4, 256 + 32 * Shared::kWeightStages);
            code_ready = true;
          }
          if (sub0 == 0) barrier_wait_idle(&s.weights_empty[at.stage], at.parity ^ 1);
#pragma unroll
          for (int sub = 0; sub < kTogether; ++sub) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              float v = value[sub][i];
              if (code[sub][i] >= 0) v = __fadd_rn(__fmul_rn(s.nested_code[code[sub][i]], v), offset);
              s.scales[at.stage][sub0 + sub][lane + 32 * i] = split_scale<T>(v);
            }
          }
        }
        barrier_arrive(&s.weights_full[at.stage]);
      }
      at.advance();
    }
  }
  if (!code_ready) named_barrier_arrive(4, 256 + 32 * Shared::kWeightStages);  // fewer chunks than warps
}

template <bool kDx, int kTokens>
__device__ __forceinline__ void produce_tiles(TileShared<kTokens>& s, const TileProblem& p, const CUtensorMap* x_map,
                                              const CUtensorMap* code_map, const ChunkRange& range, int tile_blocks) {
  using Shared = TileShared<kTokens>;
  RingPosition<Shared::kTokenStages> token_at;
  RingPosition<Shared::kWeightStages> weight_at;
  for (int tile = p.first_tile + blockIdx.x / p.split; tile < p.last_tile; tile += tile_blocks) {
    const TilePosition where = tile_position(p, tile);
    const int outs = where.out_tile * kTileOuts, tokens = where.token_tile * kTokens;
    for (int chunk = range.first; chunk < range.last; ++chunk) {
      const int depth = chunk * kTileChunk * kTileDepth;
      uint64_t* weights_full = &s.weights_full[weight_at.stage];
      barrier_wait(&s.weights_empty[weight_at.stage], weight_at.parity ^ 1);
      barrier_arrive_expect(weights_full, Shared::kCodeBytes);
      tensor_load(s.codes[weight_at.stage], code_map, kDx ? outs / 2 : depth / 2, kDx ? depth : outs, weights_full);
      weight_at.advance();
      for (int step = chunk * kTileChunk; step < (chunk + 1) * kTileChunk && step < range.last_step; ++step) {
        uint64_t* tokens_full = &s.tokens_full[token_at.stage];
        barrier_wait(&s.tokens_empty[token_at.stage], token_at.parity ^ 1);
        barrier_arrive_expect(tokens_full, Shared::kTokenBytes);
        tensor_load(s.tokens[token_at.stage], x_map, step * kTileDepth, tokens, tokens_full);
        token_at.advance();
      }
    }
  }
}

// Writes sums, a batch of 32 tokens at a time, through shared memory, where a token's 64 outs of this warpgroup become
// a row of 128 bytes under the 128-byte swizzle.
template <typename T, int kTokens>
class Writer {
 public:
  __device__ __forceinline__ Writer(TileShared<kTokens>& s, const TileProblem& p, const CUtensorMap* y_map, int token0,
                                    int out0, int group, int warp, int lane)
      : s_(s), y_map_(y_map), token0_(token0), out0_(out0), group_(group), leader_(warp == 0 && lane == 0) {
    const int out = out0 + warp * 16 + lane / 4;
    const T* bias = static_cast<const T*>(p.bias);
    bias_low_ = bias != nullptr && out < p.outs ? to_float(bias[out]) : 0.0f;
    bias_high_ = bias != nullptr && out + 8 < p.outs ? to_float(bias[out + 8]) : 0.0f;
    // Lane l % 16 addresses token l % 8 of the first (outs 0-7 of the warp's 16) or second 8x8 block.
    const int chunk = (2 * warp + ((lane / 8) & 1)) ^ (lane % 8);
    row_ = shared_address(s.out[group]) + (lane % 8) * 128 + chunk * 16;
  }

  // v: four sums of each of the batch's four groups of 8 tokens, as wgmma leaves them. All of the warpgroup calls.
  __device__ __forceinline__ void write(int batch, const float* v) {
    const int buffer = batch % 2;
    if (leader_) tensor_store_wait<1>();
    named_barrier(1 + group_, 128);  // the buffer is free
#pragma unroll
    for (int g = 0; g < kTileBatch / 8; ++g) {
      const uint32_t low = pack_pair<T>(v[4 * g] + bias_low_, v[4 * g + 1] + bias_low_);
      const uint32_t high = pack_pair<T>(v[4 * g + 2] + bias_high_, v[4 * g + 3] + bias_high_);
      asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                       row_ + buffer * TileShared<kTokens>::kOutBytes + g * 1024),
                   "r"(low), "r"(high)
                   : "memory");
    }
    shared_writes_fence();
    named_barrier(1 + group_, 128);
    if (leader_) tensor_store(y_map_, s_.out[group_][buffer], out0_, token0_ + batch * kTileBatch);
  }

 private:
  TileShared<kTokens>& s_;
  const CUtensorMap* y_map_;
  int token0_, out0_, group_;
  bool leader_;
  float bias_low_, bias_high_;
  uint32_t row_;
};

// The parts of a cluster's blocks become the tile: every block leaves its sums in its (now idle) token buffers, and
// rank r adds up and writes its share of the batches, in rank order. A loop, not unrolled: straight code that runs once
// would wait for its instructions longer than for the sums.
template <typename T, int kTokens>
__device__ __forceinline__ void reduce_and_write(TileShared<kTokens>& s, const TileProblem& p,
                                                 const float (&d)[kTokens / 2], Writer<T, kTokens> writer, int token0,
                                                 int rank, int thread) {
  constexpr int kBatches = kTokens / kTileBatch, kGroups = kTileBatch / 8;
  float4* own = reinterpret_cast<float4*>(s.tokens) + thread;  // [group of 8 tokens][thread]
  named_barrier(3, 256);                                       // both warpgroups are done with the token buffers
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) own[j * 256] = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
  cluster_sync();
  const int share = (kBatches + p.split - 1) / p.split, last = min((rank + 1) * share, kBatches);
#pragma unroll 1
  for (int batch = rank * share; batch < last && token0 + batch * kTileBatch < p.M; ++batch) {
    const uint32_t local = shared_address(own + batch * kGroups * 256);
    float sum[4 * kGroups];
#pragma unroll
    for (int i = 0; i < 4 * kGroups; ++i) sum[i] = 0.0f;
#pragma unroll 2
    for (int r = 0; r < p.split; ++r) {
      const uint32_t part = cluster_address(local, static_cast<uint32_t>(r));
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float4 x = cluster_load(part + g * 4096);
        sum[4 * g] += x.x;
        sum[4 * g + 1] += x.y;
        sum[4 * g + 2] += x.z;
        sum[4 * g + 3] += x.w;
      }
    }
    writer.write(batch, sum);
  }
  cluster_arrive();  // a block may end when nobody reads its sums any more: waited for at the kernel's end
}

template <typename T, bool kDx, int kTokens, bool kSplit>
__device__ __forceinline__ void consume(TileShared<kTokens>& s, const TileProblem& p, const CUtensorMap* y_map,
                                        const ChunkRange& range, int tile_blocks, int rank, int group, int warp,
                                        int lane) {
  using Shared = TileShared<kTokens>;
  constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;
  const uint32_t table = shared_address(s.pairs) + lane * 4;
  RingPosition<Shared::kTokenStages> token_at;
  RingPosition<Shared::kWeightStages> weight_at;
  if (p.weight.nested_code != nullptr) {
    const int thread = group * 128 + warp * 32 + lane;
    s.nested_code[thread] = __ldg(p.weight.nested_code + thread);
    named_barrier_arrive(4, 256 + 32 * Shared::kWeightStages);
  }
  float d[kTokens / 2];
  uint32_t a[2][4][4];
  RawStep<kDx> raw;
  // Loads step `sub` of the current chunk; after a chunk's last step its stage is free.
  const auto load = [&](int step, int sub) {
    if (sub == 0) barrier_wait(&s.weights_full[weight_at.stage], weight_at.parity);
    load_step<kDx>(raw, s, weight_at.stage, sub, group, warp, lane);
    if (sub == kTileChunk - 1 || step + 1 == range.last_step) {
      barrier_arrive(&s.weights_empty[weight_at.stage]);
      weight_at.advance();
    }
  };
  for (int tile = p.first_tile + blockIdx.x / p.split; tile < p.last_tile; tile += tile_blocks) {
    const TilePosition where = tile_position(p, tile);
    const int first_step = range.first * kTileChunk;
    int accumulate = 0;
    int previous = -1;  // the token stage of the step before
    load(first_step, 0);
    decode_step<T, kDx>(a[0], raw, table, lane);
    if (first_step + 1 < range.last_step) load(first_step + 1, 1);
    for (int chunk = range.first; chunk < range.last; ++chunk) {
#pragma unroll
      for (int sub = 0; sub < kTileChunk; ++sub) {
        const int step = chunk * kTileChunk + sub;
        if (step >= range.last_step) break;
        barrier_wait(&s.tokens_full[token_at.stage], token_at.parity);
        const uint64_t tokens = wgmma_descriptor(shared_address(s.tokens[token_at.stage]));
        wgmma_fence();
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          WgmmaRS<kTokens>::template mma<kBFloat16>(d, a[sub % 2][q], tokens + 2 * q, accumulate);
          accumulate = 1;
        }
        wgmma_commit();
        wgmma_wait<1>();  // the step before this one is done: its fragments and its tokens are free
        if (previous >= 0 && lane == 0) barrier_arrive(&s.tokens_empty[previous]);
        previous = token_at.stage;
        token_at.advance();
        // While the tensor cores work: fragments of the next step, words of the one after.
        if (step + 1 < range.last_step) decode_step<T, kDx>(a[1 - sub % 2], raw, table, lane);
        if (step + 2 < range.last_step) load(step + 2, (sub + 2) % kTileChunk);
      }
    }
    wgmma_wait<0>();
    // What follows may not be moved up to where it would read sums in flight: the compiler would serialize the
    // products.
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) asm volatile("" : "+f"(d[i]));
    if (lane == 0) barrier_arrive(&s.tokens_empty[previous]);
    const int token0 = where.token_tile * kTokens, out0 = where.out_tile * kTileOuts + group * 64;
    Writer<T, kTokens> writer(s, p, y_map, token0, out0, group, warp, lane);
    if constexpr (kSplit) {
      reduce_and_write<T, kTokens>(s, p, d, writer, token0, rank, group * 128 + warp * 32 + lane);
    } else {
#pragma unroll
      for (int batch = 0; batch < kTokens / kTileBatch; ++batch) {
        if (token0 + batch * kTileBatch < p.M) writer.write(batch, d + 4 * batch * (kTileBatch / 8));
      }
    }
  }
  if (warp == 0 && lane == 0) tensor_store_finish();
  if constexpr (kSplit) {
    __syncwarp();
    cluster_wait();
  }
}

template <typename T, bool kDx, int kTokens, bool kSplit>
__global__ void __launch_bounds__(kTileThreads, 1)
    nf4_tile_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap code_map,
                    const __grid_constant__ CUtensorMap y_map, const __grid_constant__ TileProblem p) {
  using Shared = TileShared<kTokens>;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Shared& s = *reinterpret_cast<Shared*>(shared_bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&x_map);
    tensor_map_prefetch(&code_map);
    tensor_map_prefetch(&y_map);
    for (int i = 0; i < Shared::kTokenStages; ++i) {
      barrier_init(&s.tokens_full[i], 1);
      barrier_init(&s.tokens_empty[i], 8);  // the consumers' warps
    }
    for (int i = 0; i < Shared::kWeightStages; ++i) {
      barrier_init(&s.weights_full[i], 33);  // the loading thread and the scales' warp
      barrier_init(&s.weights_empty[i], 256);
    }
    barrier_init_fence();
  }
  for (int i = threadIdx.x; i < 256 * 8; i += kTileThreads) {
    const uint32_t pair = pack_pair<T>(kNF4CodeDevice[(i / 8) >> 4], kNF4CodeDevice[(i / 8) & 15]);
    reinterpret_cast<uint4*>(s.pairs)[i] = make_uint4(pair, pair, pair, pair);
  }
  const int rank = kSplit ? static_cast<int>(cluster_rank()) : 0;
  const int tile_blocks = gridDim.x / p.split;
  const ChunkRange range = chunk_range(p, rank);
  prefetch_weights<kDx>(p, range);
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();
  if (warp < 4) {
    if constexpr (kTokens == 256) registers_decrease<56>();
    if (warp == 0) {
      if (lane == 0) produce_tiles<kDx>(s, p, &x_map, &code_map, range, tile_blocks);
      __syncwarp();
    } else {
      if (warp <= Shared::kWeightStages) produce_scales<T, kDx>(s, p, range, tile_blocks, warp - 1, lane);
    }
    if constexpr (kSplit) {  // as the consumers do
      cluster_sync();
      cluster_arrive();
      cluster_wait();
    }
  } else {
    if constexpr (kTokens == 256) registers_increase<224>();
    consume<T, kDx, kTokens, kSplit>(s, p, &y_map, range, tile_blocks, rank, (warp - 4) / 4, warp % 4, lane);
  }
}

}  // namespace peftkern
