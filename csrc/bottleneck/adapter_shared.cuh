// What the roles of the adapter's kernel share: the problem and the places in shared memory.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "bottleneck/activation.cuh"
#include "bottleneck/config.h"
#include "common/hopper.cuh"
#include "gemm/gemm_shared.cuh"

namespace peftkern {

struct AdapterMaps {
  CUtensorMap x, skip, out;  // boxes of 64 features x a tile's tokens; of out, those of a warpgroup
  CUtensorMap down, up;      // of down_weight 64 features x width, of up_weight 64 columns x 64 features
};

// Backward, x is dy, and the weights change places: h, dh and dx stand where a's argument, a and y do.
struct AdapterProblem {
  AdapterConfig config;
  AdapterLayout at;
  int tokens, features, width;
  int box_tokens;                   // of a box of x: fewer than a tile's if there are no more
  bool own_skip;                    // the residual is not x
  bool adds_skip;                   // to out
  bool writes;                      // out
  const void *down_bias, *up_bias;  // or null
  FloatType down_bias_type, up_bias_type;
  void* h;            // [tokens, width]: forward written, backward read
  void *dh, *a;       // [tokens, width]: backward written
  float factor;       // of the second product; backward of the first
  float bias_factor;  // of up_bias
  Activation activation;
  const int64_t* seed;  // of dropout; null: none
  uint32_t threshold;
  float* dh_sums;  // over the tokens that a block has of a warpgroup's: [row][kWidth]; null: not wanted
  int* zeros;      // for the kernel after this one
  int zero_count;
};

// A position in a ring of buffers, and the parity of its barriers.
struct SlotRing {
  int slots, slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ explicit SlotRing(int slots) : slots(slots) {}
  __device__ __forceinline__ void advance() {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// What a team has of the block's shared memory, and its tiles.
template <int kTokens, int kTeams, int kWidth>
struct AdapterShared {
  static_assert(kTeams == 1 || kTokens == 64);
  static constexpr int kXSlot = kTokens * 128, kWSlot = kWidth * 128;
  static constexpr int kGroups = kTokens / 64;        // of 64 tokens
  static constexpr int kWarpgroups = 2 / kTeams;      // of a team
  static constexpr int kThreads = 128 * kWarpgroups;  // that multiply

  uint8_t *base, *up_bias;
  const AdapterLayout& at;
  uint64_t *x_full, *x_empty, *w_full, *w_empty, *received, *activated;
  int team, rank, first_feature, first_tile, tile_stride;

  __device__ __forceinline__ AdapterShared(uint8_t* memory, const AdapterProblem& p, int team)
      : base(memory + team * p.at.team),
        up_bias(memory + p.at.up_bias),
        at(p.at),
        x_full(reinterpret_cast<uint64_t*>(memory + p.at.barriers) + team * adapter_barriers(p.config)),
        x_empty(x_full + p.config.x_slots),
        w_full(x_empty + p.config.x_slots),
        w_empty(w_full + p.config.w_slots),
        received(w_empty + p.config.w_slots),
        activated(received + 1),
        team(team),
        rank(static_cast<int>(cluster_rank())),
        first_feature(rank * p.config.chunks * kAdapterChunk),
        first_tile(team * p.config.clusters + static_cast<int>(blockIdx.x) / kAdapterCluster),
        tile_stride(kTeams * p.config.clusters) {}

  __device__ __forceinline__ uint8_t* x(int slot) const { return base + slot * kXSlot; }
  __device__ __forceinline__ uint8_t* w(int slot) const { return base + at.weights + slot * kWSlot; }

  // Every warp of the team's warpgroups arrives when it is done with a slot, or has passed it.
  __device__ __forceinline__ void init(const AdapterConfig& c) const {
    for (int i = 0; i < c.x_slots; ++i) {
      barrier_init(x_full + i, 1);
      barrier_init(x_empty + i, 4 * kWarpgroups);
    }
    for (int i = 0; i < c.w_slots; ++i) {
      barrier_init(w_full + i, 1);
      barrier_init(w_empty + i, 4 * kWarpgroups);
    }
    barrier_init(received, 1);
    barrier_init(activated, 1);
    barrier_init_fence();
  }
};

}  // namespace peftkern
