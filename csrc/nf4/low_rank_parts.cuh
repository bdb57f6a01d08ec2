// S = x A^T inside the launch that needs it. The first blocks make a part each, of 16 columns of S over a share of the
// contraction. The others multiply with the weight meanwhile and take S in the end: small_m's add up the parts
// themselves, for mid_m's, which need more of S, the block does that makes the last part of 16 columns. Parts are added
// up in their order, so results repeat bitwise.
//
// The turnstile's first word counts the parts that are made, with mid_m the 16 columns that are whole, then the blocks
// that know, and with the last of these is 0 again. The others count mid_m's parts, of 16 columns each. Blocks start in
// the order of their numbers, so that none waits for one that cannot start.
#pragma once

#include <cstdint>

#include "common/dependent_launch.cuh"
#include "common/mma.cuh"
#include "common/shared_memory.cuh"
#include "nf4/low_rank.cuh"

namespace peftkern {

// One warp's share of a part, for 8 or 16 tokens: steps first, first + stride, ... of 64 columns. A: this lane's row;
// the other is eight rows on. x: token g; tokens: that are left from it on.
template <typename T, typename From, int kTokenTiles>
__device__ __forceinline__ void multiply_part(float (&sum)[kTokenTiles][4], const From* A, const T* x, int64_t K,
                                              int first, int last, int stride, bool top_row, bool bottom_row,
                                              int tokens) {
#pragma unroll kTokenTiles == 1 ? 4 : 2
  for (int step = first; step < last; step += stride) {
    const int64_t at = step * kPartColumns;
    uint32_t top[8], bottom[8];
    load_pairs<T>(top, A + at, top_row);
    load_pairs<T>(bottom, A + 8 * K + at, bottom_row);
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      uint32_t own[8];
      load_pairs<T>(own, x + 8 * j * K + at, 8 * j < tokens);
#pragma unroll
      for (int p = 0; p < 8; p += 2) mma<T>(sum[j], top[p], bottom[p], top[p + 1], bottom[p + 1], own[p], own[p + 1]);
    }
  }
}

// One more event of a launch. last: its events but the last, which makes the count 0.
__device__ __forceinline__ void count(const NF4LowRank& l, uint32_t last) {
  asm volatile("red.relaxed.gpu.global.inc.u32 [%0], %1;" ::"l"(l.turnstile), "r"(last) : "memory");
}
__device__ __forceinline__ void count_release(const NF4LowRank& l, uint32_t last) {
  asm volatile("red.release.gpu.global.inc.u32 [%0], %1;" ::"l"(l.turnstile), "r"(last) : "memory");
}
__device__ __forceinline__ int count_part(const NF4LowRank& l, int columns, int last) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(l.turnstile + 1 + columns), "r"(last)
               : "memory");
  return before;
}
__device__ __forceinline__ void wait_for_count(const NF4LowRank& l, uint32_t events) {
  uint32_t count;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(l.turnstile) : "memory");
  } while (count < events);
}

// parts: of the contraction.
constexpr int part_tasks(const NF4LowRank& l, int parts) {
  return parts * (l.padded / kPartRows);
}

// Makes a part of S. A warp takes up to 16 tokens, and those with the same tokens share the part's steps. sums: kWarps
// * 256 floats of shared memory, 128 where there are 8 tokens at most.
template <typename T, int kTokenTiles, int kWarps>
__device__ __forceinline__ void make_part(const NF4LowRank& l, int parts, const T* x, int tokens, int64_t K, int task,
                                          uint32_t sums) {
  constexpr int kTiles = kTokenTiles < 2 ? 1 : 2, kGroups = kTokenTiles / kTiles, kShares = kWarps / kGroups;
  constexpr int kCells = kTiles * 128;  // of a group
  static_assert(kWarps % kGroups == 0, "every group has as many warps");
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int part = task % parts, row0 = task / parts * kPartRows;
  const int steps = static_cast<int>(K / kPartColumns), begin = steps * part / parts, end = steps * (part + 1) / parts;
  if (const int row = row0 + (lane & 15), bytes = float_bytes(l.A_type); row < l.rank) {
    const char* const from = static_cast<const char*>(l.A) + row * K * bytes + (lane >> 4) * 128;
    for (int step = begin + warp; step < end; step += kWarps) {
      if (lane < 16 || bytes == 4) prefetch_l2(from + step * kPartColumns * bytes);
    }
  }
  wait_for_earlier_kernels();
  const int64_t from = (row0 + g) * K + t * 16;
  const bool top_row = row0 + g < l.rank, bottom_row = row0 + g + 8 < l.rank;
  const int token0 = warp / kShares * kTiles * 8 + g;
  float sum[kTiles][4] = {};
  const auto multiply = [&](const auto* A) {
    multiply_part<T>(sum, A + from, x + token0 * K + t * 16, K, begin + warp % kShares, end, kShares, top_row,
                     bottom_row, tokens - token0);
  };
  if (l.A_type == FloatType::kFloat32) {
    multiply(static_cast<const float*>(l.A));
  } else if (l.A_type == FloatType::kBFloat16) {
    multiply(static_cast<const __nv_bfloat16*>(l.A));
  } else {
    multiply(static_cast<const __half*>(l.A));
  }
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i) {
    store_shared(sums + (warp * kCells + i * 32 + lane) * 4, sum[i / 4][i % 4]);
  }
  __syncthreads();
  // Cell c is what lane c % 32 of its group's warps holds in its register c % kCells / 32: row g or g + 8, token 2 t or
  // 2 t + 1 of 8.
  for (int c = threadIdx.x; c < kGroups * kCells; c += kWarps * 32) {
    const int row = row0 + (c & 31) / 4 + (c >> 6 & 1) * 8, token = (c >> 7) * 8 + (c & 3) * 2 + (c >> 5 & 1);
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < kShares; ++w) {
      value += load_shared(sums + ((c / kCells * kShares + w) * kCells + c % kCells) * 4);
    }
    if (token < tokens) l.parts[(static_cast<int64_t>(part) * tokens + token) * l.padded + row] = value;
  }
  __syncthreads();
}

