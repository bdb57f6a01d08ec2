// A warp's tile of 256 elements: what it reads and writes, in registers.
#pragma once

#include <type_traits>

#include "adamw8bit/step_call.h"
#include "common/numbers.cuh"

namespace peftkern {

// How a launch's tensors are laid out in a warp. Lane l holds elements 8 l to 8 l + 7 of a tile; kSplit: 4 l to 4 l + 3
// of each half, so that float32 is read 16 bytes a lane without gaps. kType: of all parameters and gradients alike,
// else every tensor says its own.
template <int kTypeCode, bool kSplitHalves>
struct AdamWFormat {
  static constexpr bool kMixed = kTypeCode < 0;
  static constexpr int kType = kTypeCode;
  static constexpr bool kSplit = kSplitHalves;
  static constexpr int kWords = kTypeCode == kAdamWHalf || kTypeCode == kAdamWBFloat16 ? 4 : 8;

  static __device__ __forceinline__ int position(int lane, int i) {
    return kSplit ? (i >> 2) * 128 + lane * 4 + (i & 3) : lane * 8 + i;
  }
};
using AdamWHalfs = AdamWFormat<kAdamWHalf, false>;
using AdamWBFloat16s = AdamWFormat<kAdamWBFloat16, false>;
using AdamWFloats = AdamWFormat<kAdamWFloat, true>;
using AdamWMixed = AdamWFormat<-1, false>;

inline constexpr unsigned kAllLanes = 0xffffffffu;

// Data that is read once and not again before it has left the caches.
__device__ __forceinline__ uint4 load16(const void* from) {
  return __ldcs(static_cast<const uint4*>(from));
}
__device__ __forceinline__ uint2 load8(const void* from) {
  return __ldcs(static_cast<const uint2*>(from));
}
__device__ __forceinline__ uint32_t load4(const void* from) {
  return __ldcs(static_cast<const uint32_t*>(from));
}
__device__ __forceinline__ void store16(void* to, uint4 v) {
  __stcs(static_cast<uint4*>(to), v);
}
__device__ __forceinline__ void store8(void* to, uint2 v) {
  __stcs(static_cast<uint2*>(to), v);
}
__device__ __forceinline__ void store4(void* to, uint32_t v) {
  __stcs(static_cast<uint32_t*>(to), v);
}

__device__ __forceinline__ void put(uint32_t (&words)[8], int at, uint4 v) {
  words[at] = v.x;
  words[at + 1] = v.y;
  words[at + 2] = v.z;
  words[at + 3] = v.w;
}
__device__ __forceinline__ void put(uint32_t (&words)[4], int at, uint4 v) {
  words[at] = v.x;
  words[at + 1] = v.y;
  words[at + 2] = v.z;
  words[at + 3] = v.w;
}

// Element i of a lane's words of one 16-bit type.
template <int kType, int kWords>
__device__ __forceinline__ float element(const uint32_t (&words)[kWords], int i) {
  if constexpr (kType == kAdamWBFloat16) {
    const uint32_t word = words[i >> 1];
    return __uint_as_float(i & 1 ? word & 0xffff0000u : word << 16);
  } else if constexpr (kType == kAdamWHalf) {
    const uint32_t word = words[i >> 1];
    return __half2float(__ushort_as_half(static_cast<unsigned short>(i & 1 ? word >> 16 : word)));
  } else {
    return __uint_as_float(words[i]);
  }
}

__device__ __forceinline__ float read_float(const void* from, uint32_t i, int type) {
  if (type == kAdamWFloat) return static_cast<const float*>(from)[i];
  const uint16_t bits = static_cast<const uint16_t*>(from)[i];
  return type == kAdamWHalf ? __half2float(__ushort_as_half(bits)) : __uint_as_float(uint32_t{bits} << 16);
}

__device__ __forceinline__ void write_float(void* to, uint32_t i, int type, float v) {
  if (type == kAdamWFloat) {
    static_cast<float*>(to)[i] = v;
  } else if (type == kAdamWHalf) {
    static_cast<__half*>(to)[i] = __float2half_rn(v);
  } else {
    static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16_rn(v);
  }
}

// Chunks [begin, end) of a CTA.
struct ChunkRange {
  uint32_t begin, end;
};

__device__ __forceinline__ ChunkRange chunk_range(uint32_t chunks) {
  return {static_cast<uint32_t>(uint64_t{chunks} * blockIdx.x / gridDim.x),
          static_cast<uint32_t>(uint64_t{chunks} * (blockIdx.x + 1) / gridDim.x)};
}

// The entry that holds a chunk.
__device__ __forceinline__ int find_tensor(const uint32_t* first_chunk, int count, uint32_t chunk) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// base + index * kBytes in one instruction.
template <int kBytes, typename T>
__device__ __forceinline__ char* address(T* base, uint32_t index) {
  return reinterpret_cast<char*>(const_cast<std::remove_const_t<T>*>(base)) + uint64_t{index} * kBytes;
}

// A lane's eight values of a tile that starts with element `offset`: full and aligned tiles 16 bytes at a time, others
// one by one, zero past the end.
template <typename Format>
__device__ __forceinline__ void load_values(uint32_t (&words)[Format::kWords], const void* from, uint32_t offset, int n,
                                            bool whole, int type, int lane) {
  if constexpr (Format::kMixed) {
    if (whole && type == kAdamWFloat) {
      const char* p = address<4>(from, offset + lane * 8);
      put(words, 0, load16(p));
      put(words, 4, load16(p + 16));
    } else if (whole) {
      uint32_t packed[4];
      put(packed, 0, load16(address<2>(from, offset + lane * 8)));
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        words[i] =
            __float_as_uint(type == kAdamWHalf ? element<kAdamWHalf>(packed, i) : element<kAdamWBFloat16>(packed, i));
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int e = lane * 8 + i;
        words[i] = e < n ? __float_as_uint(read_float(from, offset + e, type)) : 0;
      }
    }
  } else if constexpr (Format::kWords == 4) {
    if (whole) {
      put(words, 0, load16(address<2>(from, offset + lane * 8)));
    } else {
      const uint16_t* p = static_cast<const uint16_t*>(from) + offset + lane * 8;
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const int e = lane * 8 + i;
        words[i / 2] = (e < n ? p[i] : 0u) | (e + 1 < n ? uint32_t{p[i + 1]} << 16 : 0u);
      }
    }
  } else {
    if (whole) {
      const char* p = address<4>(from, offset + lane * 4);
      put(words, 0, load16(p));
      put(words, 4, load16(p + 512));
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int e = Format::position(lane, i);
        words[i] = e < n ? static_cast<const uint32_t*>(from)[offset + e] : 0;
      }
    }
  }
}

