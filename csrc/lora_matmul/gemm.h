// A LoRA linear's forward or backward as its kernel takes it. Free of torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "lora_matmul/gemm_shared.cuh"

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
  float factor;
};

// dx, dA, dB may be null. x is read for dA, weight for dx, S for dB.
struct LoraBackward {
  const void *dy, *x, *weight, *A, *B, *S;
  void *dx, *dA, *dB;
  void* workspace;
  int64_t M, N, K;
  int rank;
  FloatType type, A_type, B_type;
  float factor;
};

// Bytes before the skinny operands, which are `outs` and `contraction` rows of `rank`; D is [M, rank].
constexpr int64_t lora_flag_bytes(int64_t M) {
  return gemm_ceil((gemm_ceil(M, 2 * kGemmTokens) * 2 + 2) * 4, 256) * 256;
}

constexpr int64_t lora_workspace_bytes(int64_t M, int64_t N, int64_t K, int rank) {
  return lora_flag_bytes(M) + 2 * rank * (M + N + K) + 3 * 256;
}

}  // namespace peftkern
