// block.h's loops in AVX2, 8 values at a time, for CPUs without AVX-512. The target leaves FMA out, so that no compiler
// contracts a product into a sum.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <cstdlib>
#include <cstring>

#include "adamw8bit/block.h"

#define PEFTKERN_V3 __attribute__((target("avx2,f16c")))

namespace peftkern::avx2 {

// Whether this CPU has it and torch's own switch, ATEN_CPU_CAPABILITY, does not hold back.
inline bool supported() {
  static const bool yes = [] {
    const char* allowed = std::getenv("ATEN_CPU_CAPABILITY");
    return (allowed == nullptr || std::strcmp(allowed, "default") != 0) && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("f16c");
  }();
  return yes;
}

PEFTKERN_V3 inline __m256 load(const float* p) {
  return _mm256_loadu_ps(p);
}

PEFTKERN_V3 inline __m256 load(const BFloat16* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}

PEFTKERN_V3 inline __m256 load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

PEFTKERN_V3 inline void store(float* p, __m256 x) {
  _mm256_storeu_ps(p, x);
}

// To nearest even by integer arithmetic.
PEFTKERN_V3 inline void store(BFloat16* p, __m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i rounded = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), nan);
  const __m128i low = _mm256_castsi256_si128(rounded), high = _mm256_extracti128_si256(rounded, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}

PEFTKERN_V3 inline void store(Half* p, __m256 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// table[index[0]] to table[index[7]]. The gather instructions of CPUs without AVX-512 take longer.
template <typename Index>
PEFTKERN_V3 inline __m256i lookup(const uint32_t* table, const Index* index) {
  const auto at = [=](int i) { return static_cast<int>(table[index[i]]); };
  __m128i low = _mm_cvtsi32_si128(at(0)), high = _mm_cvtsi32_si128(at(4));
  low = _mm_insert_epi32(low, at(1), 1);
  high = _mm_insert_epi32(high, at(5), 1);
  low = _mm_insert_epi32(low, at(2), 2);
  high = _mm_insert_epi32(high, at(6), 2);
  low = _mm_insert_epi32(low, at(3), 3);
  high = _mm_insert_epi32(high, at(7), 3);
  return _mm256_set_m128i(high, low);
}

PEFTKERN_V3 inline __m256 decode(const float* book, const uint8_t* code) {
  uint32_t index[8];
  for (int i = 0; i < 8; i += 4) {  // four codes a load, for loads are what the loop waits for
    uint32_t four;
    std::memcpy(&four, code + i, 4);
    index[i] = static_cast<uint8_t>(four);
    index[i + 1] = static_cast<uint8_t>(four >> 8);
    four >>= 16;
    index[i + 2] = static_cast<uint8_t>(four);
    index[i + 3] = four >> 8;
  }
  return _mm256_castsi256_ps(lookup(reinterpret_cast<const uint32_t*>(book), index));
}

PEFTKERN_V3 inline __m256i magnitude(__m256 x) {
  return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff));
}

PEFTKERN_V3 inline float reduce_max(__m256i bits) {
  alignas(32) uint32_t lane[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lane), bits);
  return bits_float(*std::max_element(lane, lane + 8));
}

constexpr int64_t kAhead = 512;  // elements between what is asked for and what is worked on, as in avx512.h

// The first part of portable::update, n a multiple of 8: the new moments and their largest magnitudes. The parameters
// follow in `finish`. Prefetches past n, which is harmless at the end of a tensor.
template <typename G>
PEFTKERN_V3 void update_moments(int64_t n, const G* grad, const Moments& moments, const Hyper& h, float* m_out,
                                float* v_out, float* largest) {
  const Moments old = moments;
  const __m256 scale = _mm256_set1_ps(h.gradient_scale);
  const __m256 rest1 = _mm256_set1_ps(h.one_minus_beta1), rest2 = _mm256_set1_ps(h.one_minus_beta2);
  const __m256 m_scale = _mm256_set1_ps(old.m_scale), v_scale = _mm256_set1_ps(old.v_scale);
  __m256i m_max = _mm256_setzero_si256(), v_max = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 8) {
    if (i % 64 == 0) {
      const int64_t ahead = i + kAhead;
      for (int64_t j = 0; j < 64; j += 64 / sizeof(G)) _mm_prefetch(grad + ahead + j, _MM_HINT_T0);
      _mm_prefetch(old.m_code + ahead, _MM_HINT_T0);
      _mm_prefetch(old.v_code + ahead, _MM_HINT_T0);
    }
    const __m256 g = _mm256_mul_ps(load(grad + i), scale);
    const __m256 m_old = _mm256_mul_ps(decode(old.m_book, old.m_code + i), m_scale);
    const __m256 v_old = _mm256_mul_ps(decode(old.v_book, old.v_code + i), v_scale);
    const __m256 m = _mm256_add_ps(m_old, _mm256_mul_ps(g, rest1));
    const __m256 v = _mm256_add_ps(v_old, _mm256_mul_ps(_mm256_mul_ps(g, g), rest2));
    _mm256_storeu_ps(m_out + i, m);
    _mm256_storeu_ps(v_out + i, v);
    m_max = _mm256_max_epu32(m_max, magnitude(m));
    v_max = _mm256_max_epu32(v_max, magnitude(v));
  }
  largest[0] = reduce_max(m_max);
  largest[1] = reduce_max(v_max);
}

