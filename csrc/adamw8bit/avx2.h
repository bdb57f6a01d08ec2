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
  return _mm256_castsi256_ps(lookup(reinterpret_cast<const uint32_t*>(book), code));
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

// As portable::update, n a multiple of 32. Prefetches past n, which is harmless at the end of a tensor.
template <typename P, typename G>
PEFTKERN_V3 void update(int64_t n, P* param, const G* grad, const Moments& moments, const Hyper& h, float* m_out,
                        float* v_out, float* largest) {
  const Moments old = moments;
  const __m256 scale = _mm256_set1_ps(h.gradient_scale);
  const __m256 rest1 = _mm256_set1_ps(h.one_minus_beta1), rest2 = _mm256_set1_ps(h.one_minus_beta2);
  const __m256 inverse_bias2 = _mm256_set1_ps(h.inverse_bias2), eps = _mm256_set1_ps(h.eps);
  const __m256 decay = _mm256_set1_ps(h.decay), step_size = _mm256_set1_ps(h.step_size);
  const __m256 m_scale = _mm256_set1_ps(old.m_scale), v_scale = _mm256_set1_ps(old.v_scale);
  __m256i m_max = _mm256_setzero_si256(), v_max = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 8) {
    if (i % 16 == 0) {
      _mm_prefetch(param + i + kAhead, _MM_HINT_T0);
      _mm_prefetch(grad + i + kAhead, _MM_HINT_T0);
    }
    if (i % 64 == 0) {
      _mm_prefetch(old.m_code + i + kAhead, _MM_HINT_T0);
      _mm_prefetch(old.v_code + i + kAhead, _MM_HINT_T0);
    }
    const __m256 g = _mm256_mul_ps(load(grad + i), scale);
    const __m256 m_old = _mm256_mul_ps(decode(old.m_book, old.m_code + i), m_scale);
    const __m256 v_old = _mm256_mul_ps(decode(old.v_book, old.v_code + i), v_scale);
    const __m256 m = _mm256_add_ps(m_old, _mm256_mul_ps(g, rest1));
    const __m256 v = _mm256_add_ps(v_old, _mm256_mul_ps(_mm256_mul_ps(g, g), rest2));
    const __m256 denominator = _mm256_add_ps(_mm256_mul_ps(_mm256_sqrt_ps(v), inverse_bias2), eps);
    const __m256 change = _mm256_mul_ps(_mm256_div_ps(m, denominator), step_size);
    store(param + i, _mm256_sub_ps(_mm256_mul_ps(load(param + i), decay), change));
    _mm256_storeu_ps(m_out + i, m);
    _mm256_storeu_ps(v_out + i, v);
    m_max = _mm256_max_epu32(m_max, magnitude(m));
    v_max = _mm256_max_epu32(v_max, magnitude(v));
  }
  largest[0] = reduce_max(m_max);
  largest[1] = reduce_max(v_max);
}

// Codes in the low bytes of eight words; the bytes above are clear.
template <bool kSigned>
PEFTKERN_V3 inline __m256i codes(const float* value, __m256 scale, const uint32_t* words) {
  const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(_mm256_loadu_ps(value), scale));
  const __m256i bin = _mm256_srli_epi32(bits, 16);
  const __m128i low = _mm256_castsi256_si128(bin), high = _mm256_extracti128_si256(bin, 1);
  const auto bins = [](int64_t two, uint32_t* to) {
    to[0] = static_cast<uint32_t>(two);
    to[1] = static_cast<uint32_t>(static_cast<uint64_t>(two) >> 32);
  };
  uint32_t index[8];  // in registers: stored and loaded again they are slower
  bins(_mm_cvtsi128_si64(low), index);
  bins(_mm_extract_epi64(low, 1), index + 2);
  bins(_mm_cvtsi128_si64(high), index + 4);
  bins(_mm_extract_epi64(high, 1), index + 6);
  const __m256i word = lookup(words, index);
  __m256i sum = _mm256_srli_epi32(_mm256_add_epi32(word, bits), 16);
  if (kSigned) sum = _mm256_xor_si256(sum, _mm256_srai_epi32(bits, 31));
  return _mm256_and_si256(sum, _mm256_set1_epi32(0xff));
}

// As portable::encode, n a multiple of 32.
template <bool kSigned>
PEFTKERN_V3 void encode(int64_t n, const float* value, float factor, const uint32_t* words, uint8_t* code) {
  const __m256 scale = _mm256_set1_ps(factor);
  // The packs take each half of their operands alone: groups of four codes come out as 0 2 4 6 1 3 5 7.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t i = 0; i < n; i += 32) {
    const __m256i low =
        _mm256_packus_epi32(codes<kSigned>(value + i, scale, words), codes<kSigned>(value + i + 8, scale, words));
    const __m256i high =
        _mm256_packus_epi32(codes<kSigned>(value + i + 16, scale, words), codes<kSigned>(value + i + 24, scale, words));
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(code + i), bytes);
  }
}

}  // namespace peftkern::avx2
#endif
