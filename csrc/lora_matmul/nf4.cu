// LoRA matmul of few tokens over an NF4 weight on CUDA: check -> the matmul that makes S and adds the low-rank term, or
// the backend out of pieces.
#include <array>
#include <tuple>

#include "common/operands.h"
#include "lora_matmul/covers.h"
#include "lora_matmul/turnstile.h"
#include "nf4/matmul_problem.h"

namespace peftkern {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;
using Optional = std::optional<Tensor>;

std::tuple<Tensor, Tensor> forward_pieces(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                                          const Optional& nested_absmax, const Optional& nested_code,
                                          const Optional& nested_offset, const Tensor& lora_A, const Tensor& lora_B,
                                          const Optional& bias, double scaling, int64_t blocksize,
                                          int64_t nested_blocksize, int64_t out_features, bool settled) {
  std::array<StableIValue, 14> stack{from(x),
                                     from(packed),
                                     from(absmax),
                                     from(nested_absmax),
                                     from(nested_code),
                                     from(nested_offset),
                                     from(lora_A),
                                     from(lora_B),
                                     from(bias),
                                     from(scaling),
                                     from(blocksize),
                                     from(nested_blocksize),
                                     from(out_features),
                                     from(settled)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("peftkern::lora_matmul_fwd_nf4_pieces", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& packed, const Tensor& absmax, Optional nested_absmax,
                                   Optional nested_code, Optional nested_offset, const Tensor& lora_A,
                                   const Tensor& lora_B, Optional bias, double scaling, int64_t blocksize,
                                   int64_t nested_blocksize, int64_t out_features, bool settled) {
  constexpr const char* op = "lora_matmul_fwd_nf4";
  STD_TORCH_CHECK(x.dim() == 2 && lora_A.dim() == 2, op, ": x and lora_A must be matrices");
  const int64_t M = x.size(0), K = x.size(1), N = out_features, rank = lora_A.size(0);
  check_matrix(op, "lora_A", lora_A, rank, K, x);
  check_matrix(op, "lora_B", lora_B, N, rank, x);
  check_device(op, "packed", packed, "x", x);
  const NF4Pointers w =
      nf4_pointers(op, N * K, packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize);
  const auto pieces = [&] {
    return forward_pieces(x, packed, absmax, nested_absmax, nested_code, nested_offset, lora_A, lora_B, bias, scaling,
                          blocksize, nested_blocksize, out_features, settled);
  };
  if (!is_half(x.scalar_type()) || !is_half_or_float(lora_A.scalar_type()) || !is_half_or_float(lora_B.scalar_type()) ||
      !is_usable(x) || !is_usable(lora_A) || M == 0 || N == 0 || K == 0 || rank == 0) {
    return pieces();
  }
  const Launch launch(x);
  const Device device = current_device();
  const Tensor x_rows = made_contiguous(x);
  const Tensor y = torch::stable::new_empty(x, {M, N});
  NF4Matmul problem = nf4_problem(w, x_rows, std::nullopt, N, K, settled, y);
  const MatmulKernel kernel =
      lora_few_tokens_kernel(nf4_traits(w, problem, x_rows, false, device.compute_capability), rank);
  if (kernel == MatmulKernel::kDequantize) return pieces();
  bias = kernel_bias(op, bias, N, x);
  problem.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;

  const Tensor A = made_contiguous(lora_A), B = made_contiguous(lora_B);
  const Tensor S = torch::stable::new_empty(x, {M, rank});
  NF4LowRank low_rank{};
  low_rank.S = S.mutable_data_ptr();
  low_rank.B = B.const_data_ptr();
  low_rank.B_type = float_type(B);
  low_rank.fours = rank % 4 == 0 && is_aligned(low_rank.B, 4 * B.element_size());
  low_rank.rank = static_cast<int>(rank);
  low_rank.padded = low_rank_padded(low_rank.rank);
  low_rank.factor = static_cast<float>(scaling);
  low_rank.A = A.const_data_ptr();
  low_rank.A_type = float_type(A);
  const int64_t values = M * low_rank.padded, part_bytes = 4 * kMaxParts * values;
  const Tensor workspace = torch::stable::new_empty(x, {part_bytes + 2 * values}, ScalarType::Byte);
  low_rank.parts = static_cast<float*>(workspace.mutable_data_ptr());
  low_rank.whole = static_cast<char*>(workspace.mutable_data_ptr()) + part_bytes;
  PEFTKERN_CUDA_CHECK(turnstile_for(launch.stream(), device.index, &low_rank.turnstile));
  std::optional<Tensor> own;
  if (low_rank.turnstile == nullptr) {
    constexpr int kBytes = kTurnstileWords * sizeof(uint32_t);
    own = torch::stable::new_empty(x, {kBytes}, ScalarType::Byte);
    low_rank.turnstile = static_cast<uint32_t*>(own->mutable_data_ptr());
    PEFTKERN_CUDA_CHECK(cudaMemsetAsync(low_rank.turnstile, 0, kBytes, launch.stream()));
  }
  const auto launch_matmul = kernel == MatmulKernel::kMidM ? launch_nf4_mid_m : launch_nf4_small_m;
  PEFTKERN_CUDA_CHECK(launch_matmul(problem, &low_rank, device.multiprocessors, launch.stream()));
  return {y, S};
}

PEFTKERN_LIBRARY_IMPL(CUDA, "cuda", m) {
  m.impl("lora_matmul_fwd_nf4", TORCH_BOX(&forward));
}

}  // namespace
}  // namespace peftkern
