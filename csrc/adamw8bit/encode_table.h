// Nearest-code lookup for an ascending code book of 256 values, without compares: float bits plus one table word.
//
// The bits of a magnitude in [2^-23, 1], less those of 2^-23, start with a dense bin number (5 bits of exponent, 7 of
// mantissa). A bin of either dynamic map holds at most one decision point, so the word of a bin can be chosen such that
// word + bits carries into bit 16 exactly from that point on: bits 16 to 23 of the sum are the code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace peftkern {

inline uint32_t float_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

constexpr uint32_t kBinOrigin = 0x34000000;                          // the bits of 2^-23
constexpr uint32_t kBinLast = 0x3f800000 - kBinOrigin;               // 1.0 relative to it
constexpr int32_t kBins = static_cast<int32_t>(kBinLast >> 16) + 1;  // 2945

// Decision points of one code book and, where its structure allows, the words for a lookup without compares.
struct EncodeTable {
  float midpoint[255];       // between codes i and i + 1, rounded to float32; a value on it takes code i
  uint32_t word[2 * kBins];  // by bin; the second half is for negative values and yields 255 - code
  bool direct = false;       // `word` is valid
  bool ascending = true;

  explicit EncodeTable(const float* code) {
    for (int i = 0; i < 255; ++i) {
      midpoint[i] = (code[i] + code[i + 1]) / 2;
      ascending = ascending && code[i] < code[i + 1];
    }
    direct = ascending && fill(false) && fill(true);
  }

  // Codes below the value; the definition that `word` reproduces.
  uint8_t search(float value) const {
    return static_cast<uint8_t>(std::lower_bound(midpoint, midpoint + 255, value) - midpoint);
  }

 private:
  // One sign's words. The stored byte grows with the magnitude: it is the code, or 255 - code for negative values.
  bool fill(bool negative) {
    uint32_t step[255];  // relative bits from which on the byte is one higher
    int steps = 0, first = 0;
    for (int i = 0; i < 255; ++i) {
      const float m = midpoint[negative ? 254 - i : i];
      if (negative ? m >= 0 : m < 0) {
        ++first;
        continue;
      }
      const uint32_t bits = float_bits(m) & 0x7fffffff;
      // A tie takes the lower code: above the midpoint for positive values, on it for negative ones.
      const uint32_t from = bits + (negative ? 0 : 1);
      if (from <= kBinOrigin) return false;
      step[steps++] = from - kBinOrigin;
    }
    int next = 0;
    for (int32_t bin = 0; bin < kBins; ++bin) {
      const uint32_t low = static_cast<uint32_t>(bin) << 16;
      while (next < steps && step[next] <= low) ++next;
      const bool inside = next < steps && step[next] < low + 0x10000;
      if (inside && next + 1 < steps && step[next + 1] < low + 0x10000) return false;
      const uint32_t carry_from = inside ? step[next] - low : 0x10000;
      const uint32_t byte = static_cast<uint32_t>(first + next);
      word[(negative ? kBins : 0) + bin] = (byte << 16) + 0x10000 - carry_from - low;
    }
    return true;
  }
};

}  // namespace peftkern
