// From checked tensors to what the kernels take.
#pragma once

#include "nf4/decode.cuh"
#include "nf4/weight.h"

namespace peftkern {

inline int log2_of(int64_t power_of_two) {
  int log = 0;
  while ((int64_t{1} << log) < power_of_two) ++log;
  return log;
}

inline NF4DeviceWeight device_weight(const NF4Pointers& w) {
  return {w.packed,      w.absmax,        w.absmax_codes,       w.nested_absmax,
          w.nested_code, w.nested_offset, log2_of(w.blocksize), w.nested() ? log2_of(w.nested_blocksize) : 0};
}

}  // namespace peftkern
