// Shape and launch configuration of S = x A^T for few tokens: pure functions, tested on the CPU through peftkern._host.
// The kernel (lora_matmul/project.cuh) says what the pieces are.
#pragma once

#include <algorithm>
#include <cstdint>

#include "nf4/low_rank.h"

namespace peftkern {

inline constexpr int kProjectMaxTokens = 64, kProjectMaxRank = 256;
inline constexpr int kProjectRows = 16, kProjectTokens = 16;  // of A and of x in a block
inline constexpr int kProjectColumns = 64;                    // a warp takes at a time
inline constexpr int kProjectWarps = 4;     // few: a block finds room beside those of the matmuls before and after
inline constexpr int kProjectMaxParts = 8;  // of the contraction, and as many blocks in a cluster
// What a block of the matmul reads of S in parts: as much as its threads have in flight at once.
inline constexpr int kProjectPartFloats = 8192;

struct ProjectConfig {
  int padded;       // columns of S, with zeros
  int parts;        // of the contraction, a block each
  int row_tiles;    // of A
  int token_tiles;  // of x
};

// whole: the blocks of a cluster add up their parts; else the matmul does.
inline ProjectConfig lora_project_config(int64_t M, int64_t K, int rank, bool whole) {
  ProjectConfig c{low_rank_padded(rank), kProjectMaxParts, 0, 0};
  c.row_tiles = c.padded / kProjectRows;
  c.token_tiles = static_cast<int>((M + kProjectTokens - 1) / kProjectTokens);
  if (!whole) {
    const int64_t most = std::min(K / kProjectColumns, kProjectPartFloats / (M * c.padded));
    c.parts = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(kProjectMaxParts, most)));
  }
  return c;
}

// Of the workspace: the parts in float32, or S with its padding in 16 bits.
inline int64_t project_bytes(int64_t M, const ProjectConfig& c, bool whole) {
  return whole ? int64_t{2} * c.token_tiles * kProjectTokens * c.padded : 4 * c.parts * M * c.padded;
}

}  // namespace peftkern
