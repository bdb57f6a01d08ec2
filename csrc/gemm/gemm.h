// A LoRA linear's forward or backward as its kernel takes it. Free of torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "gemm/gemm_shared.cuh"

namespace peftkern {

// All row-major and contiguous, 16-byte aligned; K, N and rank multiples of 8. rank 0: the frozen product alone.
struct LoraForward {
  const void *x, *weight, *bias;  // [M, K], [N, K], [N] or null: all `type`
  const void *A, *B;              // [rank, K], [N, rank]
  void *y, *S;                    // [M, N], [M, rank], of `type`
  void* workspace;                // lora_workspace_bytes
  int64_t M, N, K;
  int rank;
  FloatType type, A_type, B_type;
  float factor;         // of the low-rank term, dropout's 1 / (1 - p) included
  const int64_t* seed;  // of dropout, on the device; null: none
  uint32_t threshold;   // dropout_threshold(p), at most kLoraMaxThreshold
};

// dx, dA, dB may be null. x is read for dA, weight for dx, S for dB.
struct LoraBackward {
  const void *dy, *x, *weight, *A, *B, *S;
  void *dx, *dA, *dB;
  bool add_to_dx;  // which holds a sum of the same kind; rounded before and after
  void* workspace;
  int64_t M, N, K;
  int rank;
  FloatType type, A_type, B_type;
  float factor;         // of the low-rank term, dropout's 1 / (1 - p) included
  const int64_t* seed;  // of dropout, on the device; null: none
  uint32_t threshold;   // dropout_threshold(p), at most kLoraMaxThreshold
};

// What comes first in the workspace: counters and flags. In a backward pass D [M, rank] follows.
constexpr int64_t lora_flag_bytes(int64_t M, int64_t N, int64_t K) {
  const int64_t words =
      4 + kGemmMaxParts + gemm_ceil(M, kGemmTokens) + gemm_ceil(N, kGemmFeatures) + gemm_ceil(K, kGemmFeatures);
  return gemm_ceil(words * 4, 256) * 256;
}

// The parts' sums of one gradient.
constexpr int64_t lora_sum_bytes(int64_t M, int64_t features, int rank, bool fused) {
  const int parts = fused ? gemm_fused_blocks(M) : gemm_parts(M);
  if (parts == 1 || rank == 0) return 0;
  int columns = 16;
  while (columns < rank) columns *= 2;
  return int64_t{4} * parts * gemm_ceil(features, kGemmFeatures) * kGemmFeatures * columns;
}

constexpr int64_t lora_workspace_bytes(int64_t M, int64_t N, int64_t K, int rank) {
  return lora_flag_bytes(M, N, K) + 2 * rank * (M + N + gemm_ceil(K, 64) * 64) +
         lora_sum_bytes(M, N, rank, gemm_fuses(rank, N)) + lora_sum_bytes(M, K, rank, false) + 3 * 256;
}

}  // namespace peftkern
