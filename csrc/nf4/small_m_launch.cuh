// Launch of one configuration of the small-M NF4 matmul.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "common/kernel_launch.h"
#include "nf4/matmul.h"
#include "nf4/small_m.cuh"

namespace peftkern {

struct SmallMDevice {
  int index;
  int major;           // of its compute capability
  int64_t smem_limit;  // bytes of shared memory a CTA may ask for
};

// The thread's current device; asked for once.
inline cudaError_t small_m_device(SmallMDevice& device) {
  thread_local SmallMDevice known{-1, 0, 0};
  int index = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess && index != known.index) {
    error = cudaDeviceGetAttribute(&known.major, cudaDevAttrComputeCapabilityMajor, index);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    known.smem_limit = limit - kSharedStart;
    known.index = error == cudaSuccess ? index : -1;
  }
  device = known;
  return error;
}

template <typename T, bool kNested, class Arguments, int kTokenTiles, int kQuads, int kWarps, int kWarpRows,
          int kStages, int kMinCtas>
cudaError_t launch_small_m_kernel(const NF4Matmul& p, const NF4LowRank* low_rank, const SmallMConfig& config,
                                  const SmallMDevice& device, cudaStream_t stream) {
  const int64_t scales = ((p.N * p.K - 1) >> p.weight.log2_blocksize) + 1;
  // Blocks of 64 are counted in 32 bits, as are the bytes of a row.
  if (p.N * (p.K / 64) >= int64_t{1} << 32 || p.K >= int64_t{1} << 31 || p.N >= int64_t{1} << 31) {
    return cudaErrorInvalidValue;
  }
  Arguments a{};
  a.x = p.x;
  a.weight = p.weight;
  a.bias = p.bias;
  a.y = p.y;
  a.M = p.M, a.N = p.N, a.K = p.K;
  a.scales = static_cast<uint32_t>(scales);
  a.passes = config.passes;
  a.settled = p.settled;
  if constexpr (std::is_same<Arguments, SmallMLowRankArguments>::value) {
    a.low_rank = *low_rank;
    a.parts = config.parts, a.makers = config.makers;
    a.parked_bytes = static_cast<int>(config.parked_bytes);
  }
  a.group_rows = static_cast<int>(p.N / config.ctas);
  a.longer_groups = static_cast<int>(p.N % config.ctas);
  a.whole_words = p.weight.log2_blocksize == 6 && p.K % 256 == 0 && p.weight.log2_nested_blocksize >= 2;

  const auto kernel =
      nf4_small_m_kernel<T, kNested, Arguments, kTokenTiles, kQuads, kWarps, kWarpRows, kStages, kMinCtas>;
  // Where shared memory starts below kSharedStart, the kernel leaves that much of it unused.
  const int64_t smem = config.smem + (device.major == 9 ? 0 : kSharedStart);
  static std::atomic<uint64_t> allowed{0};
  const int limit = static_cast<int>(device.smem_limit + kSharedStart);
  const cudaError_t error = allow_shared_memory(kernel, limit, device.index, allowed, SharedMemory::kWhole);
  if (error != cudaSuccess) return error;
  KernelLaunch launch{dim3(static_cast<unsigned>(config.makers + config.ctas)), kWarps * 32, smem};
  launch.early = device.major >= 9;
  return launch_kernel(kernel, launch, stream, a);
}

}  // namespace peftkern
