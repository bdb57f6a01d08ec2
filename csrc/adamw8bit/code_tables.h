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

// Where they lie in shared memory, as addresses of its own: such that a few bits of a float are an offset as they are,
// with no base to add. kReplicated: the sign of a first moment is bit 17 of bits >> 14, and a decode table has a row of
// 256 bytes for every code, with the first moment's value once for every bank and then the second's, so that lookups
// never conflict, and a code put between the lane and zeros is its address. Without, both fit into 99 KB.
template <bool kReplicatedTables>
struct AdamWLayout {
  static constexpr bool kReplicated = kReplicatedTables;
  static constexpr uint32_t kScalars = 0x3f00;  // the step's numbers; the kernel's own variables lie before 0x1c00
  static constexpr uint32_t kPositive = 0x4000, kSecond = 0x8000;
  static constexpr uint32_t kPoints = 0xc000;  // of both books
  static constexpr uint32_t kDecode = kReplicated ? 0x10000 : 0xd000;
  static constexpr uint32_t kDecodeSecond = kDecode + (kReplicated ? 128 : 1024);
  static constexpr uint32_t kNegative = kReplicated ? 0x24000 : 0x10000;
  static constexpr uint32_t kEnd = kNegative + 4 * kCodeBins;

  // Where tiles wait, with replicated tables: stages of 2560 bytes a warp, as many as fit between the tables and the
  // others behind them,
  static constexpr uint32_t kGap = kDecode + 0x10000, kTileStage = 2560;
  static constexpr uint32_t tile_stage(uint32_t warp) {
    constexpr uint32_t kBetween = (kNegative - kGap) / kTileStage;
    return warp < kBetween ? kGap + warp * kTileStage : kEnd + (warp - kBetween) * kTileStage;
  }
  static constexpr uint32_t kStagedEnd = tile_stage(32);
  // or two slots of 8192 elements of 16 bits, the second one where there is room.
  static constexpr uint32_t kSlotParams = kEnd, kSlotGrads = kEnd + 0x4000;
  static constexpr uint32_t kSlotFirst = kEnd + 0x8000, kSlotSecond = kEnd + 0xa000;
  static constexpr uint32_t kSlotParams2 = kEnd + 0xc000, kSlotGrads2 = kGap;
  static constexpr uint32_t kSlotFirst2 = 0xd000, kSlotSecond2 = 0x1c00;
  static constexpr uint32_t kSlotScales = kEnd + 0x10000;  // of both
  static_assert(!kReplicated || (kSlotScales + 0x200 <= kStagedEnd && kSlotGrads2 + 0x4000 <= kNegative), "room");
  static_assert(!kReplicated || (kSlotFirst2 + 0x2000 <= kDecode && kSlotSecond2 + 0x2000 <= kScalars), "room");
};
static_assert(kCodeBins * 4 <= 0x4000, "a table in its window");

}  // namespace peftkern
