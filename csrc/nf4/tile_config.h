// Tiling of the NF4 matmul on wgmma, and the choice among its kernels: pure functions, tested on the CPU.
#pragma once

#include <cstdint>

namespace peftkern {

inline constexpr int kTileOuts = 128;     // weight rows (forward) or columns (dX) per tile: 64 per consumer warpgroup
inline constexpr int kTileDepth = 64;     // of the contraction per step: no finer than a scale
inline constexpr int kTileChunk = 4;      // steps whose weights are loaded together
inline constexpr int kTileBatch = 32;     // tokens written at a time
inline constexpr int kTileThreads = 384;  // one producer and two consumer warpgroups
inline constexpr int kTileMaxSplit = 8;

// Tokens per tile, the blocks of a cluster that share a tile's contraction, and the number of tiles each way.
struct TileConfig {
  int tokens;  // 64, 128 or 256
  int split;
  int64_t token_tiles, out_tiles;
  int64_t blocks;
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

// Estimated time in tensor-core cycles. One step of a tile takes 4 cycles a token; a tile's epilogue and a block's
// start are counted in cycles seen on the card.
inline int64_t tile_cycles(int64_t token_tiles, int64_t out_tiles, int64_t steps, int tokens, int split,
                           int multiprocessors) {
  const int64_t tiles = token_tiles * out_tiles;
  const int64_t slots = multiprocessors / split;
  const int64_t rounds = tile_ceil(tiles, slots < 1 ? 1 : slots);
  // Short steps do not fill the tensor cores: decoding takes its time whatever the number of tokens.
  const int64_t step = tokens == 64 ? 400 : 4 * tokens + 40;
  const int64_t epilogue = 10 * tokens + (split > 1 ? 1500 + 6 * tokens : 0);
  const int64_t start = 3000;
  const int64_t per_tile = tile_ceil(steps, split) * step + epilogue;
  return split > 1 ? rounds * (per_tile + start) : rounds * per_tile + start;
}

inline TileConfig tile_config(int64_t M, int64_t outs, int64_t contraction, int multiprocessors) {
  const int64_t steps = tile_ceil(contraction, kTileDepth), out_tiles = tile_ceil(outs, kTileOuts);
  TileConfig best{};
  int64_t best_cycles = 0;
  for (const int tokens : {64, 128, 256}) {
    for (int split = 1; split <= kTileMaxSplit && split <= tile_ceil(steps, kTileChunk); ++split) {
      if (split > tokens / kTileBatch) continue;  // a cluster's blocks share the tile's batches
      const int64_t token_tiles = tile_ceil(M, tokens);
      const int64_t cycles = tile_cycles(token_tiles, out_tiles, steps, tokens, split, multiprocessors);
      if (best_cycles != 0 && cycles >= best_cycles) continue;
      const int64_t tiles = token_tiles * out_tiles;
      best_cycles = cycles;
      best = {tokens, split, token_tiles, out_tiles,
              split > 1 ? tiles * split : (tiles < multiprocessors ? tiles : multiprocessors)};
    }
  }
  return best;
}

}  // namespace peftkern
