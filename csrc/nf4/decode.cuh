// What every NF4 kernel reads: the stored weight as device pointers, and the decoding of its scales.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

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

__device__ __forceinline__ float to_float(float v) {
  return v;
}
__device__ __forceinline__ float to_float(__half v) {
  return __half2float(v);
}
__device__ __forceinline__ float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}

template <typename T>
__device__ __forceinline__ T round_to(float v);
template <>
__device__ __forceinline__ float round_to<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ double round_to<double>(float v) {
  return static_cast<double>(v);
}
template <>
__device__ __forceinline__ __half round_to<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

}  // namespace peftkern
