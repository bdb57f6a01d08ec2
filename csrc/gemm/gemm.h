// A LoRA linear's forward or backward as its kernel takes it. Free of torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/workspace.h"
#include "gemm/gemm_shared.cuh"

namespace peftkern {

// A linear layer and its adapter. What it holds is row-major and contiguous, on 16 bytes; N, K and rank multiples of 8.
struct LoraLayer {
  const void* weight;     // [N, K]; read forward, and for dx
  int64_t weight_stride;  // elements from row to row, a multiple of 8; 0: contiguous
  const void* bias;       // [N] or null
  const void *A, *B;      // [rank, K], [N, rank]; rank 0: no adapter
  int64_t N;
  int rank, column;  // of S and D: where its columns begin
  float factor;      // of the low-rank term, dropout's 1 / (1 - p) included
  void* y;           // forward: [M, N], or null: this layer is projected only
  const void* dy;    // backward: [M, N], or null: this launch is not about this layer, except for its dA
  void *dA, *dB;     // backward: or null
};

// Layers on one x [M, K], of which S [M, columns] has the adapters' columns side by side.
struct LoraForward {
  const void* x;
  void* S;
  LoraLayer layers[kGemmMaxLayers];
  int count;     // of layers, those with y first
  bool project;  // S is made; otherwise it is there
  int64_t M, K;
  int columns;
  FloatType type, A_type, B_type;
  const int64_t* seed;  // of dropout, on the device; null: none. Of one layer only.
  uint32_t threshold;   // dropout_threshold(p), at most kLoraMaxThreshold
  void* workspace;      // LoraMemory
};

// x is read for dA, weights for dx, S for dB.
struct LoraBackward {
  const void *x, *S;
  void* dx;                          // or null
  void* D;                           // as S, of dy B; null: in the workspace
  LoraLayer layers[kGemmMaxLayers];  // those with dy first, of these those with an adapter
  int count;
  bool add_to_dx;  // which holds a sum of the same kind; rounded before and after
  int64_t M, K;
  int columns;
  FloatType type, A_type, B_type;
  const int64_t* seed;  // of dropout, on the device; null: none. Of one layer only.
  uint32_t threshold;   // dropout_threshold(p), at most kLoraMaxThreshold
  void* workspace;      // LoraMemory
};

// What a launch needs beside its operands. Made of a problem without a workspace, it tells the bytes.
struct LoraMemory {
  int* zeros;  // counters and flags
  int64_t zero_bytes;
  void *p1[kGemmMaxLayers], *p2[kGemmMaxLayers];  // skinny operands that are not as they are stored
  void* D;
  float *b_sums[kGemmMaxLayers], *a_sums;  // of the gradients' parts
  int64_t bytes;
};

// Whether a launch is about more than one layer, or about one of several whose columns lie side by side.
template <typename Problem>
bool lora_grouped(const Problem& p) {
  return p.count > 1 || p.columns != p.layers[0].rank;
}

// The smallest compiled rank that holds all of a problem's columns.
constexpr int lora_kernel_rank(int columns, bool grouped) {
  int rank = grouped ? 64 : 16;
  while (rank < columns) rank *= 2;
  return rank;
}

template <typename Problem>
int64_t lora_flags(const Problem& p) {
  int64_t words = 4 + kGemmMaxParts + gemm_ceil(p.M, kGemmTokens) + gemm_ceil(p.K, kGemmFeatures);
  for (int i = 0; i < p.count; ++i) words += gemm_ceil(p.layers[i].N, kGemmFeatures);
  return 4 * words;
}

template <typename Problem>
bool lora_dropout(const Problem& p) {
  return p.columns > 0 && p.seed != nullptr && p.threshold > 0;
}

inline LoraMemory lora_memory(const LoraForward& p) {
  Workspace taker(p.workspace);
  LoraMemory m{};
  m.zero_bytes = lora_flags(p);
  m.zeros = static_cast<int*>(taker.take(m.zero_bytes));
  for (int i = 0; i < p.count; ++i) {
    const LoraLayer& layer = p.layers[i];
    if (layer.rank == 0) continue;
    if (layer.y != nullptr) m.p2[i] = taker.take(2 * layer.N * layer.rank);
    if (p.project && (lora_dropout(p) || p.A_type != p.type)) {
      m.p1[i] = taker.take(2 * gemm_ceil(p.K, 64) * 64 * layer.rank);
    }
  }
  m.bytes = taker.taken();
  return m;
}

// Whether project jobs make dB, too.
inline bool lora_fuses(const LoraBackward& p) {
  int64_t features = 0;
  int rank = 0;
  const bool grouped = lora_grouped(p);
  if (p.dx == nullptr || !gemm_may_fuse(lora_kernel_rank(p.columns, grouped), grouped ? kGemmMaxLayers : 1)) {
    return false;
  }
  for (int i = 0; i < p.count; ++i) {
    const LoraLayer& layer = p.layers[i];
    if (layer.dy == nullptr || layer.rank == 0) continue;
    if (layer.dB == nullptr) return false;
    features += layer.N;
    rank = layer.rank > rank ? layer.rank : rank;
  }
  return rank > 0 && gemm_fuses(p.M, p.K, rank, features);
}

inline LoraMemory lora_memory(const LoraBackward& p) {
  const bool grouped = lora_grouped(p);
  const int kernel_rank = lora_kernel_rank(p.columns, grouped), parts = gemm_parts(p.M);
  const bool fused = lora_fuses(p);
  const auto sums = [](int64_t parts_of, int64_t features, int rank) {
    return int64_t{4} * parts_of * gemm_ceil(features, kGemmFeatures) * kGemmFeatures * rank;
  };
  Workspace taker(p.workspace);
  LoraMemory m{};
  m.zero_bytes = lora_flags(p);
  m.zeros = static_cast<int*>(taker.take(m.zero_bytes));
  bool any_dA = false, projects = false;
  for (int i = 0; i < p.count; ++i) {
    const LoraLayer& layer = p.layers[i];
    if (layer.rank == 0) continue;
    any_dA = any_dA || layer.dA != nullptr;
    if (layer.dy == nullptr) continue;
    projects = true;
    if (p.B_type != p.type) m.p1[i] = taker.take(2 * layer.N * layer.rank);
    if (layer.dB == nullptr) continue;
    if (fused) {
      m.b_sums[i] = static_cast<float*>(taker.take(sums(gemm_fused_blocks(p.M, p.K), layer.N, kGemmMaxFusedRank)));
    } else if (parts > 1) {
      m.b_sums[i] = static_cast<float*>(taker.take(sums(parts, layer.N, kernel_rank)));
    }
  }
  if (p.dx != nullptr && projects) m.p2[0] = taker.take(2 * p.K * p.columns);
  m.D = p.D != nullptr || !projects ? p.D : taker.take(2 * p.M * p.columns);
  if (any_dA && parts > 1)
    m.a_sums = static_cast<float*>(taker.take(sums(parts, p.K, grouped ? p.columns : kernel_rank)));
  m.bytes = taker.taken();
  return m;
}

}  // namespace peftkern
