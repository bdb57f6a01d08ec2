// LoRA matmul on the CPU: the base product is ATen's GEMM, the low-rank term is added to it in float32 tiles.
// Extra memory: S [M, r], and tiles of kTileElements; no mask and no dropped copy of x. Deterministic.
#include <tuple>

#include "common/low_rank_cpu.h"

namespace peftkern {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                   std::optional<Tensor> bias, double scaling, double dropout_p,
                                   std::optional<Tensor> seed) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
                  "lora_matmul_fwd: x [M, K] and weight [N, K] must be matrices that share K");
  STD_TORCH_CHECK(lora_A.dim() == 2 && lora_B.dim() == 2 && lora_A.size(1) == x.size(1) &&
                      lora_B.size(0) == weight.size(0) && lora_A.size(0) == lora_B.size(1),
                  "lora_matmul_fwd: lora_A must be [r, K] and lora_B [N, r]");
  STD_TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == weight.size(0)),
                  "lora_matmul_fwd: bias must be [N]");
  const Dropout drop(seed, dropout_p);
  const ScalarType wide = wide_type(x.scalar_type());
  if (bias.has_value()) bias = torch::stable::contiguous(cast(*bias, wide));
  const Tensor y = mm(x, transposed(cast(weight, x.scalar_type())));
  const Tensor S = project(x, transposed(cast(lora_A, wide)), drop);
  add_low_rank(y, S, transposed(cast(lora_B, wide)), scaling * drop.scale, bias, Dropout::none());
  return {y, cast(S, x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, std::optional<Tensor> x, std::optional<Tensor> weight,
                                            const Tensor& lora_A, const Tensor& lora_B, std::optional<Tensor> S,
                                            std::optional<Tensor> seed, double scaling, double dropout_p, bool need_dx,
                                            bool need_dA, bool need_dB) {
  STD_TORCH_CHECK(dy.dim() == 2 && dy.size(1) == lora_B.size(0), "lora_matmul_bwd: dy must be [M, N]");
  STD_TORCH_CHECK(!need_dx || weight.has_value(), "lora_matmul_bwd: dx needs weight");
  STD_TORCH_CHECK(!need_dA || (x.has_value() && x->size(0) == dy.size(0)), "lora_matmul_bwd: dA needs x [M, K]");
  STD_TORCH_CHECK(!need_dB || (S.has_value() && S->size(0) == dy.size(0)), "lora_matmul_bwd: dB needs S [M, r]");
  const Dropout drop(seed, dropout_p);
  const double factor = scaling * drop.scale;
  const ScalarType wide = wide_type(dy.scalar_type());
  Tensor dx = torch::stable::new_empty(dy, {0});
  Tensor dA = torch::stable::new_empty(lora_A, {0});
  Tensor dB = torch::stable::new_empty(lora_B, {0});
  const std::optional<Tensor> S_wide = need_dB ? std::optional(cast(*S, wide)) : std::nullopt;
  const auto [D, dB_wide] = backproject(dy, cast(lora_B, wide), need_dx || need_dA, S_wide);
  if (need_dx) {
    dx = mm(dy, cast(*weight, dy.scalar_type()));
    add_low_rank(dx, D, cast(lora_A, wide), factor, std::nullopt, drop);
  }
  if (need_dA) {
    const Tensor dA_wide = outer(D, *x, drop);
    scale(dA_wide, factor);
    dA = cast(dA_wide, lora_A.scalar_type());
  }
  if (need_dB) {
    scale(dB_wide, factor);
    dB = cast(dB_wide, lora_B.scalar_type());
  }
  return {dx, dA, dB};
}

PEFTKERN_LIBRARY_IMPL(CPU, "cpp", m) {
  m.impl("lora_matmul_fwd", TORCH_BOX(&forward));
  m.impl("lora_matmul_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace peftkern