// Codes past the end are `zero`.
template <typename Format>
__device__ __forceinline__ void load_codes(uint32_t (&codes)[2], const uint8_t* from, uint32_t offset, int n,
                                           bool whole, int lane) {
  if (whole && Format::kSplit) {
    codes[0] = load4(address<1>(from, offset + lane * 4));
    codes[1] = load4(address<1>(from, offset + lane * 4) + 128);
  } else if (whole) {
    const uint2 v = load8(address<1>(from, offset + lane * 8));
    codes[0] = v.x;
    codes[1] = v.y;
  } else {
    codes[0] = codes[1] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int e = Format::position(lane, i);
      if (e < n) codes[i >> 2] |= uint32_t{from[offset + e]} << 8 * (i & 3);
    }
  }
}

template <typename Format>
__device__ __forceinline__ void store_codes(const uint32_t (&codes)[2], uint8_t* to, uint32_t offset, int n, bool whole,
                                            int lane) {
  if (whole && Format::kSplit) {
    store4(address<1>(to, offset + lane * 4), codes[0]);
    store4(address<1>(to, offset + lane * 4) + 128, codes[1]);
  } else if (whole) {
    store8(address<1>(to, offset + lane * 8), make_uint2(codes[0], codes[1]));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int e = Format::position(lane, i);
      if (e < n) to[offset + e] = static_cast<uint8_t>(codes[i >> 2] >> 8 * (i & 3));
    }
  }
}

// The lane's values as words of a 16-bit format, rounded to nearest.
template <typename Format>
__device__ __forceinline__ void pack(const float (&p)[8], uint32_t (&words)[4]) {
  using T = std::conditional_t<Format::kType == kAdamWHalf, __half, __nv_bfloat16>;
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = pack_pair<T>(p[2 * i], p[2 * i + 1]);
}

// The smallest values of a 16-bit format that stand for nothing below `least`, in both halves of a word: rounding at
// most doubles.
template <typename Format>
__device__ __forceinline__ uint32_t magnitude_bound(float least) {
  const uint32_t bits = Format::kType == kAdamWHalf ? __half_as_ushort(__float2half_ru(2.0f * least))
                                                    : __bfloat16_as_ushort(__float2bfloat16_ru(2.0f * least));
  return bits << 16 | bits;
}

