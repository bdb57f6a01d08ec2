// Builds the tables of code_tables.h on the device, so that the host need not know a checkpoint's code books: one CTA,
// a few microseconds, once for an optimizer's states.
#pragma once

#include "adamw8bit/code_tables.h"

namespace peftkern {

inline constexpr int kTableThreads = 1024;

// How many of 255 ascending points lie below x: its code by definition, 0 for NaN.
__device__ __forceinline__ uint32_t points_below(const float* points, float x) {
  uint32_t count = 0;
#pragma unroll
  for (uint32_t step = 128; step >= 1; step >>= 1) {
    if (points[count + step - 1] < x) count += step;
  }
  return count;
}

// The byte that the bins of one sign hold at a magnitude: it grows with it.
template <bool kNegative>
__device__ __forceinline__ uint32_t byte_at(const float* points, uint32_t bits) {
  const float magnitude = __uint_as_float(bits) * (1.0f / kCodeScale);
  return kNegative ? 255 - points_below(points, -magnitude) : points_below(points, magnitude);
}

// Words of one sign of one book.
template <bool kNegative>
__device__ __forceinline__ void fill_words(const float* points, uint32_t* words, int* crowded) {
  for (uint32_t bin = threadIdx.x; bin < kCodeBins; bin += kTableThreads) {
    const uint32_t low = bin << 16;
    const uint32_t byte = byte_at<kNegative>(points, low), last = byte_at<kNegative>(points, low + 0xffff);
    uint32_t carry_from = 0x10000;
    if (last > byte) {
      // A tie takes the lower code, which is the larger byte of a negative value.
      const float point = points[kNegative ? 254 - byte : byte];
      carry_from = __float_as_uint(fabsf(point) * kCodeScale) + (kNegative ? 0 : 1) - low;
    }
    if (last > byte + 1) *crowded = 1;
    words[bin] = (byte << 16) + 0x10000 - carry_from + (kNegative ? 0x7f000000u : 0u) - low;
  }
}

__global__ void __launch_bounds__(kTableThreads)
    code_tables_kernel(const float* first, const float* second, uint32_t* tables) {
  __shared__ float points[2][256];
  __shared__ int crowded;
  if (threadIdx.x == 0) crowded = 0;
  __syncthreads();
  const int i = threadIdx.x % 256, book = threadIdx.x / 256;
  if (book < 2) {
    const float* values = book == 0 ? first : second;
    tables[(book == 0 ? kDecodeFirst : kDecodeSecond) + i] = __float_as_uint(values[i]);
    float point = __int_as_float(0x7f800000);
    if (i < 255) {
      point = __fmul_rn(__fadd_rn(values[i], values[i + 1]), 0.5f);
      // A second moment above zero takes at least the smallest code above zero.
      if (book == 1 && values[i] <= 0.0f) point = fminf(point, 0.0f);
      const bool has_bin = fabsf(point) >= kSmallestCodePoint || (book == 1 && point == 0.0f);
      const bool signed_second = book == 1 && values[i] < 0.0f;
      if (!has_bin || fabsf(point) > 1.0f || signed_second) crowded = 1;
    }
    points[book][i] = point;
    tables[(book == 0 ? kPointsFirst : kPointsSecond) + i] = __float_as_uint(point);
  }
  __syncthreads();
  fill_words<false>(points[0], tables + kEncodePositive, &crowded);
  fill_words<true>(points[0], tables + kEncodeNegative, &crowded);
  fill_words<false>(points[1], tables + kEncodeSecond, &crowded);
  __syncthreads();
  if (threadIdx.x == 0) tables[kTableFlags] = crowded;
  __threadfence();  // the step reads them before it waits for the kernels before it
}

}  // namespace peftkern
