// Launches the adapter's kernels: tensor maps, clusters, operands in the workspace. Free of torch.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "bottleneck/adapter.cuh"
#include "bottleneck/gradients.cuh"
#include "bottleneck/hopper.h"
#include "common/kernel_launch.h"
#include "common/workspace.h"
#include "gemm/matrix_mapper.h"
#include "gemm/prepare_launch.cuh"

namespace peftkern {

inline constexpr int kAdapterKnownDevices = 64;

// How many clusters of the kernel the device runs at once, 0 if it cannot; asked for once per device and size.
template <typename T, bool kBackward>
cudaError_t adapter_clusters(int device, int cluster, int* clusters) {
  static std::atomic<int> known[kAdapterKnownDevices][4]{};  // one more than the number
  const int size = cluster == 16 ? 3 : cluster == 8 ? 2 : cluster == 4 ? 1 : 0;
  std::atomic<int>& entry = known[device % kAdapterKnownDevices][size];
  *clusters = device < kAdapterKnownDevices ? entry.load(std::memory_order_relaxed) - 1 : -1;
  if (*clusters >= 0) return cudaSuccess;
  const auto kernel = adapter_kernel<T, kBackward>;
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

struct AdapterOperands {
  const void *x, *skip, *down, *up;
  void* out;
};

// The rows of p.dh_sums in *rows.
template <typename T, bool kBackward>
cudaError_t launch_adapter(const AdapterOperands& o, AdapterProblem p, int device, cudaStream_t stream,
                           int* rows = nullptr) {
  const auto kernel = adapter_kernel<T, kBackward>;
  int clusters = 0;
  cudaError_t error = adapter_clusters<T, kBackward>(device, adapter_cluster(p.features), &clusters);
  if (error != cudaSuccess) return error;
  if (clusters == 0) return cudaErrorInvalidConfiguration;
  AdapterConfig& c = p.config;
  c = adapter_config(p.tokens, p.features, clusters);
  p.at = adapter_layout(c);
  p.box_tokens = std::min(c.tile, p.tokens);
  if (rows != nullptr) *rows = c.groups == 1 ? 2 * c.clusters : c.clusters;
  AdapterMaps maps{};
  MatrixMapper<T> mapper;
  const auto map = [&](CUtensorMap* to, const void* data, int64_t matrix_rows, int64_t columns, int box_rows) {
    if (data != nullptr) mapper(to, data, matrix_rows, columns, 64, box_rows);
  };
  map(&maps.x, o.x, p.tokens, p.features, p.box_tokens);
  map(&maps.skip, o.skip, p.tokens, p.features, p.box_tokens);
  map(&maps.out, o.out, p.tokens, p.features, p.box_tokens);
  map(&maps.down, o.down, p.width, p.features, 64);
  map(&maps.up, o.up, p.features, p.width, 64);
  if (mapper.error() != cudaSuccess) return mapper.error();
  const KernelLaunch launch{dim3(static_cast<unsigned>(c.clusters * c.cluster)), kAdapterThreads, p.at.total,
                            c.cluster};
  return launch_kernel(kernel, launch, stream, maps, p);
}

// The weights in the activations' type: themselves or copies in the workspace.
template <typename T>
cudaError_t take_weights(Workspace& workspace, const void** down, FloatType down_type, const void** up,
                         FloatType up_type, int64_t hidden, int64_t width, cudaStream_t stream) {
  constexpr FloatType kType = std::is_same<T, __half>::value ? FloatType::kFloat16 : FloatType::kBFloat16;
  if (down_type == kType && up_type == kType) return cudaSuccess;
  PrepareProblem prepare(nullptr, 0);
  const auto take = [&](const void** weight, FloatType type, int64_t rows, int64_t columns) {
    if (type == kType) return;
    void* copy = workspace.take(2 * rows * columns);
    prepare.add({*weight, type, copy, rows, columns, 1.0f});
    *weight = copy;
  };
  take(down, down_type, width, hidden);
  take(up, up_type, hidden, width);
  return launch_prepare<T>(prepare, stream);
}

template <typename T>
cudaError_t launch_forward(BottleneckForward f, const AdapterDevice& device, cudaStream_t stream) {
  Workspace workspace(f.workspace);
  const cudaError_t error =
      take_weights<T>(workspace, &f.down, f.down_type, &f.up, f.up_type, f.hidden, f.width, stream);
  if (error != cudaSuccess) return error;
  AdapterProblem p{};
  p.tokens = static_cast<int>(f.M);
  p.features = static_cast<int>(f.hidden);
  p.width = static_cast<int>(f.width);
  p.adds_skip = p.writes = true;
  p.down_bias = f.down_bias;
  p.up_bias = f.up_bias;
  p.down_bias_type = f.down_bias_type;
  p.up_bias_type = f.up_bias_type;
  p.h = f.h;
  p.factor = f.factor;
  p.bias_factor = f.bias_factor;
  p.activation = f.activation;
  p.seed = f.seed;
  p.threshold = f.threshold;
  p.own_skip = f.skip != nullptr;
  const AdapterOperands o{f.x, p.own_skip ? f.skip : f.x, f.down, f.up, f.y};
  return launch_adapter<T, false>(o, p, device.index, stream);
}

template <typename T>
cudaError_t launch_gradients(const GradientMaps& maps, const GradientProblem& p, int device, cudaStream_t stream) {
  const auto kernel = adapter_gradients_kernel<T>;
  constexpr int kShared = sizeof(GradientShared);
  static std::atomic<uint64_t> allowed{0};
  const cudaError_t error = allow_shared_memory(kernel, kShared, device, allowed);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, {dim3(static_cast<unsigned>(p.config.blocks)), kAdapterThreads, kShared}, stream, maps,
                       p);
}

// What the gradients' kernel needs of its workspace, and its launch.
template <typename T>
class GradientLaunch {
  using Shared = GradientShared;

