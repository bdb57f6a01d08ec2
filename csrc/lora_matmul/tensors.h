// What the LoRA matmuls on CUDA ask of their tensors.
#pragma once

#include "common/cuda.h"
#include "common/float_type.h"
#include "common/stable.h"

namespace peftkern {

inline bool is_half(ScalarType type) {
  return type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline bool is_adapter(ScalarType type) {
  return is_half(type) || type == ScalarType::Float;
}

inline FloatType float_type(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::BFloat16 ? FloatType::kBFloat16
         : type == ScalarType::Half   ? FloatType::kFloat16
                                      : FloatType::kFloat32;
}

inline Tensor made_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// A contiguous copy is aligned whatever it is a copy of.
inline bool is_usable(const Tensor& t) {
  return !t.is_contiguous() || is_aligned(t.const_data_ptr(), 16);
}

inline void check_matrix(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t columns,
                         const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, op, ": ", name, " must be [", rows, ", ",
                  columns, "] to fit the others");
  check_device(op, name, t, "the activations", x);
}

}  // namespace peftkern
