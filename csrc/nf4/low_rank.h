// The low-rank term of a LoRA layer as an NF4 matmul of few tokens takes it. Free of torch.
#pragma once

#include "common/float_type.h"

namespace peftkern {

// y += factor * S B^T, S = x A^T [M, rank] in x's dtype, B [N, rank]. S comes from the kernel before the matmul, its
// columns padded with zeros to a multiple of 16, or is made by small_m itself.
struct NF4LowRank {
  const float* parts;  // small_m: [part_count][M][padded], to be added up
  int part_count;
  void* S;  // small_m: [M, rank], where the sum goes
  // small_m that makes S: A [rank, K] on 16 bytes. A and B are float32 or x's dtype, and `fours`.
  const void* A;
  FloatType A_type;
  bool settled;       // no earlier kernel that may still be running writes A or B
  const void* whole;  // mid_m: [M][padded] in x's dtype
  const void* B;
  FloatType B_type;
  bool fours;  // B's rows can be read in aligned groups of four
  int rank, padded;
  float factor;
};

constexpr int low_rank_padded(int rank) {
  return (rank + 15) / 16 * 16;
}

}  // namespace peftkern
