// Loads and stores of shared memory by address.
#pragma once

#include <cstdint>

namespace peftkern {

__device__ __forceinline__ void store_shared(uint32_t at, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(value) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(a), "f"(b) : "memory");
}
__device__ __forceinline__ float load_shared(uint32_t at) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(at) : "memory");
  return value;
}
__device__ __forceinline__ uint32_t load_shared_word(uint32_t at) {
  return __float_as_uint(load_shared(at));
}
__device__ __forceinline__ uint2 load_shared_pair(uint32_t at) {
  uint2 value;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(at) : "memory");
  return value;
}

}  // namespace peftkern
