// block.h's loops in AVX-512, 16 values at a time. Autovectorized code for them takes twice as long: it widens whole
// 64-byte vectors of codes and so runs out of registers between the gathers.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define PEFTKERN_ADAMW_AVX512 1

#include <immintrin.h>

#include <cstdlib>
#include <cstring>

#include "adamw8bit/block.h"

#define PEFTKERN_V4 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

namespace peftkern::avx512 {

// Whether this CPU has it and torch's own switch, ATEN_CPU_CAPABILITY, does not hold back.
inline bool supported() {
  static const bool yes = [] {
    const char* allowed = std::getenv("ATEN_CPU_CAPABILITY");
    return (allowed == nullptr || std::strcmp(allowed, "avx512") == 0) && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }();
  return yes;
}

PEFTKERN_V4 inline __m512 load(const float* p) {
  return _mm512_loadu_ps(p);
}

PEFTKERN_V4 inline __m512 load(const BFloat16* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}

PEFTKERN_V4 inline __m512 load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

PEFTKERN_V4 inline void store(float* p, __m512 x) {
  _mm512_storeu_ps(p, x);
}

// To nearest even by integer arithmetic: the instruction for it flushes denormals.
PEFTKERN_V4 inline void store(BFloat16* p, __m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}

PEFTKERN_V4 inline void store(Half* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

PEFTKERN_V4 inline __m512 decode(const float* book, const uint8_t* code) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(code));
  return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(codes), book, 4);
}

PEFTKERN_V4 inline float reduce_max(__m512 x) {
  alignas(64) float lane[16];
  _mm512_store_ps(lane, x);
  return *std::max_element(lane, lane + 16);
}

// Elements between what is asked for and what is worked on. Spread over the loop, the requests never queue up; asked
// for block by block they do, and the hardware's own prefetch alone stops at every page.
constexpr int64_t kAhead = 512;

// As portable::update, n a multiple of 16. Prefetches past n, which is harmless at the end of a tensor.
template <typename P, typename G>
PEFTKERN_V4 void update(int64_t n, P* param, const G* grad, const Moments& old, const Hyper& h, float* m_out,
                        float* v_out, float* largest) {
  const __m512 scale = _mm512_set1_ps(h.gradient_scale);
  const __m512 rest1 = _mm512_set1_ps(h.one_minus_beta1), rest2 = _mm512_set1_ps(h.one_minus_beta2);
  const __m512 inverse_bias2 = _mm512_set1_ps(h.inverse_bias2), eps = _mm512_set1_ps(h.eps);
  const __m512 decay = _mm512_set1_ps(h.decay), step_size = _mm512_set1_ps(h.step_size);
  const __m512 m_scale = _mm512_set1_ps(old.m_scale), v_scale = _mm512_set1_ps(old.v_scale);
  __m512 m_max = _mm512_setzero_ps(), v_max = _mm512_setzero_ps();
#pragma GCC unroll 2
  for (int64_t i = 0; i < n; i += 16) {
    _mm_prefetch(param + i + kAhead, _MM_HINT_T0);
    _mm_prefetch(grad + i + kAhead, _MM_HINT_T0);
    if (i % 64 == 0) {
      _mm_prefetch(old.m_code + i + kAhead, _MM_HINT_T0);
      _mm_prefetch(old.v_code + i + kAhead, _MM_HINT_T0);
    }
    const __m512 g = _mm512_mul_ps(load(grad + i), scale);
    const __m512 m_old = _mm512_mul_ps(decode(old.m_book, old.m_code + i), m_scale);
    const __m512 v_old = _mm512_mul_ps(decode(old.v_book, old.v_code + i), v_scale);
    const __m512 m = _mm512_add_ps(m_old, _mm512_mul_ps(g, rest1));
    const __m512 v = _mm512_add_ps(v_old, _mm512_mul_ps(_mm512_mul_ps(g, g), rest2));
    const __m512 denominator = _mm512_add_ps(_mm512_mul_ps(_mm512_sqrt_ps(v), inverse_bias2), eps);
    const __m512 change = _mm512_mul_ps(_mm512_div_ps(m, denominator), step_size);
    store(param + i, _mm512_sub_ps(_mm512_mul_ps(load(param + i), decay), change));
    _mm512_storeu_ps(m_out + i, m);
    _mm512_storeu_ps(v_out + i, v);
    m_max = _mm512_max_ps(m_max, _mm512_abs_ps(m));
    v_max = _mm512_max_ps(v_max, v);
  }
  largest[0] = reduce_max(m_max);
  largest[1] = reduce_max(v_max);
}

// As portable::encode, n a multiple of 16; unless kSigned, values are not negative.
template <bool kSigned>
PEFTKERN_V4 void encode(int64_t n, const float* value, float factor, const uint32_t* words, uint8_t* code) {
  const __m512 scale = _mm512_set1_ps(factor);
#pragma GCC unroll 2
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(value + i), scale));
    const __m512i word = _mm512_i32gather_epi32(_mm512_srli_epi32(bits, 16), words, 4);
    __m512i sum = _mm512_srli_epi32(_mm512_add_epi32(word, bits), 16);
    if (kSigned) sum = _mm512_mask_xor_epi32(sum, _mm512_movepi32_mask(bits), sum, _mm512_set1_epi32(-1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(code + i), _mm512_cvtepi32_epi8(sum));
  }
}

}  // namespace peftkern::avx512
#endif
