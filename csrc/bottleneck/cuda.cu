// Bottleneck adapter on CUDA: check -> the kernels for Hopper, or the backend out of pieces -> launch.
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "bottleneck/hopper.h"
#include "common/operands.h"

namespace peftkern {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What the kernels do not take goes to these ops, which Python's backends fill (peftkern/ops/bottleneck/__init__.py).
std::tuple<Tensor, Tensor> forward_pieces(const Tensor& x, const Tensor& down_weight,
                                          const std::optional<Tensor>& down_bias, const Tensor& up_weight,
                                          const std::optional<Tensor>& up_bias, const std::optional<Tensor>& residual,
                                          const std::string& activation, double scaling, double dropout_p,
                                          const std::optional<Tensor>& seed) {
  std::array<StableIValue, 10> stack{from(x),        from(down_weight), from(down_bias), from(up_weight), from(up_bias),
                                     from(residual), from(activation),  from(scaling),   from(dropout_p), from(seed)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("peftkern::bottleneck_fwd_pieces", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

struct Needs {
  bool dx, down_weight, down_bias, up_weight, up_bias;
};

Gradients backward_pieces(const Tensor& dy, const std::optional<Tensor>& x, const Tensor& down_weight,
                          const Tensor& up_weight, const Tensor& h, const std::optional<Tensor>& seed,
                          const std::string& activation, double scaling, double dropout_p, bool residual_is_x,
                          const Needs& needs) {
  std::array<StableIValue, 15> stack{from(dy),
                                     from(x),
                                     from(down_weight),
                                     from(up_weight),
                                     from(h),
                                     from(seed),
                                     from(activation),
                                     from(scaling),
                                     from(dropout_p),
                                     from(residual_is_x),
                                     from(needs.dx),
                                     from(needs.down_weight),
                                     from(needs.down_bias),
                                     from(needs.up_weight),
                                     from(needs.up_bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("peftkern::bottleneck_bwd_pieces", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3]), to<Tensor>(stack[4])};
}

Activation activation_of(const char* op, const std::string& name) {
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  if (name == "relu") return Activation::kRelu;
  STD_TORCH_CHECK(name == "silu", op, ": activation must be gelu, gelu_tanh, relu or silu, got ", name);
  return Activation::kSilu;
}

Tensor workspace_of(const Tensor& x, int64_t bytes) {
  return torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& down_weight, std::optional<Tensor> down_bias,
                                   const Tensor& up_weight, std::optional<Tensor> up_bias,
                                   std::optional<Tensor> residual, std::string activation, double scaling,
                                   double dropout_p, std::optional<Tensor> seed) {
  constexpr const char* op = "bottleneck_fwd";
  STD_TORCH_CHECK(x.dim() == 2 && down_weight.dim() == 2, op, ": x and down_weight must be matrices");
  const int64_t M = x.size(0), hidden = x.size(1), width = down_weight.size(0);
  check_matrix(op, "down_weight", down_weight, width, hidden, x);
  check_matrix(op, "up_weight", up_weight, hidden, width, x);
  check_vector(op, "down_bias", down_bias, width, x);
  check_vector(op, "up_bias", up_bias, hidden, x);
  if (residual.has_value()) check_matrix(op, "residual", *residual, M, hidden, x);
  check_seed(op, seed, x);
  const Activation kind = activation_of(op, activation);
  const Launch launched(x);
  const Device device = current_device();
  const ScalarType type = x.scalar_type();
  bool half = is_half(type);
  bool aligned = is_usable(x);
  const auto take = [&](const std::optional<Tensor>& t) {
    half = half && (!t.has_value() || is_half_or_float(t->scalar_type()));
  };
  take(down_weight);
  take(up_weight);
  take(down_bias);
  take(up_bias);
  aligned = aligned && is_usable(down_weight) && is_usable(up_weight);
  if (residual.has_value()) {
    half = half && residual->scalar_type() == type;
    aligned = aligned && is_usable(*residual);
  }
  if (!adapter_covers({M, hidden, width, half, aligned, device.compute_capability})) {
    return forward_pieces(x, down_weight, down_bias, up_weight, up_bias, residual, activation, scaling, dropout_p,
                          seed);
  }
  const Tensor rows = made_contiguous(x), down = made_contiguous(down_weight), up = made_contiguous(up_weight);
  if (residual.has_value()) residual = made_contiguous(*residual);
  if (down_bias.has_value()) down_bias = made_contiguous(*down_bias);
  if (up_bias.has_value()) up_bias = made_contiguous(*up_bias);
  const Tensor y = torch::stable::new_empty(x, {M, hidden}), h = torch::stable::new_empty(x, {M, width});
  const Tensor workspace = workspace_of(x, bottleneck_forward_bytes(hidden, width));
  BottleneckForward problem{};
  problem.x = rows.const_data_ptr();
  problem.skip = residual.has_value() ? residual->const_data_ptr() : nullptr;
  problem.down = down.const_data_ptr();
  problem.up = up.const_data_ptr();
  problem.down_type = float_type(down);
  problem.up_type = float_type(up);
  if (down_bias.has_value()) {
    problem.down_bias = down_bias->const_data_ptr();
    problem.down_bias_type = float_type(*down_bias);
  }
  if (up_bias.has_value()) {
    problem.up_bias = up_bias->const_data_ptr();
    problem.up_bias_type = float_type(*up_bias);
  }
  problem.y = y.mutable_data_ptr();
  problem.h = h.mutable_data_ptr();
  problem.workspace = workspace.mutable_data_ptr();
  problem.M = M;
  problem.hidden = hidden;
  problem.width = width;
  problem.type = float_type(x);
  problem.factor = static_cast<float>(dropout_factor(scaling, dropout_p, seed));
  problem.bias_factor = static_cast<float>(scaling);
  problem.activation = kind;
  problem.seed = data_or_null<int64_t>(seed);
  problem.threshold = dropped(dropout_p, seed);
  PEFTKERN_CUDA_CHECK(bottleneck_forward(problem, {device.index, device.multiprocessors}, launched.stream()));
  return {y, h};
}

Gradients backward(const Tensor& dy, std::optional<Tensor> x, const Tensor& down_weight, const Tensor& up_weight,
                   const Tensor& h, std::optional<Tensor> seed, std::string activation, double scaling,
                   double dropout_p, bool residual_is_x, bool need_dx, bool need_down_weight, bool need_down_bias,
                   bool need_up_weight, bool need_up_bias) {
  constexpr const char* op = "bottleneck_bwd";
  STD_TORCH_CHECK(dy.dim() == 2 && h.dim() == 2, op, ": dy and h must be matrices");
  STD_TORCH_CHECK(!need_down_weight || x.has_value(), op, ": d_down_weight needs x");
  const int64_t M = dy.size(0), hidden = dy.size(1), width = h.size(1);
  check_matrix(op, "down_weight", down_weight, width, hidden, dy);
  check_matrix(op, "up_weight", up_weight, hidden, width, dy);
  check_matrix(op, "h", h, M, width, dy);
  check_seed(op, seed, dy);
  const Activation kind = activation_of(op, activation);
  const Needs needs{need_dx, need_down_weight, need_down_bias, need_up_weight, need_up_bias};
  if (!need_down_weight) x = std::nullopt;
  const ScalarType type = h.scalar_type();
  const bool adapters = is_half_or_float(down_weight.scalar_type()) && is_half_or_float(up_weight.scalar_type());
  bool half = is_half(type) && is_half_or_float(dy.scalar_type()) && adapters;
  bool aligned = dy.scalar_type() != type || is_usable(dy);
  aligned = aligned && is_usable(h) && is_usable(down_weight) && is_usable(up_weight);
  if (x.has_value()) {
    check_matrix(op, "x", *x, M, hidden, dy);
    half = half && x->scalar_type() == type;
    aligned = aligned && is_usable(*x);
  }
  const Launch launched(dy);
  const Device device = current_device();
  const bool any = need_dx || need_down_weight || need_down_bias || need_up_weight || need_up_bias;
  if (!any || !adapter_covers({M, hidden, width, half, aligned, device.compute_capability})) {
    return backward_pieces(dy, x, down_weight, up_weight, h, seed, activation, scaling, dropout_p, residual_is_x,
                           needs);
  }
  const Tensor rows = made_contiguous(dy.scalar_type() == type ? dy : torch::stable::to(dy, type));
  const Tensor down = made_contiguous(down_weight), up = made_contiguous(up_weight), argument = made_contiguous(h);
  if (x.has_value()) x = made_contiguous(*x);
  using Sizes = std::vector<int64_t>;
  const Tensor dx = torch::stable::new_empty(h, need_dx ? Sizes{M, hidden} : Sizes{0});
  const Tensor d_down = torch::stable::new_empty(down_weight, need_down_weight ? Sizes{width, hidden} : Sizes{0});
  const Tensor d_up = torch::stable::new_empty(up_weight, need_up_weight ? Sizes{hidden, width} : Sizes{0});
  const Tensor d_down_bias = torch::stable::new_empty(h, need_down_bias ? Sizes{width} : Sizes{0}, ScalarType::Float);
  const Tensor d_up_bias = torch::stable::new_empty(h, need_up_bias ? Sizes{hidden} : Sizes{0}, ScalarType::Float);
  BottleneckBackward problem{};
  problem.dy = rows.const_data_ptr();
  problem.x = x.has_value() ? x->const_data_ptr() : nullptr;
  problem.down = down.const_data_ptr();
  problem.up = up.const_data_ptr();
  problem.h = argument.const_data_ptr();
  problem.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  problem.d_down = need_down_weight ? d_down.mutable_data_ptr() : nullptr;
  problem.d_up = need_up_weight ? d_up.mutable_data_ptr() : nullptr;
  problem.d_down_bias = need_down_bias ? mutable_data<float>(d_down_bias) : nullptr;
  problem.d_up_bias = need_up_bias ? mutable_data<float>(d_up_bias) : nullptr;
  problem.M = M;
  problem.hidden = hidden;
  problem.width = width;
  problem.type = float_type(h);
  problem.down_type = float_type(down);
  problem.up_type = float_type(up);
  problem.adds_dy = residual_is_x;
  problem.factor = static_cast<float>(dropout_factor(scaling, dropout_p, seed));
  problem.bias_factor = static_cast<float>(scaling);
  problem.activation = kind;
  problem.seed = data_or_null<int64_t>(seed);
  problem.threshold = dropped(dropout_p, seed);
  const int parts = bottleneck_gradients(M, hidden, device.multiprocessors).parts;
  const Tensor workspace = workspace_of(dy, bottleneck_backward_bytes(M, hidden, width, parts, device.multiprocessors));
  problem.workspace = workspace.mutable_data_ptr();
  PEFTKERN_CUDA_CHECK(bottleneck_backward(problem, {device.index, device.multiprocessors}, launched.stream()));
  return {dx, d_down, d_down_bias, d_up, d_up_bias};
}

PEFTKERN_LIBRARY_IMPL(CUDA, "cuda", m) {
  m.impl("bottleneck_fwd", TORCH_BOX(&forward));
  m.impl("bottleneck_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace peftkern
