// The look at the gradients before anything is written: the largest magnitude, and with clipping the sum of squares.
//
// The sum is defined, so that every backend has the same bits. Squares of unscaled gradients are added in float32
// within a piece of 2048 elements of one tensor: 256 sums of every 256th element in order, then neighbours in pairs,
// eight times. Sums of pieces are added in float64: 512 sums of every 512th piece of the list in order, then neighbours
// in pairs, nine times. A tensor has four pieces for every 8192 elements begun; those past its end are zero.
#pragma once

#include "adamw8bit/step_math.cuh"
#include "adamw8bit/tile.cuh"

namespace peftkern {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kNormSums = 512;

// The larger magnitude of packed pairs, NaN above all.
__device__ __forceinline__ uint32_t max_pair(uint32_t largest, uint32_t words, int type) {
  if (type == kAdamWHalf) {
    const __half2 v =
        __hmax2_nan(*reinterpret_cast<const __half2*>(&largest), __habs2(*reinterpret_cast<const __half2*>(&words)));
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  const __nv_bfloat162 v = __hmax2_nan(*reinterpret_cast<const __nv_bfloat162*>(&largest),
                                       __habs2(*reinterpret_cast<const __nv_bfloat162*>(&words)));
  return *reinterpret_cast<const uint32_t*>(&v);
}

__device__ __forceinline__ void add_square(float& sum, float gradient, float scale) {
  const float g = __fmul_rn(gradient, scale);
  sum = __fadd_rn(sum, __fmul_rn(g, g));
}

// Neighbours in pairs over 256 sums, which lie in the lanes as kSplit says; every lane gets the total.
template <bool kSplit>
__device__ __forceinline__ float fold(const float (&sum)[8]) {
  const float low = __fadd_rn(__fadd_rn(sum[0], sum[1]), __fadd_rn(sum[2], sum[3]));
  const float high = __fadd_rn(__fadd_rn(sum[4], sum[5]), __fadd_rn(sum[6], sum[7]));
  float a = kSplit ? low : __fadd_rn(low, high), b = high;
#pragma unroll
  for (int lane = 1; lane < 32; lane *= 2) {
    a = __fadd_rn(a, __shfl_xor_sync(kAllLanes, a, lane));
    if (kSplit) b = __fadd_rn(b, __shfl_xor_sync(kAllLanes, b, lane));
  }
  return kSplit ? __fadd_rn(a, b) : a;
}

// What a warp has seen: magnitudes of packed pairs and of floats.
struct Seen {
  uint32_t pair = 0;
  float single = 0.0f;
};

// A whole, aligned piece of 16-bit gradients. `keep`: where in shared memory to leave it, or null.
template <bool kNorm>
__device__ __forceinline__ float look_pairs(const char* from, char* keep, int type, float scale, int lane,
                                            uint64_t policy, Seen& seen) {
  float sum[8] = {};
#pragma unroll
  for (int tile = 0; tile < kAdamWPiece / kAdamWTile; ++tile) {
    const int at = (tile * 32 + lane) * 16;
    uint32_t words[4];
    put(words, 0, load16(from + at, policy));
    if (keep != nullptr) *reinterpret_cast<uint4*>(keep + at) = make_uint4(words[0], words[1], words[2], words[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) seen.pair = max_pair(seen.pair, words[i], type);
    if constexpr (kNorm) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        add_square(sum[i], type == kAdamWHalf ? element<kAdamWHalf>(words, i) : element<kAdamWBFloat16>(words, i),
                   scale);
      }
    }
  }
  return kNorm ? fold<false>(sum) : 0.0f;
}

template <bool kNorm>
__device__ __forceinline__ float look_floats(const char* from, char* keep, float scale, int lane, uint64_t policy,
                                             Seen& seen) {
  float sum[8] = {};
#pragma unroll 4
  for (int tile = 0; tile < kAdamWPiece / kAdamWTile; ++tile) {
    const int at = (tile * 64 + lane) * 16;
    uint32_t words[8];
    put(words, 0, load16(from + at, policy));
    put(words, 4, load16(from + at + 512, policy));
    if (keep != nullptr) {
      *reinterpret_cast<uint4*>(keep + at) = make_uint4(words[0], words[1], words[2], words[3]);
      *reinterpret_cast<uint4*>(keep + at + 512) = make_uint4(words[4], words[5], words[6], words[7]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float g = __uint_as_float(words[i]);
      seen.single = max_nan(seen.single, fabsf(g));
      if constexpr (kNorm) add_square(sum[i], g, scale);
    }
  }
  return kNorm ? fold<true>(sum) : 0.0f;
}

// Any piece, element by element.
template <bool kNorm>
__device__ __forceinline__ float look_ragged(const void* from, int n, int type, float scale, int lane, Seen& seen) {
  float sum[8] = {};
  for (int tile = 0; tile < n; tile += kAdamWTile) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int e = tile + lane * 8 + i;
      if (e >= n) continue;
      const float g = read_float(from, e, type);
      seen.single = max_nan(seen.single, fabsf(g));
      if constexpr (kNorm) add_square(sum[i], g, scale);
    }
  }
  return kNorm ? fold<false>(sum) : 0.0f;
}

// The bits of the largest magnitude that a warp has seen, NaN above infinity.
__device__ __forceinline__ uint32_t largest_bits(const Seen& seen, int pair_type) {
  float low, high;
  if (pair_type == kAdamWHalf) {
    const __half2 v = *reinterpret_cast<const __half2*>(&seen.pair);
    low = __low2float(v);
    high = __high2float(v);
  } else {
    low = __uint_as_float(seen.pair << 16);
    high = __uint_as_float(seen.pair & 0xffff0000u);
  }
  const float largest = max_nan(max_nan(low, high), seen.single);
  return __reduce_max_sync(kAllLanes, __float_as_uint(largest) & 0x7fffffffu);
}

}  // namespace peftkern
