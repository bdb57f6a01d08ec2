// Bottleneck adapter on the CPU: activations are ATen's, products and dropout the tiles that LoRA uses as well.
// Extra memory: matrices [M, b] and tiles of kTileElements. Deterministic.
#include <string>
#include <tuple>

#include "common/low_rank_cpu.h"

namespace peftkern {
namespace {

template <typename... Args>
Tensor call_aten(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

const char* gelu_kind(const std::string& activation) {
  if (activation == "gelu") return "none";
  return activation == "gelu_tanh" ? "tanh" : nullptr;
}

Tensor activate(const Tensor& h, const std::string& activation) {
  if (const char* kind = gelu_kind(activation)) return call_aten("aten::gelu", "", h, std::string(kind));
  if (activation == "silu") return call_aten("aten::silu", "", h);
  STD_TORCH_CHECK(activation == "relu", "bottleneck: activation must be gelu, gelu_tanh, relu or silu, got ",
                  activation);
  return call_aten("aten::relu", "", h);
}

template <typename W>
PEFTKERN_MULTIVERSION void relu_backward(const W* h, int64_t n, W* grad) {
  for (int64_t i = 0; i < n; ++i) grad[i] = h[i] > W{0} ? grad[i] : W{0};
}

// act'(h) * grad, both wide and contiguous; grad may be overwritten.
Tensor activate_backward(const Tensor& grad, const Tensor& h, const std::string& activation) {
  if (const char* kind = gelu_kind(activation)) {
    return call_aten("aten::gelu_backward", "", grad, h, std::string(kind));
  }
  if (activation == "silu") return call_aten("aten::silu_backward", "", grad, h);
  if (h.scalar_type() == ScalarType::Double) {
    relu_backward(data<double>(h), h.numel(), mutable_data<double>(grad));
  } else {
    relu_backward(data<float>(h), h.numel(), mutable_data<float>(grad));
  }
  return grad;
}

// mask(act(h)), wide.
Tensor dropped_activation(const Tensor& h, const std::string& activation, const Dropout& drop) {
  const Tensor a = activate(cast(h, wide_type(h.scalar_type())), activation);
  zero_dropped(drop, 0, a);
  return a;
}

// A contiguous copy of t in `type`.
Tensor copy_as(const Tensor& t, ScalarType type) {
  Tensor copy = torch::stable::new_empty(t, {t.size(0), t.size(1)}, type);
  torch::stable::copy_(copy, t);
  return copy;
}

Tensor column_sums(const Tensor& t) {
  const int64_t dim = 0;
  return torch::stable::sum(t, torch::headeronly::IntHeaderOnlyArrayRef(&dim, 1), false, wide_type(t.scalar_type()));
}

ScalarType promote(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& down_weight, std::optional<Tensor> down_bias,
                                   const Tensor& up_weight, std::optional<Tensor> up_bias,
                                   std::optional<Tensor> residual, std::string activation, double scaling,
                                   double dropout_p, std::optional<Tensor> seed) {
  STD_TORCH_CHECK(x.dim() == 2 && down_weight.dim() == 2 && down_weight.size(1) == x.size(1),
                  "bottleneck_fwd: x [M, H] and down_weight [b, H] must be matrices that share H");
  const int64_t m = x.size(0), hidden = x.size(1), b = down_weight.size(0);
  STD_TORCH_CHECK(up_weight.dim() == 2 && up_weight.size(0) == hidden && up_weight.size(1) == b,
                  "bottleneck_fwd: up_weight must be [H, b]");
  STD_TORCH_CHECK(!down_bias.has_value() || down_bias->numel() == b, "bottleneck_fwd: down_bias must be [b]");
  STD_TORCH_CHECK(!up_bias.has_value() || up_bias->numel() == hidden, "bottleneck_fwd: up_bias must be [H]");
  STD_TORCH_CHECK(
      !residual.has_value() || (residual->dim() == 2 && residual->size(0) == m && residual->size(1) == hidden),
      "bottleneck_fwd: residual must be [M, H]");
  const ScalarType type = x.scalar_type(), wide = wide_type(type);
  const Dropout drop(seed, dropout_p);

  if (down_bias.has_value()) down_bias = cast(*down_bias, type);
  Tensor h = torch::stable::new_empty(x, {m, b});
  // The out variant, as in mm_out: autocast leaves it alone.
  call_aten("aten::linear", "out", x, cast(down_weight, type), down_bias, h);
  if (up_bias.has_value()) {
    up_bias = torch::stable::to(*up_bias, wide, {}, {}, {}, false, /*copy=*/true);
    scale(*up_bias, scaling);
  }
  const Tensor skip = residual.value_or(x);
  const Tensor y = copy_as(skip, promote(type, skip.scalar_type()));
  add_low_rank(y, dropped_activation(h, activation, drop), transposed(cast(up_weight, wide)), scaling * drop.scale,
               up_bias, Dropout::none());
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dy, std::optional<Tensor> x, const Tensor& down_weight, const Tensor& up_weight, const Tensor& h,
    std::optional<Tensor> seed, std::string activation, double scaling, double dropout_p, bool residual_is_x,
    bool need_dx, bool need_down_weight, bool need_down_bias, bool need_up_weight, bool need_up_bias) {
  STD_TORCH_CHECK(dy.dim() == 2 && h.dim() == 2 && h.size(0) == dy.size(0) && dy.size(1) == up_weight.size(0),
                  "bottleneck_bwd: dy must be [M, H] and h [M, b]");
  STD_TORCH_CHECK(!need_down_weight || (x.has_value() && x->size(0) == dy.size(0)),
                  "bottleneck_bwd: d_down_weight needs x [M, H]");
  const ScalarType type = h.scalar_type(), wide = wide_type(type);
  const Dropout drop(seed, dropout_p);
  const double factor = scaling * drop.scale;
  Tensor dx = torch::stable::new_empty(h, {0}), d_down = torch::stable::new_empty(down_weight, {0});
  Tensor d_up = torch::stable::new_empty(up_weight, {0});
  Tensor d_down_bias = torch::stable::new_empty(h, {0}, wide), d_up_bias = torch::stable::new_empty(h, {0}, wide);

  const bool need_dh = need_dx || need_down_weight || need_down_bias;
  const std::optional<Tensor> a =
      need_up_weight ? std::optional(dropped_activation(h, activation, drop)) : std::nullopt;
  const auto [da, d_up_wide] = backproject(dy, cast(up_weight, wide), need_dh, a);
  if (need_up_weight) {
    scale(d_up_wide, factor);
    d_up = cast(d_up_wide, up_weight.scalar_type());
  }
  if (need_up_bias) {
    d_up_bias = column_sums(dy);
    scale(d_up_bias, scaling);
  }
  if (!need_dh) return {dx, d_down, d_down_bias, d_up, d_up_bias};

  zero_dropped(drop, 0, da);
  scale(da, factor);
  const Tensor dh = activate_backward(da, cast(h, wide), activation);
  if (need_dx) {
    dx = residual_is_x ? copy_as(dy, type) : torch::stable::new_zeros(dy, {dy.size(0), dy.size(1)}, type);
    add_low_rank(dx, dh, cast(down_weight, wide), 1.0, std::nullopt, Dropout::none());
  }
  if (need_down_weight) d_down = cast(outer(dh, *x, Dropout::none()), down_weight.scalar_type());
  if (need_down_bias) d_down_bias = column_sums(dh);
  return {dx, d_down, d_down_bias, d_up, d_up_bias};
}

PEFTKERN_LIBRARY_IMPL(CPU, "cpp", m) {
  m.impl("bottleneck_fwd", TORCH_BOX(&forward));
  m.impl("bottleneck_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace peftkern
