// Tiling of the NF4 matmul on wgmma, and the choice among its kernels: pure functions, tested on the CPU.
#pragma once

#include <cstdint>

namespace peftkern {

inline constexpr int kTileOuts = 128;     // weight rows (forward) or columns (dX) per tile: 64 per consumer warpgroup
inline constexpr int kTileDepth = 64;     // of the contraction per step: no finer than a scale
inline constexpr int kTileChunk = 4;      // steps whose weights are loaded together
inline constexpr int kTileBatch = 32;     // tokens written at a time
inline constexpr int kTileThreads = 384;  // one producer and two consumer warpgroups

// How a problem is cut into tiles. `whole` of them are made by one block each, in rounds over the multiprocessors; the
// contraction of the rest, too few for another round, is split over clusters of `split` blocks, in a second launch.
struct TileConfig {
  int tokens;  // per tile: 64, 128 or 256
  int token_tiles, out_tiles;
  int whole;
  int split;
  int tiles() const { return token_tiles * out_tiles; }
};

// Steps of tokens and chunks of weights in shared memory.
constexpr int tile_token_stages(int tokens) {
  return tokens == 64 ? 8 : tokens == 128 ? 6 : 4;
}

constexpr int tile_weight_stages(int tokens) {
  return tokens == 256 ? 2 : 3;
}

constexpr int64_t tile_ceil(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Clusters that run at once. Those of 3 and more leave multiprocessors of a GPC idle: shares as an H100 reports them.
constexpr int tile_clusters(int split, int multiprocessors) {
  switch (split) {
    case 1:
      return multiprocessors;
    case 2:
      return multiprocessors / 2;
    case 3:
      return multiprocessors * 39 / 132;
    case 4:
      return multiprocessors * 30 / 132;
    default:
      return multiprocessors * 15 / 132;
  }
}

// Estimated cycles, from times measured inside the kernel: of a step, of writing a tile, of adding up a cluster's parts
// and of a launch until its first weights are there.
constexpr int tile_step_cycles(int tokens) {
  return tokens == 64 ? 720 : tokens == 128 ? 870 : 1100;
}
constexpr int tile_write_cycles(int tokens) {
  return 600 + 10 * tokens;
}
constexpr int tile_reduce_cycles(int tokens, int split) {
  return 2000 + tokens * (10 + 6 * split);
}
inline constexpr int kTileStartCycles = 7000;

inline int64_t tile_cycles(const TileConfig& c, int64_t steps, int multiprocessors) {
  const int64_t step = tile_step_cycles(c.tokens), write = tile_write_cycles(c.tokens);
  const int64_t rest = c.tiles() - c.whole;
  int64_t cycles = tile_ceil(c.whole, multiprocessors) * (steps * step + write);
  if (c.whole > 0) cycles += kTileStartCycles;
  if (rest > 0) {
    const int64_t share = tile_ceil(tile_ceil(steps, kTileChunk), c.split) * kTileChunk;
    cycles += tile_ceil(rest, tile_clusters(c.split, multiprocessors)) *
              (kTileStartCycles + share * step + tile_reduce_cycles(c.tokens, c.split) + write);
  }
  return cycles;
}

inline TileConfig tile_config(int64_t M, int64_t outs, int64_t contraction, int multiprocessors) {
  const int64_t steps = tile_ceil(contraction, kTileDepth);
  TileConfig best{};
  int64_t best_cycles = 0;
  for (const int tokens : {64, 128, 256}) {
    TileConfig c{tokens, static_cast<int>(tile_ceil(M, tokens)), static_cast<int>(tile_ceil(outs, kTileOuts)), 0, 1};
    const int rounds = c.tiles() / multiprocessors * multiprocessors;
    for (const int split : {1, 2, 3, 4, 8}) {
      // A cluster's blocks each take a batch of tokens of the tile, and a chunk of the contraction.
      if (split > tokens / kTileBatch || split > tile_ceil(steps, kTileChunk)) continue;
      if (tile_clusters(split, multiprocessors) == 0) continue;
      c.split = split;
      c.whole = split == 1 ? c.tiles() : rounds;
      const int64_t cycles = tile_cycles(c, steps, multiprocessors);
      if (best_cycles != 0 && cycles >= best_cycles) continue;
      best_cycles = cycles;
      best = c;
    }
  }
  return best;
}

}  // namespace peftkern
