// Launches lora_prepare. Free of torch.
#pragma once

#include <algorithm>

#include "common/kernel_launch.h"
#include "gemm/prepare.cuh"

namespace peftkern {

template <typename T>
cudaError_t launch_prepare(const PrepareProblem& p, cudaStream_t stream) {
  constexpr int kWarps = 8, kDecodes = kGemmDecodeRows / GemmDecoder<T, true>::kRows;
  const int decoding =
      p.decode.dense == nullptr ? 0 : static_cast<int>(gemm_ceil(p.decode.plan.prepared * kDecodes, kWarps));
  const auto blocks = static_cast<unsigned>(std::max(1, p.blocks + decoding));
  return launch_kernel(lora_prepare_kernel<T>, {dim3(blocks), 32 * kWarps}, stream, p);
}

}  // namespace peftkern
