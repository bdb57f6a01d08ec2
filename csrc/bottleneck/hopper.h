// A bottleneck's forward and backward as their kernels on Hopper take them. Free of torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "bottleneck/activation.cuh"
#include "bottleneck/config.h"
#include "gemm/gemm_shared.cuh"

namespace peftkern {

struct AdapterDevice {
  int index, multiprocessors;
};

// All row-major and contiguous, 16-byte aligned; hidden and width multiples of 8.
struct BottleneckForward {
  const void *x, *skip, *down, *up, *down_bias, *up_bias;  // skip: null for x itself; biases may be null
  void *y, *h;                                             // [M, hidden], [M, width], of `type`
  void* workspace;                                         // bottleneck_forward_bytes
  int64_t M, hidden, width;
  FloatType type, down_type, up_type, down_bias_type, up_bias_type;
  float factor, bias_factor;  // of the second product, dropout's 1 / (1 - p) included; of up_bias
  Activation activation;
  const int64_t* seed;  // of dropout, on the device; null: none
  uint32_t threshold;
};

// dx, the gradients and x may be null; x is read for d_down.
struct BottleneckBackward {
  const void *dy, *x, *down, *up, *h;
  void *dx, *d_down, *d_up;
  float *d_down_bias, *d_up_bias;
  void* workspace;  // bottleneck_backward_bytes
  int64_t M, hidden, width;
  FloatType type, down_type, up_type;
  bool adds_dy;  // to dx
  float factor, bias_factor;
  Activation activation;
  const int64_t* seed;
  uint32_t threshold;
};

// The weights in the activations' type, if they have another.
constexpr int64_t bottleneck_forward_bytes(int64_t hidden, int64_t width) {
  return 2 * (2 * hidden * width + 256);
}

// Sums of dh: two for each cluster.
constexpr int64_t adapter_sums_bytes(int multiprocessors) {
  return 4 * 2 * int64_t{multiprocessors < kAdapterMaxCluster ? kAdapterMaxCluster : multiprocessors} * kAdapterWidth;
}

// dh and a, the sums of dh and of the gradients' parts and their counters as well.
constexpr int64_t bottleneck_backward_bytes(int64_t M, int64_t hidden, int64_t width, int parts, int multiprocessors) {
  const int64_t tiles = adapter_ceil(hidden, kGradientFeatures), rows = tiles * kGradientFeatures;
  const int64_t sums = parts == 1 ? 0 : 2 * 4 * parts * rows * kAdapterWidth;
  const int64_t columns = 4 * parts * rows + adapter_sums_bytes(multiprocessors);
  return bottleneck_forward_bytes(hidden, width) + 4 * M * width + sums + columns + 8 * tiles + 8 * 256;
}

// Tiles of features of both gradients.
struct GradientTiles {
  int up, down;
};

constexpr GradientTiles gradient_tiles(const BottleneckBackward& b) {
  const int all = static_cast<int>(adapter_ceil(b.hidden, kGradientFeatures));
  const bool up = b.d_up != nullptr || b.d_up_bias != nullptr;
  return {up ? all : 0, b.d_down != nullptr ? all : 0};
}

// Whichever gradients are wanted: the order of their sums does not depend on it.
constexpr GradientConfig bottleneck_gradients(int64_t M, int64_t hidden, int multiprocessors) {
  const int tiles = static_cast<int>(2 * adapter_ceil(hidden, kGradientFeatures));
  return gradient_config(M, tiles, multiprocessors);
}

cudaError_t bottleneck_forward(const BottleneckForward& problem, const AdapterDevice& device, cudaStream_t stream);
cudaError_t bottleneck_backward(const BottleneckBackward& problem, const AdapterDevice& device, cudaStream_t stream);

}  // namespace peftkern