// Codes in eight words, 255 - code for negative values.
PEFTKERN_V3 inline __m256i codes(const float* value, __m256i bits, const uint32_t* words) {
  const __m128i bin = _mm_srli_epi32(_mm256_castsi256_si128(bits), 16);
  const int64_t first = _mm_cvtsi128_si64(bin), second = _mm_extract_epi64(bin, 1);
  uint32_t index[8] = {static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32), static_cast<uint32_t>(second),
                       static_cast<uint32_t>(second >> 32)};
  for (int i = 4; i < 8; ++i) {  // from memory: moving all out of the vector is slower
    uint16_t upper;
    std::memcpy(&upper, reinterpret_cast<const char*>(value + i) + 2, 2);
    index[i] = upper;
  }
  return _mm256_srli_epi32(_mm256_add_epi32(lookup(words, index), bits), 16);
}

// Codes of 32 values, as portable::encode with factor 1.
template <bool kSigned>
PEFTKERN_V3 inline void encode(const float* value, const uint32_t* words, uint8_t* code) {
  __m256i bits[4], code32[4];
  for (int i = 0; i < 4; ++i) {
    bits[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(value + 8 * i));
    code32[i] = codes(value + 8 * i, bits[i], words);
  }
  __m256i bytes =
      _mm256_packus_epi16(_mm256_packus_epi32(code32[0], code32[1]), _mm256_packus_epi32(code32[2], code32[3]));
  if (kSigned) {  // signed saturation keeps the signs
    const __m256i sign = _mm256_packs_epi16(_mm256_packs_epi32(bits[0], bits[1]), _mm256_packs_epi32(bits[2], bits[3]));
    bytes = _mm256_xor_si256(bytes, _mm256_cmpgt_epi8(_mm256_setzero_si256(), sign));
  }
  // The packs take each half of their operands alone: groups of four codes come out as 0 2 4 6 1 3 5 7.
  bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(code), bytes);
}

// The second part of portable::update, and portable::encode of both moments, which are scaled in place; n a multiple of
// 32. Together, because the parameters keep the divider busy and the codes all else. The codes lag, because what was
// only just written is slow to read in pieces.
template <typename P>
PEFTKERN_V3 void finish(int64_t n, P* param, const Hyper& h, float* m, float* v, float m_factor, float v_factor,
                        const uint32_t* m_words, const uint32_t* v_words, uint8_t* m_code, uint8_t* v_code) {
  constexpr int64_t kLag = 32;
  const __m256 inverse_bias2 = _mm256_set1_ps(h.inverse_bias2), eps = _mm256_set1_ps(h.eps);
  const __m256 decay = _mm256_set1_ps(h.decay), step_size = _mm256_set1_ps(h.step_size);
  const __m256 m_scale = _mm256_set1_ps(m_factor), v_scale = _mm256_set1_ps(v_factor);
  const auto update16 = [=](int64_t begin) PEFTKERN_V3 {
    _mm_prefetch(param + begin + kAhead, _MM_HINT_T0);
    for (int64_t i = begin; i < begin + 16; i += 8) {
      const __m256 m_new = load(m + i), v_new = load(v + i);
      const __m256 denominator = _mm256_add_ps(_mm256_mul_ps(_mm256_sqrt_ps(v_new), inverse_bias2), eps);
      const __m256 change = _mm256_mul_ps(_mm256_div_ps(m_new, denominator), step_size);
      store(param + i, _mm256_sub_ps(_mm256_mul_ps(load(param + i), decay), change));
      store(m + i, _mm256_mul_ps(m_new, m_scale));
      store(v + i, _mm256_mul_ps(v_new, v_scale));
    }
  };
  for (int64_t i = 0; i < std::min(n, kLag); i += 16) update16(i);
  for (int64_t i = 0; i < n; i += 32) {
    const int64_t next = i + kLag;
    if (next < n) update16(next);
    encode<true>(m + i, m_words, m_code + i);
    if (next < n) update16(next + 16);
    encode<false>(v + i, v_words, v_code + i);
  }
}

}  // namespace peftkern::avx2
#endif
