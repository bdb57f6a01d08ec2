// The low-rank term of a LoRA layer as an NF4 matmul of few tokens takes it. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/float_type.h"

namespace peftkern {

// y += factor * S B^T, S = x A^T [M, rank] in x's dtype, A [rank, K], B [N, rank]. S's columns are padded with zeros to
// a multiple of 16. The launch makes S itself, in parts of the contraction.
struct NF4LowRank {
  const void* A;
  FloatType A_type;
  float* parts;         // room for [kMaxParts][M][padded]
  void* whole;          // mid_m: room for [M][padded] in x's dtype
  uint32_t* turnstile;  // [kTurnstileWords]: 0 before the launch and after it, and no other launch's meanwhile
  void* S;              // [M, rank], where the sum of the parts goes
  const void* B;
  FloatType B_type;
  bool fours;  // B's rows can be read in aligned groups of four
  int rank, padded;
  float factor;
};

inline constexpr int kLowRankMaxRank = 256;
inline constexpr int kPartRows = 16, kPartColumns = 64;  // of A: of a part, and what a warp takes of it at a time
inline constexpr int kMaxParts = 8;                      // of the contraction
// What a block of small_m reads of S in parts: as much as its threads have in flight at once.
inline constexpr int kPartFloats = 8192;

inline constexpr int kTurnstileWords = 1 + kLowRankMaxRank / kPartRows;

constexpr int low_rank_padded(int rank) {
  return (rank + 15) / 16 * 16;
}

// Parts of the contraction in which blocks make S that take `spare` places at most, where there are any.
inline int low_rank_parts(int64_t K, int padded, int64_t most, int64_t spare) {
  const int64_t parts = std::min<int64_t>({kMaxParts, K / kPartColumns, most, spare / (padded / kPartRows)});
  return static_cast<int>(std::max<int64_t>(1, parts));
}

}  // namespace peftkern
