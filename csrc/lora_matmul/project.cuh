// lora_project: S [M, rank] = x [M, K] A [rank, K]^T for 17 to 64 tokens, for the NF4 matmul that runs next (mid_m).
// Bytes: A once, 128 KB at K = 4096, rank 16, 16-bit. That is nothing: what counts is the time from the end of the
// kernel that wrote x to the start of the one that waits for S. So a block does little, 16 rows of A times 16 tokens
// over a part of K, and of it every warp 64 columns at K = 4096; A is in the L2 cache before x is there; and the matmul
// starts, and reads its weight, beside this kernel.
//
// The blocks of a cluster add up their parts in their order, each for its share of the block's 256 sums: results repeat
// bitwise.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dependent_launch.cuh"
#include "common/hopper.cuh"
#include "common/mma.cuh"
#include "common/numbers.cuh"
#include "lora_matmul/project_config.h"
#include "nf4/low_rank.cuh"

namespace peftkern {

struct ProjectArguments {
  const void *x, *A;
  void *whole, *S;
  int64_t K;
  int M, rank, padded;
};

// T: of x and S. From: of A. Blocks along x are a cluster.
template <typename T, typename From>
__global__ void __launch_bounds__(kProjectWarps * 32) lora_project_kernel(const __grid_constant__ ProjectArguments a) {
  constexpr int kCells = kProjectRows * kProjectTokens;
  __shared__ float sums[kProjectWarps][kCells];
  __shared__ float received[kCells];
  __shared__ uint64_t all_received;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int part = blockIdx.x;
  const int row0 = blockIdx.y * kProjectRows, token0 = blockIdx.z * kProjectTokens;
  const int steps = static_cast<int>(a.K / kProjectColumns);
  const int first = steps * part / kProjectParts + warp, last = steps * (part + 1) / kProjectParts;
  const bool top_row = row0 + g < a.rank, bottom_row = row0 + g + 8 < a.rank;
  const From* const A = static_cast<const From*>(a.A) + (row0 + g) * a.K + t * 16;
  const T* const x = static_cast<const T*>(a.x) + (token0 + g) * a.K + t * 16;

  allow_next_kernel();
  for (int step = first; step < last; step += kProjectWarps) {
    if (top_row) prefetch_l2(A + step * kProjectColumns);
    if (bottom_row) prefetch_l2(A + 8 * a.K + step * kProjectColumns);
  }
  if (threadIdx.x == 0) {
    barrier_init(&all_received, 1);
    barrier_init_fence();
    barrier_arrive_expect(&all_received, sizeof received);
  }
  __syncwarp();
  cluster_arrive_relaxed();
  cluster_wait();
  wait_for_earlier_kernels();

  float sum[2][4] = {};
#pragma unroll 2
  for (int step = first; step < last; step += kProjectWarps) {
    uint32_t top[8], bottom[8], tokens[2][8];
    load_pairs<T>(tokens[0], x + step * kProjectColumns, token0 + g < a.M);
    load_pairs<T>(tokens[1], x + 8 * a.K + step * kProjectColumns, token0 + g + 8 < a.M);
    load_pairs<T>(top, A + step * kProjectColumns, top_row);
    load_pairs<T>(bottom, A + 8 * a.K + step * kProjectColumns, bottom_row);
#pragma unroll
    for (int p = 0; p < 8; p += 2) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        mma<T>(sum[j], top[p], bottom[p], top[p + 1], bottom[p + 1], tokens[j][p], tokens[j][p + 1]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[warp][i * 32 + lane] = sum[i / 4][i % 4];
  __syncthreads();

  // Cell c is what lane c % 32 of each warp holds in its register c / 32: row g or g + 8, token 2 t or 2 t + 1 of 8.
  const auto row_of = [&](int c) { return row0 + (c & 31) / 4 + (c >> 6 & 1) * 8; };
  const auto token_of = [&](int c) { return token0 + (c >> 7) * 8 + (c & 3) * 2 + (c >> 5 & 1); };
  static_assert(kCells == kProjectWarps * 32, "a cell a thread");
  const int cell = threadIdx.x;
  float value = 0.0f;
#pragma unroll
  for (int w = 0; w < kProjectWarps; ++w) value += sums[w][cell];
  constexpr int kShare = kCells / kProjectParts;
  const int owner = cell / kShare;
  cluster_send(cluster_address(shared_address(&received[part * kShare + cell % kShare]), owner),
               cluster_address(shared_address(&all_received), owner), value);
  if (threadIdx.x >= kShare) return;
  barrier_wait(&all_received, 0);
  const int own = part * kShare + threadIdx.x, row = row_of(own), token = token_of(own);
  float total = 0.0f;
#pragma unroll
  for (int p = 0; p < kProjectParts; ++p) total += received[p * kShare + threadIdx.x];
  const T rounded = round_to<T>(total);
  static_cast<T*>(a.whole)[token * a.padded + row] = rounded;
  if (row < a.rank && token < a.M) static_cast<T*>(a.S)[token * a.rank + row] = rounded;
}

}  // namespace peftkern
