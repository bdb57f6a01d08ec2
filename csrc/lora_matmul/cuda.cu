// LoRA matmul on CUDA: check -> lora_gemm, or the backend out of pieces -> launch.
#include <array>
#include <tuple>

#include "common/operands.h"
#include "gemm/gemm_ranks.h"
#include "lora_matmul/covers.h"
#include "lora_matmul/workspace.h"

namespace peftkern {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// What lora_gemm does not take goes to these ops, which Python's backends fill (peftkern/ops/lora_matmul/__init__.py).
std::tuple<Tensor, Tensor> forward_pieces(const Tensor& x, const Tensor& weight, const Tensor& lora_A,
                                          const Tensor& lora_B, const std::optional<Tensor>& bias, double scaling,
                                          double dropout_p, const std::optional<Tensor>& seed) {
  std::array<StableIValue, 8> stack{from(x),    from(weight),  from(lora_A),    from(lora_B),
                                    from(bias), from(scaling), from(dropout_p), from(seed)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("peftkern::lora_matmul_fwd_pieces", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor, Tensor> backward_pieces(const Tensor& dy, const std::optional<Tensor>& x,
                                                   const std::optional<Tensor>& weight, const Tensor& lora_A,
                                                   const Tensor& lora_B, const std::optional<Tensor>& S,
                                                   const std::optional<Tensor>& seed, double scaling, double dropout_p,
                                                   bool need_dx, bool need_dA, bool need_dB) {
  std::array<StableIValue, 12> stack{from(dy),        from(x),       from(weight),  from(lora_A),
                                     from(lora_B),    from(S),       from(seed),    from(scaling),
                                     from(dropout_p), from(need_dx), from(need_dA), from(need_dB)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("peftkern::lora_matmul_bwd_pieces", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

std::tuple<Tensor, Tensor> backward_add_pieces(const Tensor& dy, const std::optional<Tensor>& x, const Tensor& weight,
                                               const Tensor& lora_A, const Tensor& lora_B,
                                               const std::optional<Tensor>& S, const std::optional<Tensor>& seed,
                                               double scaling, double dropout_p, bool need_dA, bool need_dB,
                                               const Tensor& dx) {
  std::array<StableIValue, 12> stack{from(dy),        from(x),       from(weight),  from(lora_A),
                                     from(lora_B),    from(S),       from(seed),    from(scaling),
                                     from(dropout_p), from(need_dA), from(need_dB), from(dx)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("peftkern::lora_matmul_bwd_add_pieces", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                                   std::optional<Tensor> bias, double scaling, double dropout_p,
                                   std::optional<Tensor> seed) {
  constexpr const char* op = "lora_matmul_fwd";
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && lora_A.dim() == 2, op,
                  ": x, weight and lora_A must be matrices");
  const int64_t M = x.size(0), K = x.size(1), N = weight.size(0), rank = lora_A.size(0);
  check_matrix(op, "weight", weight, N, K, x);
  check_matrix(op, "lora_A", lora_A, rank, K, x);
  check_matrix(op, "lora_B", lora_B, N, rank, x);
  check_seed(op, seed, x);
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == N, op, ": bias must be [", N, "]");
    check_device(op, "bias", *bias, "the activations", x);
  }
  const Launch launch(x);
  const Device device = current_device();
  const ScalarType type = x.scalar_type();
  const bool half = is_half(type) && weight.scalar_type() == type && is_half_or_float(lora_A.scalar_type()) &&
                    is_half_or_float(lora_B.scalar_type());
  const bool aligned =
      is_usable(x) && weight.is_contiguous() && is_usable(weight) && is_usable(lora_A) && is_usable(lora_B);
  if (!lora_gemm_covers({M, N, K, rank, half, aligned, device.compute_capability, dropped(dropout_p, seed)})) {
    return forward_pieces(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed);
  }
  const Tensor x_rows = made_contiguous(x), A = made_contiguous(lora_A), B = made_contiguous(lora_B);
  if (bias.has_value()) {
    if (bias->scalar_type() != type) bias = torch::stable::to(*bias, type);
    bias = made_contiguous(*bias);
    if (!is_aligned(bias->const_data_ptr(), 16)) bias = torch::stable::clone(*bias);
  }
  const Tensor y = torch::stable::new_empty(x, {M, N}), S = torch::stable::new_empty(x, {M, rank});
  LoraForward problem{};
  problem.x = x_rows.const_data_ptr();
  problem.S = S.mutable_data_ptr();
  problem.count = 1;
  problem.project = true;
  problem.M = M;
  problem.K = K;
  problem.columns = static_cast<int>(rank);
  problem.type = float_type(x);
  problem.A_type = float_type(A);
  problem.B_type = float_type(B);
  problem.seed = data_or_null<int64_t>(seed);
  problem.threshold = dropped(dropout_p, seed);
  LoraLayer& layer = problem.layers[0];
  layer.weight = weight.const_data_ptr();
  layer.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  layer.A = A.const_data_ptr();
  layer.B = B.const_data_ptr();
  layer.N = N;
  layer.rank = static_cast<int>(rank);
  layer.factor = static_cast<float>(dropout_factor(scaling, dropout_p, seed));
  layer.y = y.mutable_data_ptr();
  const Tensor workspace = lora_workspace(x, problem);
  PEFTKERN_CUDA_CHECK(launch_lora(problem, {device.index, device.multiprocessors}, launch.stream()));
  return {y, S};
}

// dx, dA and dB; dx is added to `sum` where that is given.
std::tuple<Tensor, Tensor, Tensor> run_backward(const char* op, const Tensor& dy, std::optional<Tensor> x,
                                                std::optional<Tensor> weight, const Tensor& lora_A,
                                                const Tensor& lora_B, std::optional<Tensor> S,
                                                std::optional<Tensor> seed, double scaling, double dropout_p,
                                                bool need_dx, bool need_dA, bool need_dB,
                                                const std::optional<Tensor>& sum) {
  STD_TORCH_CHECK(dy.dim() == 2 && lora_A.dim() == 2, op, ": dy and lora_A must be matrices");
  STD_TORCH_CHECK(!need_dx || weight.has_value(), op, ": dx needs weight");
  STD_TORCH_CHECK(!need_dA || x.has_value(), op, ": dA needs x");
  STD_TORCH_CHECK(!need_dB || S.has_value(), op, ": dB needs S");
  const int64_t M = dy.size(0), N = dy.size(1), K = lora_A.size(1), rank = lora_A.size(0);
  check_matrix(op, "lora_A", lora_A, rank, K, dy);
  check_matrix(op, "lora_B", lora_B, N, rank, dy);
  check_seed(op, seed, dy);
  // Only what is read counts.
  if (!need_dx) weight = std::nullopt;
  if (!need_dA) x = std::nullopt;
  if (!need_dB) S = std::nullopt;
  const ScalarType type = dy.scalar_type();
  bool half = is_half(type) && is_half_or_float(lora_A.scalar_type()) && is_half_or_float(lora_B.scalar_type());
  bool aligned = is_usable(dy) && is_usable(lora_A) && is_usable(lora_B);
  const auto take = [&](const char* name, const std::optional<Tensor>& t, int64_t rows, int64_t columns) {
    if (!t.has_value()) return;
    check_matrix(op, name, *t, rows, columns, dy);
    half = half && t->scalar_type() == type;
    aligned = aligned && is_usable(*t);
  };
  take("weight", weight, N, K);
  take("x", x, M, K);
  take("S", S, M, rank);
  take("dx", sum, M, K);
  aligned = aligned && (!need_dx || has_usable_rows(*weight)) && (!sum.has_value() || sum->is_contiguous());
  const Launch launch(dy);
  const Device device = current_device();
  const bool any = need_dx || need_dA || need_dB;
  if (!any || !lora_gemm_covers({M, N, K, rank, half, aligned, device.compute_capability, dropped(dropout_p, seed)})) {
    if (!sum.has_value()) {
      return backward_pieces(dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, need_dx, need_dA, need_dB);
    }
    const auto [dA, dB] =
        backward_add_pieces(dy, x, *weight, lora_A, lora_B, S, seed, scaling, dropout_p, need_dA, need_dB, *sum);
    return {*sum, dA, dB};
  }
  const Tensor dy_rows = made_contiguous(dy), A = made_contiguous(lora_A), B = made_contiguous(lora_B);
  if (need_dA) x = made_contiguous(*x);
  if (need_dB) S = made_contiguous(*S);
  using Sizes = std::vector<int64_t>;
  const Tensor dx = sum.has_value() ? *sum : torch::stable::new_empty(dy, need_dx ? Sizes{M, K} : Sizes{0});
  const Tensor dA = torch::stable::new_empty(lora_A, need_dA ? Sizes{rank, K} : Sizes{0});
  const Tensor dB = torch::stable::new_empty(lora_B, need_dB ? Sizes{N, rank} : Sizes{0});
  LoraBackward problem{};
  problem.x = need_dA ? x->const_data_ptr() : nullptr;
  problem.S = need_dB ? S->const_data_ptr() : nullptr;
  problem.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  problem.add_to_dx = sum.has_value();
  problem.count = 1;
  problem.M = M;
  problem.K = K;
  problem.columns = static_cast<int>(rank);
  problem.type = float_type(dy);
  problem.A_type = float_type(A);
  problem.B_type = float_type(B);
  problem.seed = data_or_null<int64_t>(seed);
  problem.threshold = dropped(dropout_p, seed);
  LoraLayer& layer = problem.layers[0];
  if (need_dx) {
    layer.weight = weight->const_data_ptr();
    layer.weight_stride = weight->stride(0);
  }
  layer.A = A.const_data_ptr();
  layer.B = B.const_data_ptr();
  layer.N = N;
  layer.rank = static_cast<int>(rank);
  layer.factor = static_cast<float>(dropout_factor(scaling, dropout_p, seed));
  layer.dy = dy_rows.const_data_ptr();
  layer.dA = need_dA ? dA.mutable_data_ptr() : nullptr;
  layer.dB = need_dB ? dB.mutable_data_ptr() : nullptr;
  const Tensor workspace = lora_workspace(dy, problem);
  PEFTKERN_CUDA_CHECK(launch_lora(problem, {device.index, device.multiprocessors}, launch.stream()));
  return {dx, dA, dB};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, std::optional<Tensor> x, std::optional<Tensor> weight,
                                            const Tensor& lora_A, const Tensor& lora_B, std::optional<Tensor> S,
                                            std::optional<Tensor> seed, double scaling, double dropout_p, bool need_dx,
                                            bool need_dA, bool need_dB) {
  return run_backward("lora_matmul_bwd", dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p, need_dx, need_dA,
                      need_dB, std::nullopt);
}

std::tuple<Tensor, Tensor> backward_add(const Tensor& dy, std::optional<Tensor> x, const Tensor& weight,
                                        const Tensor& lora_A, const Tensor& lora_B, std::optional<Tensor> S,
                                        std::optional<Tensor> seed, double scaling, double dropout_p, bool need_dA,
                                        bool need_dB, const Tensor& dx) {
  const auto grads = run_backward("lora_matmul_bwd_add", dy, x, weight, lora_A, lora_B, S, seed, scaling, dropout_p,
                                  true, need_dA, need_dB, dx);
  return {std::get<1>(grads), std::get<2>(grads)};
}

PEFTKERN_LIBRARY_IMPL(CUDA, "cuda", m) {
  m.impl("lora_matmul_fwd", TORCH_BOX(&forward));
  m.impl("lora_matmul_bwd", TORCH_BOX(&backward));
  m.impl("lora_matmul_bwd_add", TORCH_BOX(&backward_add));
}

}  // namespace
}  // namespace peftkern
