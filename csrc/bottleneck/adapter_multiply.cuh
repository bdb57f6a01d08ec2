// The adapter kernel's warpgroups that multiply: one down, one up. Each holds its weight's 512 features in registers.
#pragma once

#include <type_traits>

#include "bottleneck/adapter_middle.cuh"
#include "common/wgmma.cuh"

namespace peftkern {

template <bool kTransposed>
__device__ __forceinline__ void load_matrices(uint32_t (&v)[4], uint32_t address) {
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(address)
                 : "memory");
  }
}

__device__ __forceinline__ void store_matrices_transposed(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]),
               "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// All accesses of the warp's lanes to the slot come before.
__device__ __forceinline__ void adapter_pass_on(uint64_t* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

template <int kCount>
__device__ __forceinline__ void adapter_settle(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i]));
}

// A weight as operands [64 rows, 16 deep] of a warpgroup: four for each chunk of 64 features, along the depth. They lie
// in boxes of 64 x 64, the rows along the box's rows or, kTransposed, along its columns. The first 2 *
// kAdapterWeightSlots slots have the weights of `down`, then those of `up`.
template <bool kTransposed>
__device__ __forceinline__ void adapter_weights(uint32_t (&a)[4 * kAdapterChunks][4], const AdapterShared& s,
                                                SlotRing& at, bool second) {
  constexpr int kBoxes = kAdapterSlot / 8192;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (second) {
#pragma unroll
    for (int i = 0; i < kAdapterWeightSlots; ++i) at.advance();
  }
#pragma unroll
  for (int part = 0; part < kAdapterWeightSlots; ++part) {
    barrier_wait(s.full + at.slot, at.parity);
#pragma unroll
    for (int box = 0; box < kBoxes; ++box) {
      const uint32_t from = shared_address(s.slot(at.slot)) + box * 8192;
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int row = kTransposed ? 16 * q + lane / 16 * 8 + lane % 8 : 16 * warp + lane / 8 % 2 * 8 + lane % 8;
        const int column = kTransposed ? 2 * warp + lane / 8 % 2 : 2 * q + lane / 16;
        load_matrices<kTransposed>(a[(part * kBoxes + box) * 4 + q], from + row * 128 + ((column ^ lane % 8) << 4));
      }
    }
    adapter_pass_on(s.written + at.slot);
    at.advance();
  }
  if (!second) {
#pragma unroll
    for (int i = 0; i < kAdapterWeightSlots; ++i) at.advance();
  }
}

// This block's sums of h^T [64 columns, tokens], to the owners of the columns.
template <typename T, bool kBackward>
__device__ __forceinline__ void adapter_down(const AdapterShared& s, const AdapterProblem& p) {
  constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  SlotRing at(p.config.slots), stage(p.config.stages);
  uint32_t a[4 * kAdapterChunks][4];
  adapter_weights<kBackward>(a, s, at, false);
  // Of this warp's two groups of columns: who owns them, as which of its groups.
  const int owner[2] = {2 * warp / p.config.groups, (2 * warp + 1) / p.config.groups};
  const int group[2] = {2 * warp - owner[0] * p.config.groups, 2 * warp + 1 - owner[1] * p.config.groups};
#pragma unroll 1
  for (int tile = s.first_tile; tile < p.config.tiles; tile += p.config.clusters) {
    barrier_wait(s.full + at.slot, at.parity);
    const uint64_t x = wgmma_descriptor(shared_address(s.slot(at.slot)));
    float d[kAdapterTile / 2];
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4 * kAdapterChunks; ++i) {
      WgmmaRS<kAdapterTile>::template mma<kBFloat16>(d, a[i], x + i / 4 * (kAdapterBox >> 4) + i % 4 * 2, i > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    adapter_settle(d);
    if (p.own_skip) {
      adapter_pass_on(s.written + at.slot);
      at.advance();
    }
    at.advance();
    barrier_wait(s.used + stage.slot, stage.parity ^ 1);  // all have read their sums of this stage, and we activations
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t sums = shared_address(s.sums(stage.slot, s.rank, group[i])) + lane * 16;
      const uint32_t to = cluster_address(sums, owner[i]);
      const uint32_t barrier = cluster_address(shared_address(s.received + stage.slot), owner[i]);
#pragma unroll
      for (int half = 0; half < kAdapterTile / 16; ++half) {
        const int j = 8 * half + 2 * i;
        cluster_send(to + half * kAdapterHalf, barrier, d[j], d[j + 1], d[j + 4], d[j + 5]);
      }
    }
    stage.advance();
  }
}

