// Nearest-code lookup for an ascending code book of 256 values, without compares: float bits plus one table word.
//
// The upper 16 bits of a float name a bin: sign, exponent and 7 bits of mantissa. A bin of either dynamic map holds at
// most one decision point, so the word of a bin can be chosen such that word + bits carries into bit 16 exactly from
// that point on: bits 16 to 23 of the sum are the code, or 255 - code for negative values, whose codes fall as bits
// grow. Every float has a bin, NaN too: no clamping. Of the 256 KB only the few KB of the bins in use come near the
// core.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

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

class EncodeTable {
 public:
  // values: 256. positive_stays_positive: a value above zero takes at least the smallest code that is above zero.
  EncodeTable(const float* values, bool positive_stays_positive) : word_(1 << 16) {
    for (int i = 0; i < 255; ++i) {
      point_[i] = (values[i] + values[i + 1]) / 2;
      ascending_ = ascending_ && values[i] < values[i + 1];
    }
    if (positive_stays_positive) {
      const auto smallest = std::min<int64_t>(std::upper_bound(values, values + 256, 0.0f) - values, 255);
      for (int i = 0; i < smallest; ++i) point_[i] = std::min(point_[i], 0.0f);
    }
    direct_ = ascending_ && fill(false) && fill(true);
  }

  // Whether the values ascend, as they must.
  bool ascending() const { return ascending_; }

  // The words by bin, or null where decision points lie too close for them.
  const uint32_t* words() const { return direct_ ? word_.data() : nullptr; }

  // The definition that the words reproduce: decision points below the value, so that one on a point takes the lower
  // code. Points are midpoints rounded to float32.
  uint8_t search(float value) const {
    return static_cast<uint8_t>(std::lower_bound(point_, point_ + 255, value) - point_);
  }

 private:
  // The words of one sign. The byte at magnitude zero is `byte`, and it grows by one at each step.
  bool fill(bool negative) {
    uint32_t step[255];  // bits of the magnitude from which on the byte is one higher
    int steps = 0;
    uint32_t byte = 0;
    for (int i = 0; i < 255; ++i) {
      const float point = point_[negative ? 254 - i : i];
      if (negative ? point >= 0 : point < 0) {
        ++byte;
      } else {
        // Past the point for positive values; on it already for negative ones, whose lower code is the larger byte.
        step[steps++] = (float_bits(point) & 0x7fffffffu) + (negative ? 0 : 1);
      }
    }
    int next = 0;
    for (uint32_t bin = 0; bin < 1u << 15; ++bin) {
      const uint32_t low = bin << 16, high = low + 0x10000;
      while (next < steps && step[next] <= low) ++next, ++byte;
      const bool inside = next < steps && step[next] < high;
      if (inside && next + 1 < steps && step[next + 1] < high) return false;
      const uint32_t carry_from = inside ? step[next] - low : 0x10000;
      const uint32_t sign = negative ? 1u << 31 : 0;
      word_[(sign | low) >> 16] = (byte << 16) + 0x10000 - carry_from - (sign | low);
    }
    return true;
  }

  std::vector<uint32_t> word_;
  float point_[255];
  bool ascending_ = true, direct_ = false;
};

}  // namespace peftkern
