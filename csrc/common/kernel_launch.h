// How kernels are launched: shared memory, clusters, and the start beside the end of the kernel before. Free of torch.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace peftkern {

struct KernelLaunch {
  dim3 grid;
  int threads;
  int64_t shared_bytes = 0;  // of a block, dynamic
  int cluster = 0;           // blocks along x; 0: no clusters
  bool early = true;         // from sm_90 on: it may start beside the end of the kernel before, and waits for it itself
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const KernelLaunch& how, cudaStream_t stream,
                          const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t launch{};
  launch.gridDim = how.grid;
  launch.blockDim = dim3(static_cast<unsigned>(how.threads));
  launch.dynamicSmemBytes = static_cast<size_t>(how.shared_bytes);
  launch.stream = stream;
  launch.attrs = attributes;
  if (how.early) {
    cudaLaunchAttribute& attribute = attributes[launch.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.cluster > 0) {
    cudaLaunchAttribute& attribute = attributes[launch.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
  }
  return cudaLaunchKernelEx(&launch, kernel, arguments...);
}

enum class SharedMemory {
  kNeeded,  // of a multiprocessor: what its blocks need
  kWhole,   // all of it, so that the next launch's blocks come to lie beside this one's
};

// Lets a kernel's blocks have up to `bytes` of shared memory on a device. `allowed`, the kernel's own, remembers
// devices.
template <typename... Parameters>
cudaError_t allow_shared_memory(void (*kernel)(Parameters...), int bytes, int device, std::atomic<uint64_t>& allowed,
                                SharedMemory share = SharedMemory::kNeeded) {
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((allowed.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && share == SharedMemory::kWhole) {
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

}  // namespace peftkern
