// Shapes of the NF4 matmul for 17 to 128 tokens and the choice among them: pure functions, tested on the CPU through
// peftkern._host. The kernel (nf4/mid_m.cuh) says what the pieces are.
#pragma once

#include <algorithm>
#include <cstdint>

#include "nf4/low_rank.h"

namespace peftkern {

inline constexpr int kMidMinTokens = 17, kMidMaxTokens = 128;
inline constexpr int kMidLowRankMaxTokens = 64;  // with the low-rank term of a LoRA layer
inline constexpr int kMidDepth = 64;             // of the contraction per step: no finer than a scale
inline constexpr int kMidChunk = 4;  // steps of weights loaded together, and of tokens in a round of their ring
inline constexpr int kMidMaxSplit = 4;

// What a kernel is compiled for.
struct MidMShape {
  int tokens;   // at most
  int rows;     // of a tile at most
  int stages;   // chunks of weights in their ring
  int rounds;   // chunks of tokens in their ring
  int slices;   // warpgroups that share 64 rows, each taking every slices-th step
  int buffers;  // pieces of 32 columns a consumer has under way in the tensor cores
  int blocks;   // on a multiprocessor
  bool early;   // a settled weight is read beside the end of the earlier kernels

  constexpr int groups() const { return (rows + 63) / 64; }  // of 64 rows
  constexpr int consumers() const { return groups() * slices * 128; }
  constexpr int threads() const { return 128 + consumers(); }
};

// Where two blocks fit on a multiprocessor, the next launch gets ready beside this one. The low tiles are for launches
// so short that blocks which come early take places unevenly.
inline constexpr MidMShape kMidM32Low{32, 64, 4, 2, 2, 2, 2, false};
inline constexpr MidMShape kMidM64Low{64, 64, 4, 1, 2, 2, 2, false};
inline constexpr MidMShape kMidM32{32, 128, 3, 1, 1, 2, 2, true};
inline constexpr MidMShape kMidM64{64, 128, 2, 1, 1, 2, 2, true};
inline constexpr MidMShape kMidM128{128, 192, 3, 1, 1, 2, 1, true};
inline constexpr MidMShape kMidM128High{128, 256, 3, 1, 1, 1, 1, true};

struct MidMConfig {
  const MidMShape* shape;
  int rows;  // of a tile, which has all tokens: a multiple of 16
  int tiles;
  int split;  // blocks of a cluster, which share a tile's contraction
};

constexpr int64_t mid_m_ceil(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Clusters of one block a multiprocessor that run at once. Those of 3 and more leave multiprocessors of a GPC idle:
// shares as an H100 reports them.
constexpr int mid_m_clusters(int split, int multiprocessors) {
  return split == 1   ? multiprocessors
         : split == 2 ? multiprocessors / 2
         : split == 3 ? multiprocessors * 39 / 132
                      : multiprocessors * 30 / 132;
}

// Estimated cycles, fitted to an H100's times. A step where `blocks` tiles share a multiprocessor takes what a warp
// needs from one step to the next, or the tensor cores for the products, or shared memory, 128 bytes a cycle, for the
// products, the lookups and what the copy engine brings.
constexpr int64_t mid_m_step_cycles(const MidMShape& s, int rows, int blocks) {
  const int groups = static_cast<int>(mid_m_ceil(rows, 64));
  const int warp = 750 / s.slices;
  const int tensor_cores = blocks * 2 * s.tokens * groups * 10 / 7;
  const int shared = 120 + blocks * (s.tokens * (groups + 1) + 2 * rows) * 6 / 5;
  return std::max({warp, tensor_cores, shared});
}

// From an earlier kernel's end until the first product, and from the last one on.
inline constexpr int64_t kMidStartCycles = 5000, kMidWriteCycles = 1000;
constexpr int64_t mid_m_exchange_cycles(const MidMShape& s, int rows, int split) {
  return split == 1 ? 0 : 1000 + int64_t{s.tokens} * rows * 4 * (split - 1) / split / 8;
}

inline MidMConfig nf4_mid_m_config(int64_t M, int64_t N, int64_t K, int multiprocessors) {
  const int64_t chunks = mid_m_ceil(K, kMidChunk * kMidDepth);
  MidMConfig best{};
  int64_t best_cycles = 0;
  for (const MidMShape* shape : {&kMidM32Low, &kMidM64Low, &kMidM32, &kMidM64, &kMidM128, &kMidM128High}) {
    if (M > shape->tokens || (M <= 64 && shape->tokens > 64)) continue;
    for (int split = 1; split <= std::min<int64_t>(kMidMaxSplit, chunks); ++split) {
      const int64_t clusters = mid_m_clusters(split, multiprocessors);
      if (clusters == 0) continue;
      for (int blocks = 1; blocks <= shape->blocks; ++blocks) {
        const int64_t places = clusters * blocks;  // of tiles at once
        const int64_t whole_rounds = mid_m_ceil(N, places * shape->rows) * places;
        const int rows = static_cast<int>(mid_m_ceil(mid_m_ceil(N, whole_rounds), 16) * 16);
        const int64_t tiles = mid_m_ceil(N, rows), turns = mid_m_ceil(tiles, places);
        const int64_t steps = mid_m_ceil(chunks, split) * kMidChunk;
        const int64_t cycles = kMidStartCycles + turns * (steps * mid_m_step_cycles(*shape, rows, blocks) +
                                                          mid_m_exchange_cycles(*shape, rows, split) + kMidWriteCycles);
        if (best_cycles != 0 && cycles >= best_cycles) continue;
        best_cycles = cycles;
        best = {shape, rows, static_cast<int>(tiles), split};
      }
    }
  }
  return best;
}

// In how many parts blocks before the others make S of a low-rank term. Where each of them has a multiprocessor, as
// many of the next launch fit beside them, which is worth more than further parts. Not if one would make a part of many
// tokens out of the whole contraction.
inline int nf4_mid_m_parts(const MidMConfig& c, int64_t K, int padded, int multiprocessors) {
  const int blocks = c.tiles * c.split, shared = std::max(0, multiprocessors * c.shape->blocks - blocks);
  if (blocks > multiprocessors) return low_rank_parts(K, padded, kMaxParts, shared);
  const int parts = low_rank_parts(K, padded, kMaxParts, multiprocessors - blocks);
  return parts == 1 && c.shape->tokens > 32 ? low_rank_parts(K, padded, kMaxParts / 2, shared) : parts;
}

}  // namespace peftkern
