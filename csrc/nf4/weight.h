// The tensors of an NF4 weight as an op receives them, checked against each other for what the kernels rely on.
#pragma once

#include "common/stable.h"

namespace peftkern {

struct NF4Pointers {
  const uint8_t* packed;
  const float* absmax;          // one per block, when not nested
  const uint8_t* absmax_codes;  // one per block, when nested
  const float* nested_absmax;   // one per nested_blocksize blocks
  const float* nested_code;     // 256
  const float* nested_offset;   // 1
  int64_t blocksize;
  int64_t nested_blocksize;
  bool nested() const { return absmax_codes != nullptr; }

  // The weight from element `first` on: a multiple of blocksize, and of blocksize * nested_blocksize when nested.
  NF4Pointers from(int64_t first) const {
    NF4Pointers w = *this;
    const int64_t block = first / blocksize;
    w.packed += first / 2;
    if (nested()) {
      w.absmax_codes += block;
      w.nested_absmax += block / nested_blocksize;
    } else {
      w.absmax += block;
    }
    return w;
  }
};

// The weight's pieces as pointers. Raises, naming the piece, when they do not fit `numel` weights or each other.
inline NF4Pointers nf4_pointers(const char* op, int64_t numel, const Tensor& packed, const Tensor& absmax,
                                const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                                const std::optional<Tensor>& nested_offset, int64_t blocksize,
                                int64_t nested_blocksize) {
  STD_TORCH_CHECK(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0, op,
                  ": blocksize must be a power of two from 32 to 4096, got ", blocksize);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(), op,
                  ": packed must be contiguous uint8");
  STD_TORCH_CHECK(packed.numel() == (numel + 1) / 2, op, ": packed must hold ", (numel + 1) / 2, " bytes for ", numel,
                  " weights, got ", packed.numel());
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
  STD_TORCH_CHECK(absmax.numel() == blocks && absmax.is_contiguous(), op, ": absmax must be contiguous and hold ",
                  blocks, " scales for ", numel, " weights in blocks of ", blocksize, ", got ", absmax.numel());
  check_device(op, "absmax", absmax, "packed", packed);
  const bool nested = nested_absmax.has_value();
  STD_TORCH_CHECK(absmax.scalar_type() == (nested ? ScalarType::Byte : ScalarType::Float), op,
                  ": absmax must be uint8 with nested scales and float32 without");
  NF4Pointers w{data<uint8_t>(packed), nullptr, nullptr, nullptr, nullptr, nullptr, blocksize, nested_blocksize};
  if (!nested) {
    w.absmax = data<float>(absmax);
    return w;
  }
  STD_TORCH_CHECK(nested_code.has_value() && nested_offset.has_value(), op,
                  ": nested_absmax, nested_code and nested_offset come together");
  STD_TORCH_CHECK(nested_blocksize > 0 && (nested_blocksize & (nested_blocksize - 1)) == 0, op,
                  ": nested_blocksize must be a power of two, got ", nested_blocksize);
  check_device(op, "nested_absmax", *nested_absmax, "packed", packed);
  check_device(op, "nested_code", *nested_code, "packed", packed);
  check_device(op, "nested_offset", *nested_offset, "packed", packed);
  STD_TORCH_CHECK(nested_absmax->scalar_type() == ScalarType::Float &&
                      nested_code->scalar_type() == ScalarType::Float &&
                      nested_offset->scalar_type() == ScalarType::Float,
                  op, ": nested scales must be float32");
  STD_TORCH_CHECK(nested_absmax->numel() * nested_blocksize >= blocks && nested_code->numel() == 256 &&
                      nested_offset->numel() == 1 && nested_absmax->is_contiguous() && nested_code->is_contiguous(),
                  op, ": nested scales do not fit ", blocks, " blocks");
  w.absmax_codes = data<uint8_t>(absmax);
  w.nested_absmax = data<float>(*nested_absmax);
  w.nested_code = data<float>(*nested_code);
  w.nested_offset = data<float>(*nested_offset);
  return w;
}

// Raises where `out` is no rows from `row` on and columns from `column` on of a weight, or not contiguous.
inline void check_slice(const char* op, const Tensor& out, int64_t out_features, int64_t in_features, int64_t row,
                        int64_t column) {
  STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous(), op, ": out must be a contiguous matrix");
  STD_TORCH_CHECK(row >= 0 && row <= out_features - out.size(0) && column >= 0 && column <= in_features - out.size(1),
                  op, ": out [", out.size(0), ", ", out.size(1), "] from [", row, ", ", column,
                  "] on must lie in the weight [", out_features, ", ", in_features, "]");
}

}  // namespace peftkern
