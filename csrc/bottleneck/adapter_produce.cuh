// The adapter's producers: two threads of each team that load x and the weights through the copy engine.
#pragma once

#include "bottleneck/adapter_shared.cuh"
#include "common/dependent_launch.cuh"

namespace peftkern {

// A residual of its own is fetched into the L2 cache while its tile of x is loaded. The next tile of x is not: that
// cost 11 us of 87.
template <int kTokens, int kTeams, int kWidth>
__device__ __forceinline__ void produce_x(const AdapterShared<kTokens, kTeams, kWidth>& s, const AdapterProblem& p,
                                          const AdapterMaps& maps) {
  const AdapterConfig& c = p.config;
  SlotRing at(c.x_slots);
  wait_for_earlier_kernels();
  async_proxy_fence();
#pragma unroll 1
  for (int tile = s.first_tile; tile < c.tiles; tile += s.tile_stride) {
    const int token = tile * c.tile;
    const int passes = p.writes && !c.keeps_x ? 2 : 1;
#pragma unroll 1
    for (int pass = 0; pass < passes; ++pass) {
      const CUtensorMap* map = pass == 0 ? &maps.x : &maps.skip;
#pragma unroll 1
      for (int chunk = 0; chunk < c.chunks; ++chunk) {
        const int feature = s.first_feature + chunk * kAdapterChunk;
        barrier_wait(s.x_empty + at.slot, at.parity ^ 1);
        barrier_arrive_expect(s.x_full + at.slot, p.box_tokens * 128);
        tensor_load(s.x(at.slot), map, feature, token, s.x_full + at.slot);
        if (pass == 0 && p.own_skip) tensor_prefetch(&maps.skip, feature, token);
        at.advance();
      }
    }
  }
}

// A chunk of down_weight is a box of its features; one of up_weight has a box for every 64 columns.
template <int kTokens, int kTeams, int kWidth, bool kBackward>
__device__ __forceinline__ void produce_weights(const AdapterShared<kTokens, kTeams, kWidth>& s,
                                                const AdapterProblem& p, const AdapterMaps& maps) {
  const AdapterConfig& c = p.config;
  SlotRing at(c.w_slots);
  wait_for_earlier_kernels();
  async_proxy_fence();
  const auto load = [&](bool down, int chunk) {
    const int feature = s.first_feature + chunk * kAdapterChunk;
    uint64_t* full = s.w_full + at.slot;
    barrier_wait(s.w_empty + at.slot, at.parity ^ 1);
    barrier_arrive_expect(full, kWidth * 128);
    if (down) {
      tensor_load(s.w(at.slot), &maps.down, feature, 0, full);
    } else {
#pragma unroll
      for (int box = 0; box < kWidth / 64; ++box) {
        tensor_load(s.w(at.slot) + box * 8192, &maps.up, box * 64, feature, full);
      }
    }
    at.advance();
  };
#pragma unroll 1
  for (int tile = s.first_tile; tile < c.tiles; tile += s.tile_stride) {
#pragma unroll 1
    for (int chunk = 0; chunk < c.chunks; ++chunk) load(!kBackward, chunk);
    if (!p.writes) continue;
#pragma unroll 1
    for (int chunk = 0; chunk < c.chunks; ++chunk) load(kBackward, chunk);
  }
}

}  // namespace peftkern
