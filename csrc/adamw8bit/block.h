// What a step does to one block, in plain loops for any CPU. avx512.h does the same by hand, 16 values at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "adamw8bit/encode_table.h"
#include "common/convert.h"
#include "common/multiversion.h"

namespace peftkern {

constexpr int64_t kMaxBlocksize = 4096;
constexpr float kMinAbsmax = 0x1p-126f;  // the smallest float whose reciprocal is finite

// The step's numbers, each rounded once from float64.
struct Hyper {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps;
  float decay;           // 1 - lr * weight_decay
  float step_size;       // lr / (1 - beta1^step)
  float inverse_bias2;   // 1 / sqrt(1 - beta2^step)
  float gradient_scale;  // 1 / grad_scale, negative to maximize
};

// A code book, how to encode into it, and its smallest code of a positive value.
struct CodeBook {
  const float* values;  // 256, ascending
  const EncodeTable* table;
  uint8_t first_positive;
};

// One block's states: n codes each, one scale each.
struct BlockState {
  uint8_t *m_code, *v_code;
  float *m_absmax, *v_absmax;
};

// What is stored, and what codes are relative to: a scale below the smallest normal float has no finite reciprocal.
inline float stored_absmax(float largest) {
  return largest > 0.0f ? std::max(largest, kMinAbsmax) : 0.0f;
}

inline float inverse_absmax(float largest) {
  return 1.0f / std::max(largest, kMinAbsmax);
}

namespace portable {

// Decodes the states, updates param in place, leaves the new moments in m and v, their largest magnitudes in `largest`.
PEFTKERN_MULTIVERSION inline void update(int64_t n, float* __restrict param, const float* __restrict grad,
                                         const uint8_t* __restrict m_code, const uint8_t* __restrict v_code,
                                         const float* __restrict m_book, const float* __restrict v_book, float m_absmax,
                                         float v_absmax, const Hyper& hyper, float* __restrict m_out,
                                         float* __restrict v_out, float* __restrict largest) {
  const Hyper h = hyper;
  uint32_t m_bits = 0, v_bits = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i] * h.gradient_scale;
    const float m = m_book[m_code[i]] * m_absmax * h.beta1 + g * h.one_minus_beta1;
    const float v = v_book[v_code[i]] * v_absmax * h.beta2 + g * g * h.one_minus_beta2;
    param[i] = param[i] * h.decay - m / (std::sqrt(v) * h.inverse_bias2 + h.eps) * h.step_size;
    m_out[i] = m;
    v_out[i] = v;
    m_bits = std::max(m_bits, float_bits(m) & 0x7fffffffu);
    v_bits = std::max(v_bits, float_bits(v) & 0x7fffffffu);
  }
  largest[0] = bits_float(m_bits);
  largest[1] = bits_float(v_bits);
}

// Codes of value * factor. A positive value never takes a code below `least_positive`.
PEFTKERN_MULTIVERSION inline void encode(int64_t n, const float* __restrict value, float factor,
                                         const uint32_t* __restrict word, uint8_t least_positive,
                                         uint8_t* __restrict code) {
  for (int64_t i = 0; i < n; ++i) {
    const float v = value[i];
    const uint32_t bits = float_bits(v * factor);
    const int32_t sign = static_cast<int32_t>(bits) >> 31;
    const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu) - static_cast<int32_t>(kBinOrigin);
    const int32_t u = std::min(std::max(magnitude, 0), static_cast<int32_t>(kBinLast));
    const uint32_t sum = word[(u >> 16) + (sign & kBins)] + static_cast<uint32_t>(u);
    const uint32_t nearest = ((sum >> 16) ^ static_cast<uint32_t>(sign)) & 0xffu;
    const uint32_t least = v > 0.0f ? least_positive : 0u;
    code[i] = static_cast<uint8_t>(std::max(nearest, least));
  }
}

}  // namespace portable

// For code books whose decision points lie too close for the lookup.
inline void encode_by_search(int64_t n, const float* value, float factor, const CodeBook& book, uint8_t least_positive,
                             uint8_t* code) {
  for (int64_t i = 0; i < n; ++i) {
    code[i] = std::max(book.table->search(value[i] * factor), value[i] > 0.0f ? least_positive : uint8_t{0});
  }
}

}  // namespace peftkern
