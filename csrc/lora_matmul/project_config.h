// Shape and launch configuration of S = x A^T for up to 64 tokens: pure functions, tested on the CPU through
// peftkern._host. The kernel (lora_matmul/project.cuh) says what the pieces are.
#pragma once

#include <cstdint>

#include "nf4/low_rank.h"

namespace peftkern {

inline constexpr int kProjectMaxTokens = 64, kProjectMaxRank = 256;
inline constexpr int kProjectRows = 16, kProjectTokens = 16;  // of A and of x in a block
inline constexpr int kProjectColumns = 64;                    // a warp takes at a time
inline constexpr int kProjectWarps = 8;
inline constexpr int kProjectParts = 8;  // of the contraction: the blocks of a cluster

struct ProjectConfig {
  int padded;       // columns of S, with zeros
  int row_tiles;    // of A
  int token_tiles;  // of x
};

inline ProjectConfig lora_project_config(int64_t M, int rank) {
  const int padded = low_rank_padded(rank);
  return {padded, padded / kProjectRows, static_cast<int>((M + kProjectTokens - 1) / kProjectTokens)};
}

// Of S with its padding, in 16 bits.
inline int64_t project_bytes(const ProjectConfig& c) {
  return int64_t{2} * c.token_tiles * kProjectTokens * c.padded;
}

}  // namespace peftkern
