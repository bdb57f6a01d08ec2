// The low-rank term of a LoRA layer as an NF4 matmul of few tokens takes it. Free of torch.
#pragma once

#include <cstdint>

#include "common/float_type.h"

namespace peftkern {

// y += factor * S B^T, S = x A^T [M, rank] in x's dtype, A [rank, K], B [N, rank]. S's columns are padded with zeros to
// a multiple of 16. small_m makes S itself, in parts of the contraction; for mid_m it comes from the kernel before.
struct NF4LowRank {
  const void* A;  // small_m
  FloatType A_type;
  float* parts;         // small_m: room for [kMaxParts][M][padded]
  uint32_t* turnstile;  // small_m: 0 before the launch and after it, and no other launch's meanwhile
  void* S;              // small_m: [M, rank], where the sum of the parts goes
  const void* whole;    // mid_m: [M][padded] in x's dtype
  const void* B;
  FloatType B_type;
  bool fours;  // B's rows can be read in aligned groups of four
  int rank, padded;
  float factor;
};

inline constexpr int kPartRows = 16, kPartColumns = 64;  // of A: of a part, and what a warp takes of it at a time
inline constexpr int kMaxParts = 8;                      // of the contraction
// What a block reads of S in parts: as much as its threads have in flight at once.
inline constexpr int kPartFloats = 8192;

constexpr int low_rank_padded(int rank) {
  return (rank + 15) / 16 * 16;
}

}  // namespace peftkern
