// The bottleneck adapter's kernels on Hopper: what they take, how a launch is cut. Pure functions, tested on the CPU.
#pragma once

#include <cstdint>

namespace peftkern {

inline constexpr int kAdapterCluster = 8;    // blocks that share a tile of tokens: each has a slice of the features
inline constexpr int kAdapterChunk = 64;     // features of a step
inline constexpr int kAdapterThreads = 384;  // one producer and two consumer warpgroups
inline constexpr int kAdapterShared = 227 * 1024;
inline constexpr int kAdapterMaxSlots = 16;   // of a ring
inline constexpr int kAdapterMinWeights = 4;  // slots of the weights' ring beside x that stays
inline constexpr int64_t kAdapterMaxWidth = 128, kAdapterMinHidden = 512, kAdapterMaxHidden = 65536;
// What a tile costs beside its tokens, in tokens: the exchange of the sums and the start of the rings.
inline constexpr int kAdapterTileCost = 32;

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

// A tile is kTokens = 64 or 128 tokens. Each block of its cluster has `chunks` chunks of the features. They lie in
// rings of slots in shared memory: x of kTokens x 64, weights of width x 64. Where x stays, it is read once: the
// residual is added where it lies.
struct AdapterConfig {
  int tokens, chunks, x_slots, w_slots;
  bool keeps_x;
  int tiles, clusters;
};

// Where things lie in shared memory, in bytes.
struct AdapterLayout {
  int weights, received, activations, up_bias, barriers, total;
};

constexpr AdapterLayout adapter_layout(int width, const AdapterConfig& c) {
  AdapterLayout at{};
  at.weights = c.x_slots * c.tokens * 128;
  at.received = at.weights + c.w_slots * width * 128;
  at.activations = at.received + width * 512;
  at.up_bias = at.activations + c.tokens * width * 2;
  at.barriers = at.up_bias + c.chunks * kAdapterChunk * 4;
  at.total = at.barriers + (2 * (c.x_slots + c.w_slots) + 2) * 8;
  return at;
}

// Slots of the two rings for tiles of `tokens`; `width` 64 or 128. Both rings have two slots at least.
constexpr AdapterConfig adapter_slots(int tokens, int width, int chunks, bool may_keep_x) {
  AdapterConfig c{tokens, chunks, 0, 0, false, 0, 0};
  const int barriers = (4 * kAdapterMaxSlots + 2) * 8;
  const int left = kAdapterShared - adapter_layout(width, c).total - barriers;
  const int x_slot = tokens * 128, w_slot = width * 128, most = adapter_min(2 * chunks, kAdapterMaxSlots);
  c.keeps_x = may_keep_x && chunks * x_slot + kAdapterMinWeights * w_slot <= left && chunks <= kAdapterMaxSlots;
  c.x_slots = c.keeps_x ? (left - kAdapterMinWeights * w_slot) / x_slot : left / 2 / x_slot;
  c.x_slots = adapter_min(c.x_slots, most < 2 ? 2 : most);
  c.w_slots = adapter_min((left - c.x_slots * x_slot) / w_slot, most < 2 ? 2 : most);
  return c;
}

// clusters: as many as the device runs at once. only_tokens: of a tile, 0 for what takes least time.
constexpr AdapterConfig adapter_config(int64_t M, int64_t hidden, int width, bool own_residual, int clusters,
                                       int only_tokens = 0) {
  const int chunks = static_cast<int>(adapter_ceil(hidden, kAdapterChunk * kAdapterCluster));
  AdapterConfig best{};
  int64_t best_cost = 0;
  for (int tokens = 64; tokens <= 128; tokens += 64) {
    if (only_tokens != 0 && tokens != only_tokens) continue;
    AdapterConfig c = adapter_slots(tokens, width, chunks, !own_residual);
    c.tiles = static_cast<int>(adapter_ceil(M, tokens));
    c.clusters = adapter_min(c.tiles, clusters);
    const int64_t cost = adapter_ceil(c.tiles, c.clusters) * (tokens + kAdapterTileCost);
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
