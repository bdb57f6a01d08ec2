// The bottleneck adapter's kernels on Hopper: what they take, how a launch is cut. Pure functions, tested on the CPU.
#pragma once

#include <cstdint>

namespace peftkern {

inline constexpr int kAdapterWidth = 64;  // columns of the bottleneck, at most
inline constexpr int kAdapterChunk = 64;  // features side by side in shared memory
inline constexpr int kAdapterChunks = 8;  // of a block
inline constexpr int kAdapterFeatures = kAdapterChunk * kAdapterChunks;
inline constexpr int kAdapterMaxCluster = 16;  // blocks that share a tile of tokens: each has a slice of the features
inline constexpr int kAdapterTile = 32;        // tokens of a tile, at most
inline constexpr int kAdapterThreads = 384;
inline constexpr int kAdapterShared = 227 * 1024;
inline constexpr int64_t kAdapterMinHidden = 512, kAdapterMaxHidden = kAdapterFeatures * kAdapterMaxCluster;

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
         t.width <= kAdapterWidth && t.hidden >= kAdapterMinHidden && t.hidden <= kAdapterMaxHidden && t.M > 0 &&
         t.M <= kMost;
}

// Shared memory: slots hold a tile's features of a block, or a part of the weights on their way to registers; stages a
// tile's sums and activations.
inline constexpr int kAdapterBox = kAdapterTile * 128;
inline constexpr int kAdapterSlot = kAdapterChunks * kAdapterBox;
inline constexpr int kAdapterWeightSlots = 65536 / kAdapterSlot;  // that one weight fills
inline constexpr int kAdapterActivations = kAdapterTile * 128;
inline constexpr int kAdapterHalf = 576;  // 16 tokens' sums of 8 columns, and room that spreads them over the banks
inline constexpr int kAdapterSums = kAdapterTile / 16 * kAdapterHalf;  // of 8 columns, from one block

struct AdapterConfig {
  int cluster;        // blocks that share a tile: 2, 4, 8 or 16
  int groups;         // of 8 columns that a block owns, where it owns any
  int chunks;         // of 64 features that a block has of the matrix: up to 8
  int slots, stages;  // stages: even
  int tile;           // tokens of a tile
  int tiles, clusters;
};

struct AdapterLayout {
  int activations, received, up_bias, dh_sums, barriers, total;
};

constexpr AdapterLayout adapter_layout(const AdapterConfig& c) {
  AdapterLayout at{};
  at.activations = c.slots * kAdapterSlot;
  at.received = at.activations + c.stages * kAdapterActivations;
  at.up_bias = at.received + c.stages * c.cluster * c.groups * kAdapterSums;
  at.dh_sums = at.up_bias + kAdapterFeatures * 4;
  at.barriers = at.dh_sums + (c.groups == 1 ? 2 : c.groups) * 1024;
  at.total = at.barriers + (3 * c.slots + 3 * c.stages) * 8;
  return at;
}

// Two at least: blocks send to each other as a cluster does.
constexpr int adapter_cluster(int64_t hidden) {
  int cluster = 2;
  while (cluster * kAdapterFeatures < hidden) cluster *= 2;
  return cluster;
}

// clusters: as many as the device runs at once.
constexpr AdapterConfig adapter_config(int64_t M, int64_t hidden, int clusters) {
  AdapterConfig c{};
  c.cluster = adapter_cluster(hidden);
  c.groups = c.cluster >= 8 ? 1 : 8 / c.cluster;
  c.chunks = static_cast<int>(adapter_ceil(hidden, kAdapterChunk * c.cluster));
  c.stages = 4;
  c.slots = 16;
  while (adapter_layout(c).total > kAdapterShared) --c.slots;
  const int64_t rounds = adapter_ceil(M, int64_t{kAdapterTile} * clusters);
  c.tile = static_cast<int>(adapter_ceil(M, rounds * clusters));
  c.tiles = static_cast<int>(adapter_ceil(M, c.tile));
  c.clusters = adapter_min(c.tiles, clusters);
  return c;
}

// The gradients' kernel: jobs of 128 features of one gradient over a part of the tokens; a part takes every parts-th
// step.
inline constexpr int kGradientFeatures = 128, kGradientTokens = 128;  // of a step
inline constexpr int kGradientMaxParts = 16;
inline constexpr double kGradientPartCost = 0.01;  // of a part's sums, in rounds of one part

struct GradientConfig {
  int steps, parts, blocks;
};

// tiles: of features, of all gradients together. The parts whose rounds of jobs fill the device best.
constexpr GradientConfig gradient_config(int64_t M, int tiles, int multiprocessors) {
  GradientConfig c{static_cast<int>(adapter_ceil(M, kGradientTokens)), 1, 0};
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
