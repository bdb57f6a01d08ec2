// The code books of a CPU call. The words of bitsandbytes' own maps are built once.
#pragma once

#include <cstring>
#include <memory>

#include "adamw8bit/encode_table.h"
#include "common/dynamic_map.h"
#include "common/stable.h"

namespace peftkern {

// A code book and how to encode into it.
struct CodeBook {
  const float* values;
  const EncodeTable* table;
  std::unique_ptr<EncodeTable> own;  // of a checkpoint's other code book, built on every call (0.2 ms)

  // `default_values` are those of the map that nearly every call uses.
  CodeBook(const Tensor& qmap, const char* name, const float* default_values, const EncodeTable& default_table,
           bool positive_stays_positive) {
    STD_TORCH_CHECK(qmap.scalar_type() == ScalarType::Float && qmap.numel() == 256 && qmap.is_contiguous(),
                    "adamw8bit_step_: ", name, " must be a contiguous float32 tensor of 256 values");
    values = data<float>(qmap);
    table = &default_table;
    if (std::memcmp(values, default_values, 256 * sizeof(float)) != 0) {
      own = std::make_unique<EncodeTable>(values, positive_stays_positive);
      table = own.get();
    }
    STD_TORCH_CHECK(table->ascending(), "adamw8bit_step_: ", name, " must ascend; is it a code book?");
  }
};

inline CodeBook first_code_book(const Tensor& qmap) {
  static const EncodeTable table(kDynamicMapSigned, false);
  return CodeBook(qmap, "exp_avg_qmap", kDynamicMapSigned, table, false);
}

// A second moment that is not zero is never stored as zero.
inline CodeBook second_code_book(const Tensor& qmap) {
  static const EncodeTable table(kDynamicMapUnsigned, true);
  return CodeBook(qmap, "exp_avg_sq_qmap", kDynamicMapUnsigned, table, true);
}

}  // namespace peftkern
