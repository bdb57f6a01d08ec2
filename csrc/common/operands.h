// What a CUDA op's host side asks of its operands.
#pragma once

#include "common/cuda.h"
#include "common/float_type.h"
#include "common/philox.h"
#include "common/stable.h"

namespace peftkern {

inline bool is_half(ScalarType type) {
  return type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline bool is_half_or_float(ScalarType type) {
  return is_half(type) || type == ScalarType::Float;
}

// Of a tensor that is_half_or_float.
inline FloatType float_type(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  return type == ScalarType::BFloat16 ? FloatType::kBFloat16
         : type == ScalarType::Half   ? FloatType::kFloat16
                                      : FloatType::kFloat32;
}

inline Tensor made_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// On 16 bytes once made contiguous: a copy is aligned whatever it is a copy of.
inline bool is_usable(const Tensor& t) {
  return !t.is_contiguous() || is_aligned(t.const_data_ptr(), 16);
}

// A matrix of 16-bit elements whose rows are on 16 bytes, each contiguous.
inline bool has_usable_rows(const Tensor& t) {
  return t.stride(1) == 1 && t.stride(0) >= t.size(1) && t.stride(0) % 8 == 0 && is_aligned(t.const_data_ptr(), 16);
}

inline void check_matrix(const char* op, const char* name, const Tensor& t, int64_t rows, int64_t columns,
                         const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, op, ": ", name, " must be [", rows, ", ",
                  columns, "] to fit the others");
  check_device(op, name, t, "the activations", x);
}

inline void check_vector(const char* op, const char* name, const std::optional<Tensor>& t, int64_t size,
                         const Tensor& x) {
  if (!t.has_value()) return;
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == size, op, ": ", name, " must be [", size, "]");
  check_device(op, name, *t, "the activations", x);
}

inline void check_seed(const char* op, const std::optional<Tensor>& seed, const Tensor& x) {
  if (!seed.has_value()) return;
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op, ": seed must be int64 [1]");
  check_device(op, "seed", *seed, "the activations", x);
}

// Dropout's threshold, 0 without dropout.
inline uint32_t dropped(double dropout_p, const std::optional<Tensor>& seed) {
  return seed.has_value() ? dropout_threshold(dropout_p) : 0;
}

// `scaling` with dropout's 1 / (1 - p).
inline double dropout_factor(double scaling, double dropout_p, const std::optional<Tensor>& seed) {
  return seed.has_value() ? scaling * dropout_scale(dropout_p) : scaling;
}

}  // namespace peftkern
