// The NF4 encode as one table lookup, proved at compile time.
//
// code(s) = number of thresholds below s. Any monotone map of s to bins that separates the 15 thresholds gives
// code(s) = base[bin(s)] + (s > threshold[bin(s)]), where base counts the thresholds in lower bins: exact, because a
// threshold in another bin compares as its bin does. bin(s) = floor(round(15.5 s + 15.75)) puts [-1, 1] into 32 bins;
// the rounding is the one of a float32 multiply-add whose last place is 1/128 of a bin (see encode in quantize.cuh).
#pragma once

#include <cstdint>

#include "common/nf4_code.h"

namespace peftkern {

inline constexpr int kEncodeBins = 32;
inline constexpr float kEncodeScale = 15.5f;
inline constexpr float kEncodeShift = 15.75f;
inline constexpr int kEncodeFractionBits = 7;  // of a bin, in the last place of the multiply-add

struct EncodeEntry {
  float threshold;  // +infinity where the bin has none: never exceeded, not by NaN either
  uint32_t base;
};

struct EncodeTable {
  EncodeEntry bins[kEncodeBins];
};

// Where a threshold falls, in bins; exact in double.
constexpr double encode_position(int threshold) {
  return static_cast<double>(nf4_threshold(threshold)) * kEncodeScale + kEncodeShift;
}

constexpr EncodeTable make_encode_table() {
  EncodeTable table{};
  for (int bin = 0; bin < kEncodeBins; ++bin) {
    table.bins[bin] = {__builtin_huge_valf(), 0};
    for (int t = 0; t < 15; ++t) {
      const int at = static_cast<int>(encode_position(t));
      if (at == bin) table.bins[bin].threshold = nf4_threshold(t);
      table.bins[bin].base += at < bin;
    }
  }
  return table;
}

constexpr bool thresholds_are_separated() {
  for (int t = 0; t < 15; ++t) {
    const double position = encode_position(t);
    const int bin = static_cast<int>(position);
    // Clear of the bin's edges by more than the rounding, so that the device finds it in the same bin.
    const double margin = 1.0 / (1 << kEncodeFractionBits);
    if (position - bin <= margin || bin + 1 - position <= margin) return false;
    if (t > 0 && static_cast<int>(encode_position(t - 1)) >= bin) return false;
  }
  return true;
}

static_assert(thresholds_are_separated(), "two NF4 thresholds share a bin, or one is on an edge");
// Scaled values reach one last place beyond 1, and stay inside the table.
static_assert(-kEncodeScale * 1.001f + kEncodeShift > 0 && kEncodeScale * 1.001f + kEncodeShift < kEncodeBins);
// NaN has all bits below the exponent set: it lands in the last bin and takes the last code, as torch.bucketize does.
static_assert(make_encode_table().bins[kEncodeBins - 1].base == 15);

}  // namespace peftkern
