// Arithmetic of the step, rounded as the op defines it: square root and division exactly, without the branches that the
// compiler's own take for every element, and nearest codes without compares.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adamw8bit/code_tables.cuh"

namespace peftkern {

inline constexpr float kAdamWMinAbsmax = 0x1p-126f;  // the smallest float whose reciprocal is finite
inline constexpr float kGradientLimit = 0x1p63f;     // from here on squares may overflow: treated as infinite

// The short forms below hold for moments below kLarge, for scales from kSmall on, and for first moments that are zero
// or at least kSmall: of smaller ones the remainder of a division loses bits.
inline constexpr float kSmall = 0x1p-101f, kLarge = 0x1p20f;

// The step's numbers, rounded once from float64. See Hyper in block.h.
struct alignas(16) AdamWScalars {
  float root_factor;  // 2^-32 / sqrt(1 - beta2^step)
  float step_size, decay;
  float limit;          // moments from here on need the long forms: kLarge, or 0 where all do
  float encode_limit;   // the same for encoding, 0 where a code book's points are too close for bins
  float least_param;    // a first moment below kSmall leaves new parameters from here on as they would be without it
  uint32_t least_pair;  // the same for rounded ones, in both halves of a word: see magnitude_bound
  float gradient_scale;
};

__device__ __forceinline__ float max_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

// The largest of second moments, 0 at least; NaN where one is. Floats from zero on, and NaN as arithmetic makes it,
// are in the order of their bits, of which Hopper compares three at a time.
__device__ __forceinline__ float largest_above_zero(const float (&v)[8]) {
  int out = 0;
#pragma unroll
  for (int i = 0; i < 8; i += 2) out = __vimax3_s32(out, __float_as_int(v[i]), __float_as_int(v[i + 1]));
  return __int_as_float(out);
}

// sqrt(v) * 2^32 for v below kLarge: 2^64 lifts every float above zero to where remainders are exact. 2^-120 takes the
// place of zero, and is lost in any other v. One step of Newton's from the approximate reciprocal root.
__device__ __forceinline__ float root_short(float v) {
  v = __fmaf_rn(v, 0x1p64f, 0x1p-120f);
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  const float root = __fmul_rn(v, r), half = __fmul_rn(r, 0.5f);
  return __fmaf_rn(__fmaf_rn(-root, root, v), half, root);
}

// For d in [2^-50, 2^25]. The reciprocal r is correctly rounded, so m * r is within 1.5 units in the last place of the
// quotient. Where it is within one, its remainder is exact and one correction gives the nearest float (Markstein 1990).
// Where it is further off, the remainder may have been rounded, but of the midpoints only that at 1.5 units is near
// then, and no quotient comes so close to it.
__device__ __forceinline__ float divide_short(float m, float d) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  r = __fmaf_rn(r, __fmaf_rn(-d, r, 1.0f), r);
  float q = __fmul_rn(m, r);
  return __fmaf_rn(r, __fmaf_rn(-d, q, m), q);
}

// For x in [kSmall, 2^100].
__device__ __forceinline__ float reciprocal_short(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return __fmaf_rn(r, __fmaf_rn(-x, r, 1.0f), r);
}

// A parameter after the step.
template <bool kShort>
__device__ __forceinline__ float step_param(float p, float m, float v, const AdamWScalars& s, float eps) {
  const float root =
      kShort ? __fmul_rn(root_short(v), s.root_factor) : __fmul_rn(__fsqrt_rn(v), __fmul_rn(s.root_factor, 0x1p32f));
  const float denominator = __fadd_rn(root, eps);
  const float ratio = kShort ? divide_short(m, denominator) : __fdiv_rn(m, denominator);
  return __fsub_rn(__fmul_rn(p, s.decay), __fmul_rn(ratio, s.step_size));
}

