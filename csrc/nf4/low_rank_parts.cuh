// S = x A^T inside the launch that needs it. The first blocks make a part each, of 16 columns of S over a share of the
// contraction. The others multiply with the weight meanwhile and take S in the end. Parts are added up in their order,
// so results repeat bitwise.
//
// The turnstile counts parts that are made, then blocks that have read them, and with the last of these is 0 again.
// Blocks start in the order of their numbers, so that none waits for one that cannot start.
#pragma once

#include <cstdint>

#include "common/dependent_launch.cuh"
#include "common/mma.cuh"
#include "nf4/low_rank.cuh"
#include "nf4/small_m_device.cuh"

namespace peftkern {

// One warp's share of a part: steps first, first + stride, ... of 64 columns. A: this lane's row; the other is eight
// rows on. x: token g; tokens: that are left from it on.
template <typename T, typename From, int kTokenTiles>
__device__ __forceinline__ void multiply_part(float (&sum)[kTokenTiles][4], const From* A, const T* x, int64_t K,
                                              int first, int last, int stride, bool top_row, bool bottom_row,
                                              int tokens) {
#pragma unroll kTokenTiles == 1 ? 4 : 2
  for (int step = first; step < last; step += stride) {
    const int64_t at = step * kPartColumns;
    uint32_t top[8], bottom[8], own[kTokenTiles][8];
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) load_pairs<T>(own[j], x + 8 * j * K + at, 8 * j < tokens);
    load_pairs<T>(top, A + at, top_row);
    load_pairs<T>(bottom, A + 8 * K + at, bottom_row);
#pragma unroll
    for (int p = 0; p < 8; p += 2) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        mma<T>(sum[j], top[p], bottom[p], top[p + 1], bottom[p + 1], own[j][p], own[j][p + 1]);
      }
    }
  }
}

// parts: of the contraction.
constexpr int part_tasks(const NF4LowRank& l, int parts) {
  return parts * (l.padded / kPartRows);
}

// All that a block does which makes a part of S. sums: kWarps * kTokenTiles * 128 floats of shared memory. readers:
// blocks that will take S.
template <typename T, int kTokenTiles, int kWarps>
__device__ __forceinline__ void make_part(const NF4LowRank& l, int parts, const T* x, int tokens, int64_t K, int task,
                                          int readers, uint32_t sums) {
  constexpr int kCells = kTokenTiles * 128;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int part = task % parts, row0 = task / parts * kPartRows;
  const int steps = static_cast<int>(K / kPartColumns);
  const int first = steps * part / parts + warp, last = steps * (part + 1) / parts;
  if (const int row = row0 + (lane & 15), bytes = float_bytes(l.A_type); row < l.rank) {
    const char* const from = static_cast<const char*>(l.A) + row * K * bytes + (lane >> 4) * 128;
    for (int step = first; step < last; step += kWarps) {
      if (lane < 16 || bytes == 4) prefetch_l2(from + step * kPartColumns * bytes);
    }
  }
  wait_for_earlier_kernels();
  const int64_t from = (row0 + g) * K + t * 16;
  const bool top_row = row0 + g < l.rank, bottom_row = row0 + g + 8 < l.rank;
  float sum[kTokenTiles][4] = {};
  const auto multiply = [&](const auto* A) {
    multiply_part<T>(sum, A + from, x + g * K + t * 16, K, first, last, kWarps, top_row, bottom_row, tokens - g);
  };
  if (l.A_type == FloatType::kFloat32) {
    multiply(static_cast<const float*>(l.A));
  } else if (l.A_type == FloatType::kBFloat16) {
    multiply(static_cast<const __nv_bfloat16*>(l.A));
  } else {
    multiply(static_cast<const __half*>(l.A));
  }
#pragma unroll
  for (int i = 0; i < 4 * kTokenTiles; ++i) {
    store_shared(sums + (warp * kCells + i * 32 + lane) * 4, sum[i / 4][i % 4]);
  }
  __syncthreads();
  // Cell c is what lane c % 32 of each warp holds in its register c / 32: row g or g + 8, token 2 t or 2 t + 1 of 8.
  for (int c = threadIdx.x; c < kCells; c += kWarps * 32) {
    const int row = row0 + (c & 31) / 4 + (c >> 6 & 1) * 8, token = (c >> 7) * 8 + (c & 3) * 2 + (c >> 5 & 1);
    float value = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value += load_shared(sums + (w * kCells + c) * 4);
    if (token < tokens) l.parts[(static_cast<int64_t>(part) * tokens + token) * l.padded + row] = value;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.release.gpu.global.inc.u32 [%0], %1;" ::"l"(l.turnstile), "r"(part_tasks(l, parts) + readers - 1)
                 : "memory");
  }
}

// Adds up the parts of S, in their order, into shared memory, [tokens][padded] in T, and into S itself if `write`. All
// threads of a block.
template <typename T>
__device__ __forceinline__ void take_parts(const NF4LowRank& l, int parts, int tokens, int readers, uint32_t to,
                                           bool write, int threads) {
  const uint32_t tasks = part_tasks(l, parts);
  const int fours = tokens * l.padded / 4;
  if (static_cast<int>(threadIdx.x & ~31u) < fours) {  // this warp adds up some
    if ((threadIdx.x & 31) == 0) {
      uint32_t made;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(made) : "l"(l.turnstile) : "memory");
      } while (made < tasks);
    }
    __syncwarp();
  }
  for (int i = threadIdx.x; i < fours; i += threads) {
    float4 v[kMaxParts];
#pragma unroll
    for (int part = 0; part < kMaxParts; ++part) {
      // Past the L1 cache, which is not coherent with what other multiprocessors wrote during this launch.
      v[part] = part < parts ? __ldcg(reinterpret_cast<const float4*>(l.parts) + part * fours + i) : float4{};
    }
    float4 sum = v[0];
#pragma unroll
    for (int part = 1; part < kMaxParts; ++part) {
      sum = {sum.x + v[part].x, sum.y + v[part].y, sum.z + v[part].z, sum.w + v[part].w};
    }
    const uint32_t low = pack_pair<T>(sum.x, sum.y), high = pack_pair<T>(sum.z, sum.w);
    store_shared(to + i * 8, __uint_as_float(low), __uint_as_float(high));
    if (write) {
      const int token = i * 4 / l.padded, column = i * 4 % l.padded;
      uint16_t* const S = static_cast<uint16_t*>(l.S) + token * l.rank;
      const uint32_t bits[4] = {low & 0xffff, low >> 16, high & 0xffff, high >> 16};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (column + c < l.rank) S[column + c] = static_cast<uint16_t>(bits[c]);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    asm volatile("red.relaxed.gpu.global.inc.u32 [%0], %1;" ::"l"(l.turnstile), "r"(tasks + readers - 1) : "memory");
  }
}

}  // namespace peftkern
