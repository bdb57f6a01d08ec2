// Decode and encode tables of a pair of code books as one array of words, which a CTA copies to shared memory as it is.
//
// Encode: scaled by 2^-103, the range [2^-23, 1] lies on the exponents 1 to 24, so that the upper 16 bits of a float
// without its sign are a dense bin number with 7 bits of mantissa. A bin of either dynamic map holds at most one
// decision point; the word of a bin is chosen such that word + bits carries into bit 16 exactly from that point on:
// bits 16 to 23 of the sum are the code, or 255 - code for negative values. See encode_table.h, which does the same
// unscaled.
#pragma once

#include <cstdint>

namespace peftkern {

inline constexpr int kEncodeBins = 3136;  // 24 * 128 and the ones of 1 and its neighbour
inline constexpr float kEncodeScale = 0x1p-103f;
inline constexpr float kSmallestPoint = 0x1p-23f;  // decision points nearer to zero have no bin of their own

// Offsets in words. Bit 12 of an index into the first moment's bins is the sign.
inline constexpr int kEncodePositive = 0;
inline constexpr int kDecodeFirst = kEncodeBins;
inline constexpr int kDecodeSecond = kDecodeFirst + 256;
inline constexpr int kEncodeNegative = 4096;
inline constexpr int kEncodeSecond = kEncodeNegative + kEncodeBins;
inline constexpr int kPointsFirst = kEncodeSecond + kEncodeBins;  // decision points, the last one infinite
inline constexpr int kPointsSecond = kPointsFirst + 256;
inline constexpr int kTableWords = kPointsSecond + 256;
inline constexpr int kTableFlags = kTableWords;  // 1 where a book's points are too close for bins; not copied
inline constexpr int kTableSize = kTableWords + 4;
static_assert(kDecodeSecond + 256 <= kEncodeNegative, "the decode tables fill the gap");

}  // namespace peftkern
