// Launches lora_prepare. Free of torch.
#pragma once

#include <algorithm>

#include "common/kernel_launch.h"
#include "gemm/prepare.cuh"

namespace peftkern {

template <typename T>
cudaError_t launch_prepare(const PrepareProblem& p, cudaStream_t stream) {
  return launch_kernel(lora_prepare_kernel<T>, {dim3(static_cast<unsigned>(std::max(1, p.blocks))), 256}, stream, p);
}

}  // namespace peftkern
