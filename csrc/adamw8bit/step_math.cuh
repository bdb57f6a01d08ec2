// Arithmetic of the step, rounded as the op defines it: square root and division exactly, without the branches that the
// compiler's own take for every element, and nearest codes without compares.
#pragma once

#include <cstdint>

#include "adamw8bit/code_tables.cuh"

namespace peftkern {

inline constexpr float kAdamWMinAbsmax = 0x1p-126f;  // the smallest float whose reciprocal is finite
inline constexpr float kGradientLimit = 0x1p63f;     // from here on squares may overflow: treated as infinite

// Below kSmall, remainders of a root or a quotient lose bits; from kLarge on, reciprocals of scales would, once
// multiplied by kEncodeScale. Between them the short forms below are exact; a warp that holds anything else takes the
// compiler's.
inline constexpr float kSmall = 0x1p-101f, kLarge = 0x1p20f;

// The step's numbers, rounded once from float64. See Hyper in block.h.
struct AdamWScalars {
  float gradient_scale, decay, step_size, inverse_bias2;
  float first_limit;  // first moments below it can be divided in the short form
};

__device__ __forceinline__ float max_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

// For v in [kSmall, 2^126] or 0. One step of Newton's from the approximate reciprocal root.
__device__ __forceinline__ float sqrt_short(float v) {
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(fmaxf(v, kAdamWMinAbsmax)));
  const float root = __fmul_rn(v, r), half = __fmul_rn(r, 0.5f);
  return __fmaf_rn(__fmaf_rn(-root, root, v), half, root);
}

// For d in [2^-100, 2^100] and m / d in the range of normal floats, or m +0.
__device__ __forceinline__ float divide_short(float m, float d) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  r = __fmaf_rn(r, __fmaf_rn(-d, r, 1.0f), r);
  float q = __fmul_rn(m, r);
  q = __fmaf_rn(r, __fmaf_rn(-d, q, m), q);
  return __fmaf_rn(r, __fmaf_rn(-d, q, m), q);
}

// For x in [kSmall, 2^100].
__device__ __forceinline__ float reciprocal_short(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return __fmaf_rn(r, __fmaf_rn(-x, r, 1.0f), r);
}

// Parameters p of a lane's elements after the step.
template <bool kShort>
__device__ __forceinline__ void step_params(float (&p)[8], const float (&m)[8], const float (&v)[8],
                                            const AdamWScalars& s, float eps) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float root = kShort ? sqrt_short(v[i]) : __fsqrt_rn(v[i]);
    const float denominator = __fadd_rn(__fmul_rn(root, s.inverse_bias2), eps);
    const float ratio = kShort ? divide_short(m[i], denominator) : __fdiv_rn(m[i], denominator);
    p[i] = __fsub_rn(__fmul_rn(p[i], s.decay), __fmul_rn(ratio, s.step_size));
  }
}

// Byte 2 of four words.
__device__ __forceinline__ uint32_t gather_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0062), __byte_perm(c, d, 0x0062), 0x5410);
}

// 0xff where a word's highest bit is set.
__device__ __forceinline__ uint32_t gather_signs(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  uint32_t low, high;
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(low) : "r"(a), "r"(b));
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(high) : "r"(c), "r"(d));
  return __byte_perm(low, high, 0x5410);
}

// value / absmax on the scale of the bins. kShort: factor holds kEncodeScale already.
template <bool kShort>
__device__ __forceinline__ uint32_t bin_bits(float value, float factor) {
  if constexpr (kShort) {
    return __float_as_uint(__fmul_rn(value, factor));
  } else {  // NaN and infinity, where nobody looked for them, must not lead outside of the table
    return __float_as_uint(__fmul_rn(fmaxf(fminf(__fmul_rn(value, factor), 1.0f), -1.0f), kEncodeScale));
  }
}

// Codes of a lane's eight first moments.
template <bool kShort>
__device__ __forceinline__ void encode_first(const float (&m)[8], float factor, const uint32_t* tables,
                                             uint32_t (&codes)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t bits[4], sum[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      bits[k] = bin_bits<kShort>(m[4 * h + k], factor);
      const uint32_t index = ((bits[k] >> 16) & 0xfff) | ((bits[k] >> 19) & 0x1000);
      sum[k] = tables[index] + bits[k];
    }
    codes[h] = gather_bytes(sum[0], sum[1], sum[2], sum[3]) ^ gather_signs(bits[0], bits[1], bits[2], bits[3]);
  }
}

// Codes of a lane's eight second moments.
template <bool kShort>
__device__ __forceinline__ void encode_second(const float (&v)[8], float factor, const uint32_t* tables,
                                              uint32_t (&codes)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t sum[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t bits = bin_bits<kShort>(v[4 * h + k], factor);
      sum[k] = tables[kEncodeSecond + (bits >> 16)] + bits;
    }
    codes[h] = gather_bytes(sum[0], sum[1], sum[2], sum[3]);
  }
}

// A second moment above zero so far below its block's largest that bin_bits is zero: the smallest code above zero,
// which is that of the smallest bits above zero.
template <bool kShort>
__device__ __forceinline__ void lift_second(const float (&v)[8], float factor, const uint32_t* tables,
                                            uint32_t (&codes)[2]) {
  const uint32_t smallest = (tables[kEncodeSecond] + 1) >> 16 & 0xff;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (v[i] > 0.0f && bin_bits<kShort>(v[i], factor) == 0) {
      const uint32_t shift = 8 * (i & 3);
      codes[i >> 2] = (codes[i >> 2] & ~(0xffu << shift)) | smallest << shift;
    }
  }
}

// By the definition, for code books whose points are too close for bins.
__device__ __forceinline__ void encode_search(const float (&values)[8], float factor, const float* points,
                                              uint32_t (&codes)[2]) {
  codes[0] = codes[1] = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) codes[i >> 2] |= points_below(points, __fmul_rn(values[i], factor)) << 8 * (i & 3);
}

}  // namespace peftkern
