// Dropout in lora_gemm: which of 16 neighbouring elements of a row are kept, and what is done with that.
//
// A call of the generator is split: what its first three rounds need of the row alone or of the column alone is made
// once for many calls, which leaves 9 of 14 wide products. Numbers are compared two at a time, by subtraction: bit 15
// of a number is not its own and is set, so that nothing is borrowed, and stays set where the element is kept.
#pragma once

#include "common/hopper.cuh"
#include "common/philox.h"
#include "gemm/gemm_shared.cuh"

namespace peftkern {

struct DropoutRow {
  uint32_t high, low;
};

struct DropoutColumn {
  uint32_t x, y, z, u;
};

struct WideProduct {
  uint32_t high, low;
};

__device__ __forceinline__ WideProduct wide_product(uint32_t a, uint32_t b) {
  const uint64_t v = uint64_t{a} * b;
  return {static_cast<uint32_t>(v >> 32), static_cast<uint32_t>(v)};
}

// Calls with counter (column / 16, row, 0, 0): the counter's third word is 0 for fewer than 2^32 rows.
class DropoutCalls {
 public:
  // Reads the seed anew for each use: its round keys would be kept in registers beside the sums.
  __device__ __forceinline__ explicit DropoutCalls(const int64_t* seed) {
    uint32_t k0, k1;
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(k0), "=r"(k1) : "l"(seed));
#pragma unroll
    for (int i = 0; i < 7; ++i) {
      key0_[i] = k0 + i * kPhiloxKeyStep0;
      key1_[i] = k1 + i * kPhiloxKeyStep1;
    }
  }

  __device__ __forceinline__ DropoutRow row(int m) const {
    const WideProduct p = wide_product(static_cast<uint32_t>(m) ^ key0_[0], kPhiloxMultiplier0);
    return {p.high, p.low};
  }

  __device__ __forceinline__ DropoutColumn column(int call) const {
    const WideProduct a = wide_product(static_cast<uint32_t>(call), kPhiloxMultiplier0);
    const WideProduct b = wide_product(a.high ^ key1_[0], kPhiloxMultiplier1);
    const WideProduct c = wide_product(b.high ^ key0_[1], kPhiloxMultiplier0);
    return {a.low ^ key1_[1], b.low ^ key0_[2], c.high ^ key1_[2], c.low ^ key1_[3]};
  }

  // The call's four words.
  __device__ __forceinline__ void words(const DropoutRow& r, const DropoutColumn& c, uint32_t (&w)[4]) const {
    const WideProduct a = wide_product(r.high ^ c.x, kPhiloxMultiplier1);
    const WideProduct b = wide_product(a.high ^ c.y, kPhiloxMultiplier0);
    const WideProduct d = wide_product(r.low ^ c.z, kPhiloxMultiplier1);
    w[0] = d.high ^ a.low ^ key0_[3];
    w[1] = d.low;
    w[2] = b.high ^ c.u;
    w[3] = b.low;
#pragma unroll
    for (int i = 4; i < 7; ++i) {
      const WideProduct e = wide_product(w[0], kPhiloxMultiplier0), f = wide_product(w[2], kPhiloxMultiplier1);
      w[0] = f.high ^ w[1] ^ key0_[i];
      w[1] = f.low;
      w[2] = e.high ^ w[3] ^ key1_[i];
      w[3] = e.low;
    }
  }

  // Pair i of the 16 elements: the sign of a half is set where its element is kept; its other bits are anything.
  static __device__ __forceinline__ void compare(const uint32_t (&w)[4], uint32_t threshold, uint32_t (&pairs)[8]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = dropout_mix(w[j]), high = w[j] | 0x80808080u;
      pairs[2 * j] = __byte_perm(low, high, 0x5140) - threshold;
      pairs[2 * j + 1] = __byte_perm(low, high, 0x7362) - threshold;
    }
  }

  __device__ __forceinline__ void signs(const DropoutRow& r, const DropoutColumn& c, uint32_t threshold,
                                        uint32_t (&pairs)[8]) const {
    uint32_t w[4];
    words(r, c, w);
    compare(w, threshold, pairs);
  }

  // The same with all bits of a half set where its element is kept, none where it is dropped.
  __device__ __forceinline__ void kept(const DropoutRow& r, const DropoutColumn& c, uint32_t threshold,
                                       uint32_t (&pairs)[8]) const {
    signs(r, c, threshold, pairs);
#pragma unroll
    for (int i = 0; i < 8; ++i) asm("prmt.b32 %0, %0, 0, 0xbb99;" : "+r"(pairs[i]));  // the signs of bytes 1 and 3
  }

 private:
  uint32_t key0_[7], key1_[7];
};

// ---- operands in boxes of 64 columns under the 128-byte swizzle
// Where a thread's call begins: two neighbouring chunks of 16 bytes, free of bank conflicts.
__device__ __forceinline__ uint32_t dropout_place(int row, int call) {
  return row * 128 + ((2 * call) ^ row % 8) * 16;
}

__device__ __forceinline__ void load_call(uint32_t place, uint32_t (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[4 * i]), "=r"(v[4 * i + 1]), "=r"(v[4 * i + 2]), "=r"(v[4 * i + 3])
                 : "r"(place ^ (16 * i))
                 : "memory");
  }
}

__device__ __forceinline__ void store_call(uint32_t place, const uint32_t (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(place ^ (16 * i)), "r"(v[4 * i]), "r"(v[4 * i + 1]),
                 "r"(v[4 * i + 2]), "r"(v[4 * i + 3])
                 : "memory");
  }
}

}  // namespace peftkern
