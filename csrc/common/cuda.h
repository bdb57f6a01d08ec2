// Host side of a CUDA launch over PyTorch's stable ABI: the live stream, the device guard, error checks.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>

#include "common/stable.h"

// A CPU-only torch has no such symbol; the library must load there all the same.
#pragma weak aoti_torch_get_current_cuda_stream

#define PEFTKERN_CUDA_CHECK(call)                                                                                \
  do {                                                                                                           \
    const cudaError_t peftkern_error = (call);                                                                   \
    STD_TORCH_CHECK(peftkern_error == cudaSuccess, "CUDA: ", cudaGetErrorString(peftkern_error), " in ", #call); \
  } while (0)

namespace peftkern {

// Makes a tensor's device current for the scope of a launch, and gives its current stream.
class Launch {
 public:
  explicit Launch(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

struct Device {
  int index, multiprocessors, compute_capability;  // 10 * major + minor
};

// The current device's facts, asked for once in a thread.
inline Device current_device() {
  constexpr int kMaxDevices = 64;
  thread_local std::array<Device, kMaxDevices> known{};
  int index = 0;
  PEFTKERN_CUDA_CHECK(cudaGetDevice(&index));
  Device device = index < kMaxDevices ? known[index] : Device{};
  if (device.multiprocessors == 0) {
    int major = 0, minor = 0;
    PEFTKERN_CUDA_CHECK(cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index));
    PEFTKERN_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    PEFTKERN_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    device.index = index;
    device.compute_capability = 10 * major + minor;
    if (index < kMaxDevices) known[index] = device;
  }
  return device;
}

inline bool is_aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace peftkern
