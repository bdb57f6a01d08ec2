// What every NF4 kernel reads: the stored weight as device pointers, and the decoding of its scales.
#pragma once

#include <cstdint>

#include "common/numbers.cuh"

namespace peftkern {

struct NF4DeviceWeight {
  const uint8_t* packed;
  const float* absmax;          // not nested
  const uint8_t* absmax_codes;  // nested, as are the next three
  const float* nested_absmax;
  const float* nested_code;
  const float* nested_offset;
  int log2_blocksize;
  int log2_nested_blocksize;
};

template <bool kNested>
__device__ __forceinline__ float block_scale(const NF4DeviceWeight& w, int64_t block, float offset) {
  if constexpr (kNested) {
    const float scaled = __fmul_rn(__ldg(w.nested_code + __ldg(w.absmax_codes + block)),
                                   __ldg(w.nested_absmax + (block >> w.log2_nested_blocksize)));
    return __fadd_rn(scaled, offset);
  } else {
    return __ldg(w.absmax + block);
  }
}

}  // namespace peftkern
