// Shapes of the NF4 matmul for 17 to 128 tokens and the choice among them: pure functions, tested on the CPU through
// peftkern._host. The kernel (nf4/mid_m.cuh) says what the pieces are.
#pragma once

#include <algorithm>
#include <cstdint>

namespace peftkern {

inline constexpr int kMidMinTokens = 17, kMidMaxTokens = 128;
inline constexpr int kMidDepth = 64;  // of the contraction per step: no finer than a scale
inline constexpr int kMidChunk =
    4;  // steps whose weights are loaded together; steps of tokens in a round of their ring
inline constexpr int kMidMaxSplit = 4;

// What a kernel is compiled for.
struct MidMShape {
  int tokens;   // of a tile
  int rows;     // of a tile at most
  int stages;   // chunks of weights in their ring
  int rounds;   // chunks of tokens in their ring
  int slices;   // warpgroups that share 64 rows, each taking every slices-th step
  int buffers;  // pieces of 32 columns a consumer has under way in the tensor cores
  int blocks;   // on a multiprocessor

  constexpr bool operator==(const MidMShape& o) const {
    return tokens == o.tokens && rows == o.rows && stages == o.stages && rounds == o.rounds && slices == o.slices &&
           buffers == o.buffers && blocks == o.blocks;
  }
  constexpr int groups() const { return (rows + 63) / 64; }  // of 64 rows
  constexpr int consumers() const { return groups() * slices * 128; }
  constexpr int threads() const { return 128 + consumers(); }
};

// Tall tiles read the tokens least often. The low ones are for short launches: two blocks fit on a multiprocessor, so
// that the next launch gets ready beside this one.
inline constexpr MidMShape kMidM32{32, 256, 3, 2, 1, 2, 1};
inline constexpr MidMShape kMidM64{64, 256, 3, 2, 1, 2, 1};
inline constexpr MidMShape kMidM128{128, 256, 3, 1, 1, 1, 1};
inline constexpr MidMShape kMidM32Low{32, 64, 4, 2, 2, 2, 2};
inline constexpr MidMShape kMidM64Low{64, 64, 4, 1, 2, 2, 2};

struct MidMConfig {
  MidMShape shape;
  int rows;  // of a tile: a multiple of 16
  int token_tiles, out_tiles;
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

// Estimated cycles of a step where `blocks` tiles share a multiprocessor: those of shared memory, 128 bytes each, for
// the products, the lookups and what the copy engine brings, or what a warp takes from one step to the next.
constexpr int64_t mid_m_step_cycles(const MidMShape& s, int rows, int blocks) {
  const int shared = blocks * (s.tokens * static_cast<int>(mid_m_ceil(rows, 64) + 1) + 2 * rows);
  return std::max<int64_t>(500 / s.slices, shared * 9 / 8);
}

// Estimated cycles from an earlier kernel's end until the first product, and from the last one on.
inline constexpr int64_t kMidStartCycles = 5000, kMidWriteCycles = 1000;
constexpr int64_t mid_m_exchange_cycles(const MidMShape& s, int rows, int split) {
  return split == 1 ? 0 : 1200 + int64_t{s.tokens} * rows * 4 * (split - 1) / split / 32;
}

inline MidMConfig nf4_mid_m_config(int64_t M, int64_t N, int64_t K, int multiprocessors) {
  const int64_t chunks = mid_m_ceil(K, kMidChunk * kMidDepth);
  MidMConfig best{};
  int64_t best_cycles = 0;
  for (const MidMShape& shape : {kMidM32, kMidM64, kMidM128, kMidM32Low, kMidM64Low}) {
    const int64_t token_tiles = mid_m_ceil(M, shape.tokens);
    for (int split = 1; split <= std::min<int64_t>(kMidMaxSplit, chunks); ++split) {
      const int64_t clusters = mid_m_clusters(split, multiprocessors);
      if (clusters == 0) continue;
      for (int blocks = 1; blocks <= shape.blocks; ++blocks) {
        const int64_t places = clusters * blocks;  // of tiles at once
        const int64_t rounds = mid_m_ceil(N * token_tiles, places * shape.rows);
        const int64_t tiles = std::max<int64_t>(rounds * places / token_tiles, 1);
        const int rows = static_cast<int>(std::min<int64_t>(mid_m_ceil(mid_m_ceil(N, tiles), 16) * 16, shape.rows));
        const int64_t out_tiles = mid_m_ceil(N, rows), turns = mid_m_ceil(out_tiles * token_tiles, places);
        const int64_t steps = mid_m_ceil(chunks, split) * kMidChunk;
        const int64_t cycles = kMidStartCycles + turns * (steps * mid_m_step_cycles(shape, rows, blocks) +
                                                          mid_m_exchange_cycles(shape, rows, split) + kMidWriteCycles);
        if (best_cycles != 0 && cycles >= best_cycles) continue;
        best_cycles = cycles;
        best = {shape, rows, static_cast<int>(token_tiles), static_cast<int>(out_tiles), split};
      }
    }
  }
  return best;
}

}  // namespace peftkern
