// float32 <-> 16-bit conversions as plain loops that the compiler vectorizes. Round to nearest even, NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/stable.h"

namespace peftkern {

inline float to_float(float v) {
  return v;
}

inline float to_float(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline float to_float(Half v) {
#ifdef __FLT16_MAX__
  _Float16 h;
  std::memcpy(&h, &v, sizeof h);
  return static_cast<float>(h);
#else
  return static_cast<float>(v);
#endif
}

template <typename T>
T from_float(float v);

template <>
inline float from_float<float>(float v) {
  return v;
}

template <>
inline BFloat16 from_float<BFloat16>(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16(static_cast<uint16_t>(v != v ? 0x7fc0u : rounded), BFloat16::from_bits());
}

template <>
inline Half from_float<Half>(float v) {
#ifdef __FLT16_MAX__
  const _Float16 h = static_cast<_Float16>(v);
  Half out;
  std::memcpy(&out, &h, sizeof out);
  return out;
#else
  return Half(v);
#endif
}

}  // namespace peftkern
