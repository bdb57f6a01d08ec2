// Which LoRA matmuls have kernels of their own: pure functions, tested on the CPU through peftkern._host.
#pragma once

#include <cstdint>
#include <vector>

#include "gemm/gemm_config.h"
#include "nf4/low_rank.h"
#include "nf4/matmul_config.h"

namespace peftkern {

// With fewer tokens too few tiles share the multiprocessors: the GEMM library, which also splits the contraction,
// leads.
inline constexpr int64_t kGemmMinTokens = 1024;
inline constexpr int64_t kGemmMaxRank = 256;
inline constexpr int64_t kGemmMaxColumns = 128;  // of several layers together

struct LoraGemmTraits {
  int64_t M, N, K, rank;
  bool half;               // activations, S and the frozen weight in one 16-bit type; adapters in 16 or 32 bits
  bool aligned;            // every operand and every row of the frozen weight on 16 bytes
  int compute_capability;  // 10 * major + minor
  uint32_t threshold;      // of the dropout, 0 without
};

constexpr bool lora_gemm_covers(const LoraGemmTraits& t) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 512;                       // coordinates of the copy engine are 32-bit
  const bool whole_rows = t.N % 8 == 0 && t.K % 8 == 0 && t.rank % 8 == 0;  // of 16 n bytes, as the copy engine wants
  return t.compute_capability == 90 && t.half && t.aligned && whole_rows && t.N > 0 && t.K > 0 && t.rank > 0 &&
         t.threshold <= kLoraMaxThreshold && t.rank <= kGemmMaxRank && t.M >= kGemmMinTokens && t.M <= kMost &&
         t.N <= kMost && t.K <= kMost;
}

// Several layers on one x in a launch: each a LoRA matmul without dropout, or a frozen layer (rank 0).
inline bool lora_group_covers(int64_t M, int64_t K, const std::vector<int64_t>& N, const std::vector<int64_t>& ranks,
                              bool half, bool aligned, int compute_capability) {
  int64_t columns = 0;
  for (size_t i = 0; i < N.size(); ++i) {
    const int64_t rank = ranks[i] == 0 ? 8 : ranks[i];
    if (!lora_gemm_covers({M, N[i], K, rank, half, aligned, compute_capability, 0})) return false;
    columns += ranks[i];
  }
  return N.size() > 1 && N.size() <= kGemmMaxLayers && columns > 0 && columns <= kGemmMaxColumns;
}

// The kernel that multiplies an NF4 weight and adds the low-rank term, kSmallM or kMidM; kDequantize: none. A on 16
// bytes, adapters in 16 or 32 bits.
inline MatmulKernel lora_few_tokens_kernel(const MatmulTraits& t, int64_t rank) {
  const MatmulKernel kernel = matmul_kernel(t);
  const bool takes = kernel == MatmulKernel::kSmallM || (kernel == MatmulKernel::kMidM && t.M <= kMidLowRankMaxTokens);
  return takes && !t.dx && rank > 0 && rank <= kLowRankMaxRank ? kernel : MatmulKernel::kDequantize;
}

}  // namespace peftkern
