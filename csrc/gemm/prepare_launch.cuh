// Launches lora_prepare. Free of torch.
#pragma once

#include <algorithm>

#include "gemm/prepare.cuh"

namespace peftkern {

template <typename T>
cudaError_t launch_prepare(const PrepareProblem& p, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(std::max(1, p.blocks)));
  launch.blockDim = dim3(256);
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  return cudaLaunchKernelEx(&launch, lora_prepare_kernel<T>, p);
}

}  // namespace peftkern
