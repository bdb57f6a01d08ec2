// The low-rank term of the NF4 matmuls for few tokens: A and x, or B, to fragments of mma.m16n8k16; of the product with
// B 16 columns of S and B a step.
//
// The order of the contraction inside a product is free as long as both operands agree: lane t of a quad takes columns
// 4 t to 4 t + 3 of a step, of rows g and g + 8 of B and of token g of S.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dependent_launch.cuh"
#include "common/mma.cuh"
#include "common/numbers.cuh"
#include "nf4/low_rank.h"

namespace peftkern {

constexpr int float_bytes(FloatType type) {
  return type == FloatType::kFloat32 ? 4 : 2;
}

// Brings rows [first, last) of B into the L2 cache.
__device__ __forceinline__ void prefetch_rows(const NF4LowRank& l, int64_t first, int64_t last, int thread,
                                              int threads) {
  const int64_t row_bytes = l.rank * float_bytes(l.B_type);
  const char* const end = static_cast<const char*>(l.B) + last * row_bytes;
  const char* from = static_cast<const char*>(l.B) + first * row_bytes + thread * 128;
  for (; from < end; from += threads * 128) prefetch_l2(from);
  if (thread == 0 && first < last) prefetch_l2(end - 1);
}

// 16 neighbouring elements of a row as pairs in T: pair p meets pair p of the other operand, whatever its K.
template <typename T, typename From>
__device__ __forceinline__ void load_pairs(uint32_t (&pairs)[8], const From* from, bool valid) {
  if constexpr (std::is_same<From, float>::value) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float4 v = {};
      if (valid) v = reinterpret_cast<const float4*>(from)[i];
      pairs[2 * i] = pack_pair<T>(v.x, v.y), pairs[2 * i + 1] = pack_pair<T>(v.z, v.w);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint4 v = {};
      if (valid) v = reinterpret_cast<const uint4*>(from)[i];
      pairs[4 * i] = v.x, pairs[4 * i + 1] = v.y, pairs[4 * i + 2] = v.z, pairs[4 * i + 3] = v.w;
    }
    if constexpr (!std::is_same<From, T>::value) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const From* const pair = reinterpret_cast<const From*>(&pairs[i]);
        pairs[i] = pack_pair<T>(to_float(pair[0]), to_float(pair[1]));
      }
    }
  }
}

// Four neighbouring elements of a row of B as they lie in memory; zeros beyond the rank.
struct RawFour {
  uint4 v;

  __device__ __forceinline__ void load(const NF4LowRank& l, int64_t row, int column, bool valid) {
    v = {};
    const int left = valid ? l.rank - column : 0;
    if (left <= 0) return;
    const int64_t at = row * l.rank + column;
    if (l.fours) {
      if (l.B_type == FloatType::kFloat32) {
        v = *reinterpret_cast<const uint4*>(static_cast<const uint32_t*>(l.B) + at);
      } else {
        const uint2 pairs = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(l.B) + at);
        v.x = pairs.x, v.y = pairs.y;
      }
    } else if (l.B_type == FloatType::kFloat32) {
      load_each(static_cast<const uint32_t*>(l.B) + at, left);
    } else {
      load_each(static_cast<const uint16_t*>(l.B) + at, left);
    }
  }

  // As two pairs in T: apart from loading, so that nobody waits for a load before its value is needed.
  template <typename T>
  __device__ __forceinline__ uint2 convert(const NF4LowRank& l) const {
    constexpr FloatType kOwn = std::is_same<T, __half>::value ? FloatType::kFloat16 : FloatType::kBFloat16;
    if (l.B_type == kOwn) {
      return l.fours ? make_uint2(v.x, v.y) : make_uint2(v.x | v.y << 16, v.z | v.w << 16);
    }
    if (l.B_type == FloatType::kFloat32) {
      return {pack_pair<T>(__uint_as_float(v.x), __uint_as_float(v.y)),
              pack_pair<T>(__uint_as_float(v.z), __uint_as_float(v.w))};
    }
    const uint4 each = l.fours ? make_uint4(v.x & 0xffff, v.x >> 16, v.y & 0xffff, v.y >> 16) : v;
    return {pack_pair<T>(other_half<T>(each.x), other_half<T>(each.y)),
            pack_pair<T>(other_half<T>(each.z), other_half<T>(each.w))};
  }

 private:
  template <typename Bits>
  __device__ __forceinline__ void load_each(const Bits* from, int left) {
    v.x = from[0];
    if (left > 1) v.y = from[1];
    if (left > 2) v.z = from[2];
    if (left > 3) v.w = from[3];
  }

  // A number of the 16-bit type that T is not.
  template <typename T>
  static __device__ __forceinline__ float other_half(uint32_t bits) {
    if constexpr (std::is_same<T, __half>::value) return __uint_as_float(bits << 16);
    return to_float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
};

// d += factor * (16 rows of B) x (8 tokens of S), a step: d as mma leaves it, rows g and g + 8, tokens 2 t and 2 t + 1.
template <typename T>
__device__ __forceinline__ void add_step(float (&d)[4], float factor, uint2 top, uint2 bottom, uint2 tokens) {
  float product[4] = {};
  mma<T>(product, top.x, bottom.x, top.y, bottom.y, tokens.x, tokens.y);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = fmaf(factor, product[i], d[i]);
}

}  // namespace peftkern
