// What a step does to one block, in plain loops for any CPU. avx512.h and avx2.h do the same by hand.
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

// One block as it is before the step: n codes of each moment and what they are multiplied with.
struct Moments {
  const uint8_t *m_code, *v_code;
  const float *m_book, *v_book;  // 256 values each
  float m_scale, v_scale;        // absmax * beta
};

// What is stored, and what codes are relative to: a scale below the smallest normal float has no finite reciprocal.
inline float stored_absmax(float largest) {
  return largest > 0.0f ? std::max(largest, kMinAbsmax) : 0.0f;
}

inline float inverse_absmax(float largest) {
  return 1.0f / std::max(largest, kMinAbsmax);
}

namespace portable {

// Updates param in place, leaves the new moments in m_out and v_out and their largest magnitudes in largest[0] and [1].
PEFTKERN_MULTIVERSION inline void update(int64_t n, float* __restrict param, const float* __restrict grad,
                                         const Moments& moments, const Hyper& hyper, float* __restrict m_out,
                                         float* __restrict v_out, float* __restrict largest) {
  const Hyper h = hyper;
  const Moments old = moments;
  uint32_t m_bits = 0, v_bits = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float g = grad[i] * h.gradient_scale;
    const float m = old.m_book[old.m_code[i]] * old.m_scale + g * h.one_minus_beta1;
    const float v = old.v_book[old.v_code[i]] * old.v_scale + g * g * h.one_minus_beta2;
    param[i] = param[i] * h.decay - m / (std::sqrt(v) * h.inverse_bias2 + h.eps) * h.step_size;
    m_out[i] = m;
    v_out[i] = v;
    m_bits = std::max(m_bits, float_bits(m) & 0x7fffffffu);
    v_bits = std::max(v_bits, float_bits(v) & 0x7fffffffu);
  }
  largest[0] = bits_float(m_bits);
  largest[1] = bits_float(v_bits);
}

// Codes of value * factor by a table's words.
PEFTKERN_MULTIVERSION inline void encode(int64_t n, const float* __restrict value, float factor,
                                         const uint32_t* __restrict words, uint8_t* __restrict code) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = float_bits(value[i] * factor);
    const uint32_t sign = static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31);
    code[i] = static_cast<uint8_t>(((words[bits >> 16] + bits) >> 16) ^ sign);
  }
}

}  // namespace portable
}  // namespace peftkern