// out = skip + factor * a W2^T + bias where the skip lies.
template <typename T, bool kBackward>
__device__ __forceinline__ void adapter_up(const AdapterShared& s, const AdapterProblem& p) {
  constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x - 256; i < p.zero_count; i += 128) p.zeros[i] = 0;
  }
  SlotRing at(p.config.slots), stage(p.config.stages);
  uint32_t a[4 * kAdapterChunks][4];
  adapter_weights<kBackward>(a, s, at, true);
  if constexpr (!kBackward) {
    for (int i = threadIdx.x - 256; i < kAdapterFeatures; i += 128) {
      const int feature = s.feature(i / 64) + i % 64;
      const bool has = p.up_bias != nullptr && feature < p.features;
      s.up_bias()[i] = has ? p.bias_factor * load_float(p.up_bias, p.up_bias_type, feature) : 0.0f;
    }
    named_barrier(1, 128);
  }
  const float factor = kBackward ? 1.0f : p.factor;
  // Of 8 x 8 matrices: two of tokens by two of features.
  const uint32_t place = (lane / 16 * 8 + lane % 8) * 128 + ((2 * warp + lane / 8 % 2 ^ lane % 8) << 4);
#pragma unroll 1
  for (int tile = s.first_tile; tile < p.config.tiles; tile += p.config.clusters) {
    barrier_wait(s.activated + stage.slot, stage.parity);
    if (threadIdx.x == 256) s.expect_activations(stage.slot);
    shared_writes_fence();
    if (p.own_skip) at.advance();
    barrier_wait(s.full + at.slot, at.parity);
    const uint32_t slot = shared_address(s.slot(at.slot)) + place;
    const uint64_t b = wgmma_descriptor(shared_address(s.activations(stage.slot)));
    float d[2][kAdapterTile / 2];
    const auto multiply = [&](int chunk) {
      wgmma_fence();
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        WgmmaRS<kAdapterTile>::template mma<kBFloat16>(d[chunk % 2], a[4 * chunk + q], b + 2 * q, q > 0);
      }
      wgmma_commit();
    };
    if (p.writes) {
      multiply(0);
#pragma unroll
      for (int chunk = 0; chunk < kAdapterChunks; ++chunk) {
        if (chunk + 1 < kAdapterChunks) {
          multiply(chunk + 1);
          wgmma_wait<1>();
        } else {
          wgmma_wait<0>();
          adapter_pass_on(s.used + stage.slot);
        }
        adapter_settle(d[chunk % 2]);
        float bias[2] = {0.0f, 0.0f};
        if constexpr (!kBackward) {
          bias[0] = s.up_bias()[chunk * 64 + 16 * warp + lane / 4];
          bias[1] = s.up_bias()[chunk * 64 + 16 * warp + lane / 4 + 8];
        }
#pragma unroll
        for (int half = 0; half < kAdapterTile / 16; ++half) {
          const uint32_t box = slot + chunk * kAdapterBox + half * 2048;
          uint32_t v[4];
          load_matrices<true>(v, box);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 skip = p.adds_skip ? unpack_pair<T>(v[i]) : float2{0.0f, 0.0f};
            const int j = 8 * half + i / 2 * 4 + i % 2 * 2;
            v[i] = pack_pair<T>(skip.x + (factor * d[chunk % 2][j] + bias[i % 2]),
                                skip.y + (factor * d[chunk % 2][j + 1] + bias[i % 2]));
          }
          store_matrices_transposed(box, v);
        }
      }
      shared_writes_fence();
    } else {
      adapter_pass_on(s.used + stage.slot);
    }
    adapter_pass_on(s.written + at.slot);
    at.advance();
    stage.advance();
  }
}

}  // namespace peftkern
