// Philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") and the dropout mask made of it,
// for C++ and CUDA. peftkern/ops/_dropout.py defines the mask; every backend computes exactly this one.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PEFTKERN_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define PEFTKERN_INLINE inline __attribute__((always_inline))
#else
#define PEFTKERN_INLINE inline
#endif

namespace peftkern {

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

inline constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;
inline constexpr int kDropoutColumns = 16;  // of a row of the mask that one call serves

// Recursion instead of a loop: straight-line code, so that a loop over counters vectorizes.
template <int kRounds = 7>
PEFTKERN_INLINE PhiloxWords philox4x32(PhiloxWords c, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = uint64_t{kPhiloxMultiplier0} * c.w0;
  const uint64_t p1 = uint64_t{kPhiloxMultiplier1} * c.w2;
  const PhiloxWords next{static_cast<uint32_t>(p1 >> 32) ^ c.w1 ^ k0, static_cast<uint32_t>(p1),
                         static_cast<uint32_t>(p0 >> 32) ^ c.w3 ^ k1, static_cast<uint32_t>(p0)};
  if constexpr (kRounds == 1) {
    return next;
  } else {
    return philox4x32<kRounds - 1>(next, k0 + kPhiloxKeyStep0, k1 + kPhiloxKeyStep1);
  }
}

// Row m, columns [16 * call, 16 * call + 16), the low byte of w0 first: seven bits of each byte are the high ones of a
// 15-bit number.
PEFTKERN_INLINE PhiloxWords dropout_numbers(uint64_t seed, int64_t m, uint32_t call) {
  return philox4x32({call, static_cast<uint32_t>(m), static_cast<uint32_t>(static_cast<uint64_t>(m) >> 32), 0},
                    static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// The low bytes of the numbers.
PEFTKERN_INLINE uint32_t dropout_mix(uint32_t word) {
  const uint64_t product = uint64_t{0x9E3779B1u} * word;
  return static_cast<uint32_t>(product) ^ static_cast<uint32_t>(product >> 32);
}

// The smallest 15-bit number that is kept. nearbyint rounds halves to even, as Python's round does.
inline uint32_t dropout_threshold(double dropout_p) {
  const double rounded = std::nearbyint(dropout_p * 32768.0);
  return rounded > 32767.0 ? 32767u : static_cast<uint32_t>(rounded);
}

// What the kept elements are multiplied by: one over the exact share kept.
inline double dropout_scale(double dropout_p) {
  return 32768.0 / (32768.0 - dropout_threshold(dropout_p));
}

}  // namespace peftkern