// The smaller magnitudes of two pairs, with any sign.
template <typename Format>
__device__ __forceinline__ uint32_t least_of_pairs(uint32_t a, uint32_t b) {
  uint32_t out;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 860
  out = __vminu2(a & 0x7fff7fff, b & 0x7fff7fff);
#else
  if constexpr (Format::kType == kAdamWHalf) {
    asm("min.xorsign.abs.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  } else {
    asm("min.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  }
#endif
  return out;
}

// Whether a magnitude is below a bound of magnitude_bound's; NaN is not. Where both highest bits survive a subtraction,
// neither half is.
template <typename Format>
__device__ __forceinline__ bool any_below(const uint32_t (&words)[4], uint32_t bound) {
  const uint32_t least =
      least_of_pairs<Format>(least_of_pairs<Format>(words[0], words[1]), least_of_pairs<Format>(words[2], words[3]));
  return (~((least | 0x80008000) - bound) & 0x80008000) != 0;
}

__device__ __forceinline__ bool any_below(const float (&p)[8], float bound) {
  float least = fabsf(p[0]);
#pragma unroll
  for (int i = 1; i < 8; ++i) least = fminf(least, fabsf(p[i]));
  return least < bound;
}

// To bfloat16, upwards with a probability of the 16 bits that are dropped: `random` is uniform over 16 bits.
__device__ __forceinline__ uint32_t round_stochastically(float v, uint32_t random) {
  const uint32_t bits = __float_as_uint(v);
  if ((bits & 0x7f800000u) == 0x7f800000u) return __bfloat16_as_ushort(__float2bfloat16_rn(v));
  return (bits + random) >> 16;
}

// The lane's new parameters, rounded to nearest (`packed`, of 16-bit formats), or for bfloat16 stochastically by 128
// random bits.
template <typename Format, bool kStochastic>
__device__ __forceinline__ void store_params(const float (&p)[8], const uint32_t (&packed)[4],
                                             const uint32_t (&random)[4], void* to, uint32_t offset, int n, bool whole,
                                             int type, int lane) {
  if constexpr (Format::kMixed) {
    const bool stochastic = kStochastic && type == kAdamWBFloat16;
    if (whole && type == kAdamWFloat) {
      char* q = address<4>(to, offset + lane * 8);
      store16(q,
              make_uint4(__float_as_uint(p[0]), __float_as_uint(p[1]), __float_as_uint(p[2]), __float_as_uint(p[3])));
      store16(q + 16,
              make_uint4(__float_as_uint(p[4]), __float_as_uint(p[5]), __float_as_uint(p[6]), __float_as_uint(p[7])));
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int e = lane * 8 + i;
      if (e >= n) continue;
      if (stochastic) {
        const uint32_t bits = round_stochastically(p[i], random[i >> 1] >> 16 * (i & 1) & 0xffff);
        static_cast<uint16_t*>(to)[offset + e] = static_cast<uint16_t>(bits);
      } else {
        write_float(to, offset + e, type, p[i]);
      }
    }
  } else if constexpr (Format::kWords == 4) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kStochastic) {
        words[i] = round_stochastically(p[2 * i], random[i] & 0xffff) |
                   round_stochastically(p[2 * i + 1], random[i] >> 16) << 16;
      } else {
        words[i] = packed[i];
      }
    }
    if (whole) {
      store16(address<2>(to, offset + lane * 8), make_uint4(words[0], words[1], words[2], words[3]));
    } else {
      uint16_t* q = static_cast<uint16_t*>(to) + offset;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int e = lane * 8 + i;
        if (e < n) q[e] = static_cast<uint16_t>(words[i >> 1] >> 16 * (i & 1));
      }
    }
  } else {
    if (whole) {
      char* q = address<4>(to, offset + lane * 4);
      store16(q,
              make_uint4(__float_as_uint(p[0]), __float_as_uint(p[1]), __float_as_uint(p[2]), __float_as_uint(p[3])));
      store16(q + 512,
              make_uint4(__float_as_uint(p[4]), __float_as_uint(p[5]), __float_as_uint(p[6]), __float_as_uint(p[7])));
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int e = Format::position(lane, i);
        if (e < n) static_cast<float*>(to)[offset + e] = p[i];
      }
    }
  }
}

}  // namespace peftkern
