// The bottleneck adapter's kernels on Hopper: what they take, how a launch is cut. Pure functions, tested on the CPU.
#pragma once

#include <cstdint>

namespace peftkern {

inline constexpr int kAdapterCluster = 8;    // blocks that share a tile of tokens: each has a slice of the features
inline constexpr int kAdapterChunk = 64;     // features of a step
inline constexpr int kAdapterThreads = 384;  // one producer and two consumer warpgroups
inline constexpr int kAdapterShared = 227 * 1024;
inline constexpr int kAdapterMaxSlots = 16;  // of a ring
inline constexpr int kAdapterMinTile = 32;   // of tokens, where there are as many
inline constexpr int64_t kAdapterMaxWidth = 128, kAdapterMinHidden = 512, kAdapterMaxHidden = 65536;
constexpr int64_t adapter_ceil(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int adapter_min(int a, int b) {
  return a < b ? a : b;
}

struct AdapterTraits {
  int64_t M, hidden, width;
  bool half;               // activations and residual in one 16-bit type; adapters in 16 or 32 bits
  bool aligned;            // every operand on 16 bytes
  int compute_capability;  // 10 * major + minor
};

constexpr bool adapter_covers(const AdapterTraits& t) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 4096;  // coordinates of the copy engine are 32-bit
  return t.compute_capability == 90 && t.half && t.aligned && t.hidden % 8 == 0 && t.width % 8 == 0 && t.width > 0 &&
         t.width <= kAdapterMaxWidth && t.hidden >= kAdapterMinHidden && t.hidden <= kAdapterMaxHidden && t.M > 0 &&
         t.M <= kMost;
}

// A block's two warpgroups are one team that shares a tile of up to 64 or 128 tokens, or two teams with a tile of up to
// 64 each: one multiplies while the other waits for the cluster's sums. Each block of the cluster has `chunks` chunks
// of the features. A team's lie in rings of slots in shared memory: x of `tokens` x 64, weights of width x 64. Where x
// stays, it is read once: the residual is added where it lies.
struct AdapterConfig {
  int tokens, teams;  // that a tile may have; of a block
  int tile;           // tokens of a tile
  int chunks, x_slots, w_slots;
  bool keeps_x;
  int tiles, clusters;
};

// Where things lie in shared memory, in bytes: the first three in a team's part, of `team` bytes.
struct AdapterLayout {
  int weights, received, activations, team, up_bias, barriers, total;
};

constexpr int adapter_barriers(const AdapterConfig& c) {  // of a team
  return 2 * (c.x_slots + c.w_slots) + 2;
}

constexpr AdapterLayout adapter_layout(int width, const AdapterConfig& c) {
  AdapterLayout at{};
  at.weights = c.x_slots * c.tokens * 128;
  at.received = at.weights + c.w_slots * width * 128;
  at.activations = at.received + width * 512 / c.teams;
  at.team = at.activations + c.tokens * width * 2;
  at.up_bias = c.teams * at.team;
  at.barriers = at.up_bias + c.chunks * kAdapterChunk * 4;
  at.total = at.barriers + c.teams * adapter_barriers(c) * 8;
  return at;
}

constexpr bool adapter_fits(int width, const AdapterConfig& c, int more_x = 0, int more_w = 0) {
  AdapterConfig more = c;
  more.x_slots += more_x;
  more.w_slots += more_w;
  return more.x_slots <= kAdapterMaxSlots && more.w_slots <= kAdapterMaxSlots &&
         adapter_layout(width, more).total <= kAdapterShared;
}

// Slots of the two rings; `width` 64 or 128. Both rings have two slots at least, and room for two tiles' at most.
constexpr AdapterConfig adapter_slots(int tokens, int teams, int width, int chunks, bool may_keep_x) {
  AdapterConfig c{tokens, teams, tokens, chunks, chunks < 2 ? 2 : chunks, teams == 2 ? 3 : 4, false, 0, 0};
  c.keeps_x = may_keep_x && adapter_fits(width, c);
  if (!c.keeps_x) c.x_slots = c.w_slots = 2;
  const int most_x = chunks < 2 ? 2 : 2 * chunks, most_w = 2 * most_x;
  const int x_slot = tokens * 128, w_slot = width * 128;
  while (true) {
    const bool more_x = c.x_slots < most_x && adapter_fits(width, c, 1, 0);
    const bool more_w = c.w_slots < most_w && adapter_fits(width, c, 0, 1);
    if (!more_x && !more_w) return c;
    const bool x_first = c.keeps_x || c.x_slots * x_slot <= c.w_slots * w_slot;
    if (more_x && (x_first || !more_w)) {
      ++c.x_slots;
    } else {
      ++c.w_slots;
    }
  }
}

// Tiles of eights of tokens, so that every round has about as many.
constexpr void adapter_tiles(int64_t M, int clusters, AdapterConfig& c) {
  const int64_t places = int64_t{clusters} * c.teams, rounds = adapter_ceil(adapter_ceil(M, c.tokens), places);
  const int64_t even = adapter_ceil(adapter_ceil(M, rounds * places), 8) * 8;
  c.tile = c.tokens;
  if (c.tokens == 64 && even < 64) c.tile = even < kAdapterMinTile ? kAdapterMinTile : static_cast<int>(even);
  c.tiles = static_cast<int>(adapter_ceil(M, c.tile));
  c.clusters = adapter_min(c.tiles, clusters);
}

// A round's time in that of a token of a cluster. Beside its tokens it has the exchange of the sums and the start of
// the rings, of which two teams hide most.
constexpr int64_t adapter_round_cost(const AdapterConfig& c) {
  const int again = c.keeps_x ? 0 : c.tile;
  return c.teams == 2 ? 2 * c.tile + 30 : c.tile + again + (c.tokens == 64 ? 40 : 82);
}

// 0: what takes least time.
struct AdapterShape {
  int tokens = 0, teams = 0;
};

// clusters: as many as the device runs at once.
constexpr AdapterConfig adapter_config(int64_t M, int64_t hidden, int width, bool own_residual, int clusters,
                                       const AdapterShape& only = {}) {
  constexpr AdapterShape kShapes[] = {{64, 1}, {64, 2}, {128, 1}};
  const int chunks = static_cast<int>(adapter_ceil(hidden, kAdapterChunk * kAdapterCluster));
  AdapterConfig best{};
  int64_t best_cost = 0;
  for (const AdapterShape& shape : kShapes) {
    if (only.tokens != 0 && shape.tokens != only.tokens) continue;
    if (only.teams != 0 && shape.teams != only.teams) continue;
    AdapterConfig c = adapter_slots(shape.tokens, shape.teams, width, chunks, !own_residual);
    if (c.teams == 2 && (width != 64 || !c.keeps_x)) continue;
    adapter_tiles(M, clusters, c);
    const int64_t rounds = adapter_ceil(c.tiles, int64_t{c.clusters} * c.teams);
    const int64_t cost = rounds * adapter_round_cost(c);
    if (best.tokens == 0 || cost < best_cost) {
      best = c;
      best_cost = cost;
    }
  }
  return best;
}

// The gradients' kernel: jobs of 128 features of one gradient over a part of the tokens; a part takes every parts-th
// step.
inline constexpr int kGradientFeatures = 128;
inline constexpr int kGradientMaxParts = 16;
inline constexpr double kGradientPartCost = 0.01;  // of a part's sums, in rounds of one part

struct GradientConfig {
  int steps, parts, blocks;
};

// tokens: of a step. tiles: of features, of all gradients together. The parts whose rounds of jobs fill the device
// best.
constexpr GradientConfig gradient_config(int64_t M, int tokens, int tiles, int multiprocessors) {
  GradientConfig c{static_cast<int>(adapter_ceil(M, tokens)), 1, 0};
  double best = 0;
  for (int parts = 1; parts <= adapter_min(c.steps, kGradientMaxParts); ++parts) {
    const double rounds = static_cast<double>(adapter_ceil(int64_t{parts} * tiles, multiprocessors)) / parts;
    const double cost = rounds + kGradientPartCost * parts;
    if (parts == 1 || cost < best) {
      best = cost;
      c.parts = parts;
    }
  }
  c.blocks = adapter_min(c.parts * tiles, multiprocessors);
  return c;
}

}  // namespace peftkern