// Four neighbouring values of S, from its parts, as two pairs in T.
template <typename T>
__device__ __forceinline__ uint2 sum_parts(const NF4LowRank& l, int parts, int fours, int i) {
  float4 v[kMaxParts];
#pragma unroll
  for (int part = 0; part < kMaxParts; ++part) {
    // Read once: not through the L1 cache.
    v[part] = part < parts ? __ldcg(reinterpret_cast<const float4*>(l.parts) + part * fours + i) : float4{};
  }
  float4 sum = v[0];
#pragma unroll
  for (int part = 1; part < kMaxParts; ++part) {
    sum = {sum.x + v[part].x, sum.y + v[part].y, sum.z + v[part].z, sum.w + v[part].w};
  }
  return {pack_pair<T>(sum.x, sum.y), pack_pair<T>(sum.z, sum.w)};
}

// Writes them into S, without its padding.
__device__ __forceinline__ void write_four(const NF4LowRank& l, int i, uint2 four) {
  const int token = i * 4 / l.padded, column = i * 4 % l.padded;
  uint16_t* const S = static_cast<uint16_t*>(l.S) + token * l.rank;
  const uint32_t bits[4] = {four.x & 0xffff, four.x >> 16, four.y & 0xffff, four.y >> 16};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    if (column + c < l.rank) S[column + c] = static_cast<uint16_t>(bits[c]);
  }
}

// A block of small_m takes S: its values, in T, into shared memory, [tokens][padded], and into S itself if `write`. All
// threads. readers: such blocks.
template <typename T>
__device__ __forceinline__ void take_parts(const NF4LowRank& l, int parts, int tokens, int readers, uint32_t to,
                                           bool write, int threads) {
  const int fours = tokens * l.padded / 4;
  if (static_cast<int>(threadIdx.x & ~31u) < fours) {  // this warp adds up some
    if ((threadIdx.x & 31) == 0) wait_for_count(l, part_tasks(l, parts));
    __syncwarp();
  }
  for (int i = threadIdx.x; i < fours; i += threads) {
    const uint2 four = sum_parts<T>(l, parts, fours, i);
    store_shared(to + i * 8, __uint_as_float(four.x), __uint_as_float(four.y));
    if (write) write_four(l, i, four);
  }
  __syncthreads();
  if (threadIdx.x == 0) count(l, part_tasks(l, parts) + readers - 1);
}

// A block of mid_m that has made a part: that of the last part makes its columns of S whole. All threads. last_part: a
// word of shared memory. readers: blocks that will take S.
template <typename T>
__device__ __forceinline__ void finish_part(const NF4LowRank& l, int parts, int tokens, int task, int readers,
                                            int* last_part, int threads) {
  const int columns = task / parts;
  if (parts > 1) {
    if (threadIdx.x == 0) *last_part = count_part(l, columns, parts - 1) == parts - 1;
    __syncthreads();
    if (!*last_part) return;
  }
  constexpr int kFours = kPartRows / 4;  // of a token
  const int row_fours = l.padded / 4, fours = tokens * row_fours;
  for (int j = threadIdx.x; j < tokens * kFours; j += threads) {
    const int i = j / kFours * row_fours + columns * kFours + j % kFours;
    const uint2 four = sum_parts<T>(l, parts, fours, i);
    static_cast<uint2*>(l.whole)[i] = four;
    write_four(l, i, four);
  }
  __syncthreads();
  if (threadIdx.x == 0) count_release(l, l.padded / kPartRows + readers - 1);
}

// One thread of every block of mid_m that takes S: waits until it is whole.
__device__ __forceinline__ void wait_for_whole(const NF4LowRank& l, int readers) {
  const uint32_t columns = l.padded / kPartRows;
  wait_for_count(l, columns);
  count(l, columns + readers - 1);
}

}  // namespace peftkern
