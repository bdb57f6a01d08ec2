// Launches the resident kernel: its cut, tensor maps, clusters. Free of torch.
#pragma once

#include <algorithm>
#include <atomic>

#include "bottleneck/hopper.h"
#include "bottleneck/resident.cuh"
#include "common/tensor_map.h"
#include "gemm/gemm_launch.cuh"

namespace peftkern {

inline constexpr int kResidentKnownDevices = 64;

// How many clusters of the kernel the device runs at once, 0 if it cannot; asked for once per device and size.
template <typename T, bool kBackward>
cudaError_t resident_clusters(int device, int cluster, int* clusters) {
  static std::atomic<int> known[kResidentKnownDevices][5]{};  // one more than the number
  const int size = cluster == 16 ? 4 : cluster == 8 ? 3 : cluster == 4 ? 2 : cluster - 1;
  std::atomic<int>& entry = known[device % kResidentKnownDevices][size];
  *clusters = device < kResidentKnownDevices ? entry.load(std::memory_order_relaxed) - 1 : -1;
  if (*clusters >= 0) return cudaSuccess;
  const auto kernel = adapter_resident_kernel<T, kBackward>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kAdapterShared);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(cluster));
  launch.blockDim = dim3(kAdapterThreads);
  launch.dynamicSmemBytes = kAdapterShared;
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  error = cudaOccupancyMaxActiveClusters(clusters, kernel, &launch);
  if (error != cudaSuccess) return error;
  entry.store(*clusters + 1, std::memory_order_relaxed);
  return cudaSuccess;
}

constexpr int resident_cluster(int64_t hidden) {
  int cluster = 1;
  while (cluster * kResidentFeatures < hidden) cluster *= 2;
  return cluster;
}

inline ResidentConfig resident_config(int64_t M, int64_t hidden, int clusters, const AdapterOptions& options) {
  ResidentConfig c{};
  c.cluster = resident_cluster(hidden);
  c.chunks = static_cast<int>(adapter_ceil(hidden, kAdapterChunk * c.cluster));
  c.stages = options.stages > 0 ? options.stages : 2;
  c.slots = options.x_slots > 0 ? options.x_slots : 16;
  while (resident_layout(c).total > kAdapterShared) --c.slots;
  const int64_t rounds = adapter_ceil(M, int64_t{kResidentTokens} * clusters);
  c.tile = options.tile > 0 ? options.tile : static_cast<int>(adapter_ceil(M, rounds * clusters));
  c.tiles = static_cast<int>(adapter_ceil(M, c.tile));
  c.clusters = adapter_min(c.tiles, clusters);
  return c;
}

struct ResidentOperands {
  const void *x, *skip, *down, *up;
  void* out;
};

// The rows of task.dh_sums in *rows.
template <typename T, bool kBackward>
cudaError_t launch_resident(const ResidentOperands& o, const AdapterProblem& task, int device, cudaStream_t stream,
                            const AdapterOptions& options, int* rows = nullptr) {
  const auto kernel = adapter_resident_kernel<T, kBackward>;
  ResidentProblem p{};
  static_cast<AdapterProblem&>(p) = task;
  int clusters = 0;
  cudaError_t error = resident_clusters<T, kBackward>(device, resident_cluster(p.features), &clusters);
  if (error != cudaSuccess) return error;
  if (clusters == 0) return cudaErrorInvalidConfiguration;
  ResidentConfig& c = p.config;
  c = resident_config(p.tokens, p.features, clusters, options);
  p.at = resident_layout(c);
  p.box_tokens = std::min(c.tile, p.tokens);
  if (rows != nullptr) *rows = resident_groups(c.cluster) == 1 ? 2 * c.clusters : c.clusters;
  AdapterMaps maps{};
  const auto map = [&](CUtensorMap* to, const void* data, int64_t matrix_rows, int64_t columns, int box_rows) {
    if (error == cudaSuccess && data != nullptr) error = gemm_map<T>(to, data, matrix_rows, columns, 64, box_rows);
  };
  map(&maps.x, o.x, p.tokens, p.features, p.box_tokens);
  map(&maps.skip, o.skip, p.tokens, p.features, p.box_tokens);
  map(&maps.out, o.out, p.tokens, p.features, p.box_tokens);
  map(&maps.down, o.down, p.width, p.features, 64);
  map(&maps.up, o.up, p.features, p.width, 64);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(c.cluster), 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(c.clusters * c.cluster));
  launch.blockDim = dim3(kAdapterThreads);
  launch.dynamicSmemBytes = static_cast<size_t>(p.at.total);
  launch.stream = stream;
  launch.attrs = attributes;
  launch.numAttrs = 2;
  return cudaLaunchKernelEx(&launch, kernel, maps, p);
}

}  // namespace peftkern