// A word of shared memory, by its address there. Only of tables, which do not change.
template <uint32_t kBase>
__device__ __forceinline__ uint32_t shared_word(uint32_t address) {
  uint32_t word;
  asm("ld.shared.u32 %0, [%1 + %2];" : "=r"(word) : "r"(address), "n"(kBase));
  return word;
}

// One of the step's numbers, and those that the update takes, by their address in shared memory: read anew for every
// tile, since registers are short.
template <uint32_t kAddress>
__device__ __forceinline__ float shared_float() {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(kAddress));
  return value;
}
template <uint32_t kAddress>
__device__ __forceinline__ AdamWScalars update_scalars() {
  AdamWScalars s;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(s.root_factor), "=f"(s.step_size), "=f"(s.decay), "=f"(s.limit)
               : "r"(kAddress));
  return s;
}

// Byte 2 of four words.
__device__ __forceinline__ uint32_t gather_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return __byte_perm(__byte_perm(a, b, 0x0062), __byte_perm(c, d, 0x0062), 0x5410);
}

// Byte 2 of four words, flipped by byte 3.
__device__ __forceinline__ uint32_t gather_flipped(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t low = __byte_perm(a, b, 0x7632), high = __byte_perm(c, d, 0x7632);
  return __byte_perm(low, high, 0x6420) ^ __byte_perm(low, high, 0x7531);
}

__device__ __forceinline__ bool has_zero_byte(uint32_t word) {
  return ((word - 0x01010101u) & ~word & 0x80808080u) != 0;
}

// value / absmax on the scale of the bins. kShort: factor holds kCodeScale already.
template <bool kShort>
__device__ __forceinline__ uint32_t bin_bits(float value, float factor) {
  if constexpr (kShort) {
    return __float_as_uint(__fmul_rn(value, factor));
  } else {  // NaN and infinity, where nobody looked for them, must not lead outside of the table
    return __float_as_uint(__fmul_rn(fmaxf(fminf(__fmul_rn(value, factor), 1.0f), -1.0f), kCodeScale));
  }
}

// Where the word of a first moment lies, from kPositive on.
template <typename Layout>
__device__ __forceinline__ uint32_t first_offset(uint32_t bits) {
  constexpr uint32_t kFromPositive = Layout::kNegative - Layout::kPositive;
  if constexpr (Layout::kStaged) {
    static_assert(kFromPositive == 0x20000, "the sign's bit");
    return bits >> 14 & 0x23ffc;
  } else {
    return (bits >> 14 & 0x3ffc) + (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) & kFromPositive);
  }
}

// Codes of a lane's eight first moments.
template <typename Layout, bool kShort>
__device__ __forceinline__ void encode_first(const float (&m)[8], float factor, uint32_t (&codes)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t sum[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t bits = bin_bits<kShort>(m[4 * h + k], factor);
      sum[k] = shared_word<Layout::kPositive>(first_offset<Layout>(bits)) + bits;
    }
    codes[h] = gather_flipped(sum[0], sum[1], sum[2], sum[3]);
  }
}

// Codes of a lane's eight second moments. One above zero so far below its block's largest that bin_bits is zero takes
// the smallest code above zero, which is that of the smallest bits above zero.
template <typename Layout, bool kShort>
__device__ __forceinline__ void encode_second(const float (&v)[8], float factor, uint32_t (&codes)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t sum[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t bits = bin_bits<kShort>(v[4 * h + k], factor);
      sum[k] = shared_word<Layout::kSecond>(bits >> 14 & 0x3ffc) + bits;
    }
    codes[h] = gather_bytes(sum[0], sum[1], sum[2], sum[3]);
  }
  if (!has_zero_byte(codes[0]) && !has_zero_byte(codes[1])) return;
  const uint32_t smallest = (shared_word<Layout::kSecond>(0) + 1) >> 16 & 0xff;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t shift = 8 * (i & 3);
    if (v[i] > 0.0f && (codes[i >> 2] >> shift & 0xff) == 0) codes[i >> 2] |= smallest << shift;
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
