// Decode and encode tables of a pair of code books as one array of words.
//
// Encode: scaled by 2^-103, the range [2^-23, 1] lies on the exponents 1 to 24, so that the upper 16 bits of a float
// without its sign are a dense bin number with 7 bits of mantissa. A bin of either dynamic map holds at most one
// decision point; the word of a bin is chosen such that word + bits carries into bit 16 exactly from that point on:
// bits 16 to 23 of the sum are the code, or 255 - code for negative values; bits 24 to 31 are what these have to be
// flipped with, zeros or ones. See encode_table.h, which does the same unscaled.
#pragma once

#include <cstdint>

namespace peftkern {

inline constexpr int kCodeBins = 3136;  // 24 * 128 and the ones of 1 and its neighbour
inline constexpr float kCodeScale = 0x1p-103f;
inline constexpr float kSmallestCodePoint = 0x1p-23f;  // decision points nearer to zero have no bin of their own

// Offsets in words.
inline constexpr int kEncodePositive = 0;
inline constexpr int kEncodeNegative = kEncodePositive + kCodeBins;
inline constexpr int kEncodeSecond = kEncodeNegative + kCodeBins;
inline constexpr int kPointsFirst = kEncodeSecond + kCodeBins;  // decision points, the last one infinite
inline constexpr int kPointsSecond = kPointsFirst + 256;
inline constexpr int kDecodeFirst = kPointsSecond + 256;
inline constexpr int kDecodeSecond = kDecodeFirst + 256;
inline constexpr int kTableWords = kDecodeSecond + 256;
inline constexpr int kTableFlags = kTableWords;  // 1 where a book's points are too close for bins
inline constexpr int kTableSize = kTableWords + 4;

// How decode tables lie in shared memory.
enum class DecodeTables {
  kOnce,
  kEight,  // every value eight times in a row, for as many lanes: a few lookups conflict
  // A row of 256 bytes for every code: the first moment's value once for every bank and then the second's, so that
  // lookups never conflict, and a code put between the lane and zeros is its address.
  kBanks,
};

// Where all lie in shared memory, as addresses of its own: such that a few bits of a float are an offset as they are,
// with no base to add. The sign of a first moment is bit 17 of bits >> 14. With decode tables once they fit into 99 KB.
template <DecodeTables kDecodeTables>
struct AdamWLayout {
  static constexpr DecodeTables kTables = kDecodeTables;
  static constexpr bool kStaged = kTables != DecodeTables::kOnce;
  static constexpr uint32_t kScalars = 0x3f00;  // the step's numbers; the kernel's own variables lie before 0x1c00
  static constexpr uint32_t kPositive = 0x4000, kSecond = 0x8000;
  static constexpr uint32_t kPoints = 0xc000;  // of both books
  static constexpr uint32_t kDecode = kStaged ? 0x10000 : 0xd000;
  static constexpr uint32_t kDecodeSecond = kDecode + (kTables == DecodeTables::kBanks   ? 128
                                                       : kTables == DecodeTables::kEight ? 0x2000
                                                                                         : 1024);
  static constexpr uint32_t kNegative = kStaged ? 0x24000 : 0x10000;
  static constexpr uint32_t kEnd = kNegative + 4 * kCodeBins;

  // Where tiles wait. Of mixed formats, with a copy for every bank: stages of 2560 bytes a warp, as many as fit between
  // the tables and the others behind them.
  static constexpr uint32_t kGap = kDecode + 0x10000, kTileStage = 2560;
  static constexpr uint32_t tile_stage(uint32_t warp) {
    constexpr uint32_t kBetween = (kNegative - kGap) / kTileStage;
    return warp < kBetween ? kGap + warp * kTileStage : kEnd + (warp - kBetween) * kTileStage;
  }
  static constexpr uint32_t kStagedEnd = tile_stage(32);
};

// Where a slot begins.
struct AdamWSlot {
  uint32_t params, grads, first, second, scales;
};

// Of 16-bit formats two slots of 8192 elements, the second one where there is room beside a copy for every bank.
constexpr AdamWSlot adamw_half_slot(uint32_t slot) {
  using Layout = AdamWLayout<DecodeTables::kBanks>;
  constexpr uint32_t kEnd = Layout::kEnd, kScales = kEnd + 0x10000;
  constexpr uint32_t kGrads2 = Layout::kGap, kFirst2 = 0xd000, kSecond2 = 0x1c00;
  static_assert(kScales + 0x200 <= Layout::kStagedEnd && kGrads2 + 0x4000 <= Layout::kNegative, "room");
  static_assert(kFirst2 + 0x2000 <= Layout::kDecode && kSecond2 + 0x2000 <= Layout::kScalars, "room");
  const auto place = [&](uint32_t first, uint32_t second) { return first + slot * (second - first); };
  return {place(kEnd, kEnd + 0xc000), place(kEnd + 0x4000, kGrads2), place(kEnd + 0x8000, kFirst2),
          place(kEnd + 0xa000, kSecond2), place(kScales, kScales + 0x100)};
}

// Of float32 three of 4096 elements.
constexpr AdamWSlot adamw_float_slot(uint32_t slot) {
  using Layout = AdamWLayout<DecodeTables::kEight>;
  constexpr uint32_t kValues = Layout::kDecode + 0x4000, kCodes = Layout::kEnd + 0x8000, kScales = kCodes + 0x6000;
  static_assert(kValues + 0x10000 <= Layout::kNegative && kScales + 3 * 0x80 <= Layout::kStagedEnd, "room");
  const uint32_t values = slot == 2 ? Layout::kEnd : kValues + slot * 0x8000, codes = kCodes + slot * 0x2000;
  return {values, values + 0x4000, codes, codes + 0x1000, kScales + slot * 0x80};
}
static_assert(kCodeBins * 4 <= 0x4000, "a table in its window");

}  // namespace peftkern