 public:
  GradientLaunch(const BottleneckBackward& b, Workspace& workspace, int multiprocessors) {
    const GradientTiles tiles_of = gradient_tiles(b);
    p_.features = static_cast<int>(b.hidden);
    p_.width = static_cast<int>(b.width);
    p_.gradients[0] = {b.d_up, b.d_up_bias, b.up_type, b.factor, b.bias_factor, tiles_of.up, nullptr, nullptr, nullptr};
    p_.gradients[1] = {b.d_down, nullptr, b.down_type, 1.0f, 1.0f, tiles_of.down, nullptr, nullptr, nullptr};
    p_.dh_bias = b.d_down_bias;
    const int tiles = this->tiles();
    if (b.d_down_bias != nullptr) {
      dh_sums_ = static_cast<float*>(workspace.take(adapter_sums_bytes(multiprocessors)));
      p_.dh_sums = dh_sums_;
      p_.config.blocks = 1;
    }
    if (tiles == 0) return;
    p_.config = bottleneck_gradients(b.M, b.hidden, multiprocessors);
    p_.config.blocks = std::min(p_.config.parts * tiles, multiprocessors);
    arrivals_ = static_cast<int*>(workspace.take(4 * tiles));
    p_.gradients[0].arrivals = arrivals_;
    p_.gradients[1].arrivals = arrivals_ + p_.gradients[0].tiles;
    for (int i = 0; i < 2; ++i) {
      Gradient& g = p_.gradients[i];
      if (g.bias != nullptr) {
        g.columns = static_cast<float*>(workspace.take(int64_t{4} * p_.config.parts * g.tiles * kGradientFeatures));
      }
      if (g.out == nullptr || p_.config.parts == 1) continue;
      g.sums = static_cast<float*>(workspace.take(4 * p_.config.parts * g.tiles * kGradientFeatures * kAdapterWidth));
    }
  }

  bool wanted() const { return p_.config.blocks > 0; }
  float* dh_sums() const { return dh_sums_; }
  int* arrivals() const { return arrivals_; }
  int tiles() const { return p_.gradients[0].tiles + p_.gradients[1].tiles; }

  // dh_rows: of the sums that the adapter's kernel left.
  cudaError_t launch(const BottleneckBackward& b, const void* a, const void* dh, int dh_rows, int device,
                     cudaStream_t stream) {
    p_.dh_rows = dh_rows;
    GradientMaps maps{};
    MatrixMapper<T> mapper;
    const auto map = [&](CUtensorMap* to, const void* data, int64_t columns) {
      if (data != nullptr) mapper(to, data, b.M, columns, 64, Shared::kTokens);
    };
    map(&maps.z[0], b.dy, b.hidden);
    map(&maps.q[0], a, b.width);
    map(&maps.z[1], b.x, b.hidden);
    map(&maps.q[1], dh, b.width);
    return mapper.error() != cudaSuccess ? mapper.error() : launch_gradients<T>(maps, p_, device, stream);
  }

 private:
  GradientProblem p_{};
  float* dh_sums_ = nullptr;
  int* arrivals_ = nullptr;
};

template <typename T>
cudaError_t launch_backward(BottleneckBackward b, const AdapterDevice& device, cudaStream_t stream) {
  Workspace workspace(b.workspace);
  void* dh = workspace.take(2 * b.M * b.width);
  void* a = workspace.take(2 * b.M * b.width);
  GradientLaunch<T> gradients(b, workspace, device.multiprocessors);
  const cudaError_t error =
      take_weights<T>(workspace, &b.down, b.down_type, &b.up, b.up_type, b.hidden, b.width, stream);
  if (error != cudaSuccess) return error;
  AdapterProblem p{};
  p.tokens = static_cast<int>(b.M);
  p.features = static_cast<int>(b.hidden);
  p.width = static_cast<int>(b.width);
  p.adds_skip = b.adds_dy;
  p.writes = b.dx != nullptr;
  p.h = const_cast<void*>(b.h);
  p.dh = dh;
  p.a = a;
  p.factor = b.factor;
  p.activation = b.activation;
  p.seed = b.seed;
  p.threshold = b.threshold;
  p.dh_sums = gradients.dh_sums();
  p.zeros = gradients.arrivals();
  p.zero_count = gradients.tiles();
  const AdapterOperands o{b.dy, b.dy, b.down, b.up, b.dx};
  int rows = 0;
  const cudaError_t launched = launch_adapter<T, true>(o, p, device.index, stream, &rows);
  if (launched != cudaSuccess || !gradients.wanted()) return launched;
  return gradients.launch(b, a, dh, rows, device.index, stream);
}

cudaError_t bottleneck_forward(const BottleneckForward& problem, const AdapterDevice& device, cudaStream_t stream) {
  const cudaError_t error = prepare_thread(device.index);
  if (error != cudaSuccess) return error;
  return problem.type == FloatType::kFloat16 ? launch_forward<__half>(problem, device, stream)
                                             : launch_forward<__nv_bfloat16>(problem, device, stream);
}

cudaError_t bottleneck_backward(const BottleneckBackward& problem, const AdapterDevice& device, cudaStream_t stream) {
  const cudaError_t error = prepare_thread(device.index);
  if (error != cudaSuccess) return error;
  return problem.type == FloatType::kFloat16 ? launch_backward<__half>(problem, device, stream)
                                             : launch_backward<__nv_bfloat16>(problem, device, stream);
}

}  // namespace peftkern
