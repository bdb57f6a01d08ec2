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
  CUtensorMap x, skip, out;  // boxes of 64 features x a tile's tokens
  CUtensorMap down, up;      // boxes of 64 x 64
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
  float* dh_sums;  // of dh over tokens: [row][kAdapterWidth]; null: not wanted
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

struct AdapterShared {
  const AdapterProblem& p;
  uint8_t* base;
  uint64_t *full, *empty, *written;       // of slots
  uint64_t *received, *activated, *used;  // of stages
  int rank, first_tile;

  __device__ __forceinline__ AdapterShared(uint8_t* memory, const AdapterProblem& p)
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

  __device__ __forceinline__ uint8_t* slot(int i) const { return base + i * kAdapterSlot; }
  __device__ __forceinline__ uint8_t* activations(int stage) const {
    return base + p.at.activations + stage * kAdapterActivations;
  }
  // From a block of the cluster, for the group-th 8 columns that the receiver owns.
  __device__ __forceinline__ float* sums(int stage, int source, int group) const {
    const int place = (stage * p.config.cluster + source) * p.config.groups + group;
    return reinterpret_cast<float*>(base + p.at.received + place * kAdapterSums);
  }
  __device__ __forceinline__ float* up_bias() const { return reinterpret_cast<float*>(base + p.at.up_bias); }

  // The first feature of a chunk; beyond all of them where the block has fewer chunks.
  __device__ __forceinline__ int feature(int chunk) const {
    return chunk < p.config.chunks ? (rank * p.config.chunks + chunk) * kAdapterChunk : 1 << 24;
  }

  __device__ __forceinline__ void expect_sums(int stage) const {
    barrier_arrive_expect(received + stage, p.config.cluster * p.config.groups * 8 * kAdapterTile * 4);
  }
  __device__ __forceinline__ void expect_activations(int stage) const {
    barrier_arrive_expect(activated + stage, kAdapterActivations);
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
