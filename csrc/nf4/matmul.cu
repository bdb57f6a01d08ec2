// NF4 matmul on CUDA: check -> choice of kernel -> launch.
#include "common/aten.h"
#include "common/cuda.h"
#include "common/stable.h"
#include "gemm/gemm_ranks.h"
#include "lora_matmul/workspace.h"
#include "nf4/convert.h"
#include "nf4/matmul_problem.h"

namespace peftkern {
namespace {

void check_activations(const char* op, const char* name, const Tensor& x, const Tensor& packed) {
  STD_TORCH_CHECK(x.dim() == 2, op, ": ", name, " must be a matrix; flatten its leading dimensions");
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
                      type == ScalarType::Double,
                  op, ": ", name, " must be float32, float16 or bfloat16; cast it first");
  check_device(op, name, x, "packed", packed);
}

// y = x W^T + bias, or y = x W (dx), with a dense W in x's dtype, by the package's own GEMM.
void dense_matmul(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool dx, const Tensor& y,
                  const Device& device, cudaStream_t stream) {
  LoraLayer layer{};
  layer.weight = weight.const_data_ptr();
  layer.N = weight.size(0);
  const auto launch = [&](auto problem) {
    problem.layers[0] = layer;
    problem.count = 1;
    problem.M = x.size(0);
    problem.K = weight.size(1);
    problem.type = x.scalar_type() == ScalarType::Half ? FloatType::kFloat16 : FloatType::kBFloat16;
    const Tensor workspace = lora_workspace(x, problem);
    PEFTKERN_CUDA_CHECK(launch_lora(problem, {device.index, device.multiprocessors}, stream));
  };
  if (dx) {
    layer.dy = x.const_data_ptr();
    LoraBackward problem{};
    problem.dx = y.mutable_data_ptr();
    launch(problem);
  } else {
    layer.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
    layer.y = y.mutable_data_ptr();
    LoraForward problem{};
    problem.x = x.const_data_ptr();
    launch(problem);
  }
}

// y = x W^T + bias, or y = x W (dx), slice after slice of the weight's rows through one reused scratch. Slices of dX
// would have to be summed, each rounded: its scratch holds the whole weight.
void dequantize_matmul(const NF4Pointers& w, const Tensor& x, const std::optional<Tensor>& bias, int64_t N, int64_t K,
                       bool dx, bool own, const Tensor& y, const Device& device, cudaStream_t stream) {
  const int64_t element = x.element_size();
  const int64_t rows = dx ? N : scratch_rows(N, K, element, w.blocksize, w.nested() ? w.nested_blocksize : 1);
  const Tensor scratch = torch::stable::new_empty(x, {rows, K});
  for (int64_t first = 0; first < N; first += rows) {
    const int64_t count = std::min(rows, N - first);
    const Tensor weight = count == rows ? scratch : torch::stable::narrow(const_cast<Tensor&>(scratch), 0, 0, count);
    nf4_dequantize(w.from(first * K), weight, stream);
    if (own && rows == N) return dense_matmul(x, weight, bias, dx, y, device, stream);
    if (dx) return mm_out(y, x, weight);
    Tensor part = y;
    if (count < N) part = torch::stable::narrow(part, 1, first, count);
    std::optional<Tensor> bias_part = bias;
    if (bias.has_value() && count < N) bias_part = torch::stable::narrow(*bias_part, 0, first, count);
    if (bias.has_value()) {
      linear_out(part, x, weight, bias_part);
    } else {  // linear's out variant would go through a temporary
      mm_out(part, x, torch::stable::transpose(weight, 0, 1));
    }
  }
}

void run(const NF4Pointers& w, const Tensor& x, const std::optional<Tensor>& bias, int64_t N, int64_t K, bool dx,
         bool settled, const Tensor& y) {
  const Launch launch(x);
  const Device device = current_device();
  if (x.scalar_type() == ScalarType::Double) {
    return dequantize_matmul(w, x, bias, N, K, dx, false, y, device, launch.stream());
  }
  const NF4Matmul problem = nf4_problem(w, x, bias, N, K, settled, y);
  const MatmulTraits traits = nf4_traits(w, problem, x, dx, device.compute_capability);
  switch (matmul_kernel(traits)) {
    case MatmulKernel::kGemv:
      PEFTKERN_CUDA_CHECK(launch_nf4_gemv(problem, device.multiprocessors, launch.stream()));
      return;
    case MatmulKernel::kSmallM:
      PEFTKERN_CUDA_CHECK(launch_nf4_small_m(problem, nullptr, device.multiprocessors, launch.stream()));
      return;
    case MatmulKernel::kMidM:
      PEFTKERN_CUDA_CHECK(launch_nf4_mid_m(problem, nullptr, device.multiprocessors, launch.stream()));
      return;
    case MatmulKernel::kTile: {
      const TileConfig config = tile_config(problem.M, dx ? K : N, dx ? N : K, device.multiprocessors);
      PEFTKERN_CUDA_CHECK(launch_nf4_tile(problem, dx, config, device.multiprocessors, launch.stream()));
      return;
    }
    case MatmulKernel::kDequantize:
      dequantize_matmul(w, x, bias, N, K, dx, own_gemm(traits, device.multiprocessors), y, device, launch.stream());
  }
}

Tensor matmul(const Tensor& x, const Tensor& packed, const Tensor& absmax, std::optional<Tensor> nested_absmax,
              std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, std::optional<Tensor> bias,
              int64_t blocksize, int64_t nested_blocksize, int64_t out_features, bool settled) {
  constexpr const char* op = "nf4_matmul";
  check_activations(op, "x", x, packed);
  STD_TORCH_CHECK(x.is_contiguous(), op, ": x must be contiguous; call contiguous() on it");
  const int64_t K = x.size(1);
  const NF4Pointers w = nf4_pointers(op, out_features * K, packed, absmax, nested_absmax, nested_code, nested_offset,
                                     blocksize, nested_blocksize);
  bias = kernel_bias(op, bias, out_features, x);
  Tensor y = torch::stable::new_empty(x, {x.size(0), out_features});
  if (y.numel() == 0) return y;
  if (K == 0) return bias.has_value() ? torch::stable::copy_(y, *bias) : torch::stable::zero_(y);
  run(w, x, bias, out_features, K, false, settled, y);
  return y;
}

Tensor matmul_dx(const Tensor& dy, const Tensor& packed, const Tensor& absmax, std::optional<Tensor> nested_absmax,
                 std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
                 int64_t nested_blocksize, int64_t in_features) {
  constexpr const char* op = "nf4_matmul_dx";
  check_activations(op, "dy", dy, packed);
  const int64_t N = dy.size(1);
  const NF4Pointers w = nf4_pointers(op, N * in_features, packed, absmax, nested_absmax, nested_code, nested_offset,
                                     blocksize, nested_blocksize);
  Tensor dx = torch::stable::new_empty(dy, {dy.size(0), in_features});
  if (dx.numel() == 0) return dx;
  if (N == 0) return torch::stable::zero_(dx);
  run(w, dy.is_contiguous() ? dy : torch::stable::contiguous(dy), std::nullopt, N, in_features, true, false, dx);
  return dx;
}

PEFTKERN_LIBRARY_IMPL(CUDA, "cuda", m) {
  m.impl("nf4_matmul", TORCH_BOX(&matmul));
  m.impl("nf4_matmul_dx", TORCH_BOX(&matmul_dx));
}

}  // namespace
}  // namespace peftkern
