// ATen operators that the stable ABI has no wrapper for.
#pragma once

#include <array>

#include "common/stable.h"

namespace peftkern {

// out = a b. The out variant because autocast, which may be on around a backward, leaves it alone.
inline void mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  const Tensor returned = torch::stable::detail::to<Tensor>(stack[0]);
}

// out = x weight^T + bias, out with any row stride; the out variant for the same reason.
inline void linear_out(const Tensor& out, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias), torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  const Tensor returned = torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor mm(const Tensor& a, const Tensor& b) {
  Tensor out = torch::stable::new_empty(a, {a.size(0), b.size(1)});
  mm_out(out, a, b);
  return out;
}

}  // namespace peftkern
