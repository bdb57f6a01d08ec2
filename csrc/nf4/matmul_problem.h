// From checked tensors to an NF4 matmul as its kernels take it.
#pragma once

#include "common/cuda.h"
#include "common/stable.h"
#include "nf4/device_weight.h"
#include "nf4/matmul.h"
#include "nf4/matmul_config.h"

namespace peftkern {

inline ActivationDtype activation_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::BFloat16 ? ActivationDtype::kBFloat16
         : x.scalar_type() == ScalarType::Half   ? ActivationDtype::kFloat16
                                                 : ActivationDtype::kFloat32;
}

// The bias as kernels take it: [out_features] in x's dtype, contiguous.
inline std::optional<Tensor> kernel_bias(const char* op, std::optional<Tensor> bias, int64_t out_features,
                                         const Tensor& x) {
  if (!bias.has_value()) return bias;
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == out_features, op, ": bias must have shape [", out_features,
                  "]; give one value per row of the weight");
  check_device(op, "bias", *bias, "x", x);
  if (bias->scalar_type() != x.scalar_type()) bias = torch::stable::to(*bias, x.scalar_type());
  if (!bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
  return bias;
}

// x and y contiguous; N, K: of the weight.
inline NF4Matmul nf4_problem(const NF4Pointers& w, const Tensor& x, const std::optional<Tensor>& bias, int64_t N,
                             int64_t K, bool settled, const Tensor& y) {
  return {x.const_data_ptr(),
          device_weight(w),
          bias.has_value() ? bias->const_data_ptr() : nullptr,
          y.mutable_data_ptr(),
          x.size(0),
          N,
          K,
          activation_dtype(x),
          settled};
}

inline MatmulTraits nf4_traits(const NF4Pointers& w, const NF4Matmul& problem, const Tensor& x, bool dx,
                               int compute_capability) {
  const bool aligned = is_aligned(problem.x, 16) && is_aligned(problem.y, 16) && is_aligned(w.packed, 16) &&
                       is_aligned(w.absmax_codes, 4) && x.size(1) * x.element_size() % 16 == 0;
  const bool half = problem.dtype != ActivationDtype::kFloat32;
  return {problem.M, problem.N, problem.K, w.blocksize, half, aligned, compute_capability, dx};
}

}  // namespace peftkern
