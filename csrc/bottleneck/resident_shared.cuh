// What the roles of the resident kernel share.
#pragma once

#include "bottleneck/adapter_shared.cuh"

namespace peftkern {

inline constexpr int kResidentTokens = 32;     // of a tile at most
inline constexpr int kResidentChunks = 8;      // of 64 features that a block has
inline constexpr int kResidentFeatures = 512;  // of a block
inline constexpr int kResidentBox = kResidentTokens * 128;
inline constexpr int kResidentSlot = kResidentChunks * kResidentBox;
inline constexpr int kResidentWeightSlots = 65536 / kResidentSlot;  // that one weight fills
inline constexpr int kResidentActivations = kResidentTokens * 128;
inline constexpr int kResidentHalf = 576;  // 16 tokens' sums of 8 columns, and room that spreads them over the banks
inline constexpr int kResidentSums = kResidentTokens / 16 * kResidentHalf;  // of 8 columns, from one block

struct ResidentConfig {
  int cluster;        // blocks that share a tile: 1, 2, 4, 8 or 16
  int chunks;         // of 64 features that a block has of the matrix: up to 8
  int slots, stages;  // stages: even
  int tile;           // tokens of a tile
  int tiles, clusters;
};

struct ResidentLayout {
  int activations, received, up_bias, dh_sums, barriers, total;
};

constexpr int resident_groups(int cluster) {  // of 8 columns that a block owns, where it owns any
  return cluster >= 8 ? 1 : 8 / cluster;
}

constexpr ResidentLayout resident_layout(const ResidentConfig& c) {
  ResidentLayout at{};
  at.activations = c.slots * kResidentSlot;
  at.received = at.activations + c.stages * kResidentActivations;
  at.up_bias = at.received + c.stages * c.cluster * resident_groups(c.cluster) * kResidentSums;
  at.dh_sums = at.up_bias + kResidentFeatures * 4;
  at.barriers = at.dh_sums + (c.cluster >= 8 ? 2 : resident_groups(c.cluster)) * 1024;
  at.total = at.barriers + (3 * c.slots + 3 * c.stages) * 8;
  return at;
}

struct ResidentProblem : AdapterProblem {
  ResidentConfig config;
  ResidentLayout at;
};

struct ResidentShared {
  const ResidentProblem& p;
  uint8_t* base;
  uint64_t *full, *empty, *written;         // of slots
  uint64_t *received, *activated, *used;    // of stages
  int rank, first_tile;

  __device__ __forceinline__ ResidentShared(uint8_t* memory, const ResidentProblem& p)
      : p(p),
        base(memory),
        full(reinterpret_cast<uint64_t*>(memory + p.at.barriers)),
        empty(full + p.config.slots),
        written(empty + p.config.slots),
        received(written + p.config.slots),
        activated(received + p.config.stages),
        used(activated + p.config.stages),
        rank(static_cast<int>(cluster_rank())),
        first_tile(static_cast<int>(blockIdx.x) / p.config.cluster) {}

  __device__ __forceinline__ uint8_t* slot(int i) const { return base + i * kResidentSlot; }
  __device__ __forceinline__ uint8_t* activations(int stage) const {
    return base + p.at.activations + stage * kResidentActivations;
  }
  // From a block of the cluster, for the group-th 8 columns that the receiver owns.
  __device__ __forceinline__ float* sums(int stage, int source, int group) const {
    const int groups = resident_groups(p.config.cluster);
    const int place = (stage * p.config.cluster + source) * groups + group;
    return reinterpret_cast<float*>(base + p.at.received + place * kResidentSums);
  }
  __device__ __forceinline__ float* up_bias() const { return reinterpret_cast<float*>(base + p.at.up_bias); }

  // The first feature of a chunk; beyond all of them where the block has fewer chunks.
  __device__ __forceinline__ int feature(int chunk) const {
    return chunk < p.config.chunks ? (rank * p.config.chunks + chunk) * kAdapterChunk : 1 << 24;
  }

  __device__ __forceinline__ void expect_sums(int stage) const {
    barrier_arrive_expect(received + stage,
                          p.config.cluster * resident_groups(p.config.cluster) * 8 * kResidentTokens * 4);
  }
  __device__ __forceinline__ void expect_activations(int stage) const {
    barrier_arrive_expect(activated + stage, kResidentActivations);
  }

  __device__ __forceinline__ void init() const {
    for (int i = 0; i < p.config.slots; ++i) {
      barrier_init(full + i, 1);
      barrier_init(empty + i, 1);
      barrier_init(written + i, 4);
    }
    for (int i = 0; i < p.config.stages; ++i) {
      barrier_init(received + i, 1);
      barrier_init(activated + i, 1);
      barrier_init(used + i, 4);
    }
    barrier_init_fence();
    for (int i = 0; i < p.config.stages; ++i) {
      expect_sums(i);
      expect_activations(i);
    }
  }
};

}  // namespace peftkern
