// adapter: a bottleneck of up to 64 columns, its forward, or its backward up to the gradients of the weights, as one
// persistent kernel on wgmma (sm_90a) that holds the weights in registers.
//
//   forward    h = x Wd^T + bd                   y  = skip + factor (m act(h)) Wu^T + bias
//   backward   dh = act'(h) factor m (dy Wu)     dx = dy + dh Wd          m: dropout's mask
//
// A block has 512 features; the blocks of a cluster share a tile of 32 tokens and have all features together. The
// products are made transposed: h^T = Wd x^T and y^T = Wu a^T, so that the weights are the operands in registers, of
// one warpgroup each, and tokens the columns. Roles run as far apart as the rings of slots and stages let them:
//
//   loader     tiles of x to slots; at first the weights
//   down       sums of h of this block's features, sent to their owners in the cluster
//   middle     two warps: adds up the cluster's sums of the columns owned, applies the activation, sends it to all
//   up         adds the second product to x where it lies
//   storer     slots to y
//
// x is read once, y written once, weights read once per block.
// Floor: bytes of x and y over the card's bandwidth: 4096 features, 8192 tokens: 134 MB, 45 us at 2.97 TB/s.
#pragma once

#include "bottleneck/adapter_middle.cuh"
#include "bottleneck/adapter_multiply.cuh"
#include "common/dependent_launch.cuh"

namespace peftkern {

// One thread. Weights go through the slots as the first tiles: those of `down`, then those of `up`.
template <bool kBackward>
__device__ __forceinline__ void adapter_load(const AdapterShared& s, const AdapterProblem& p, const AdapterMaps& maps) {
  constexpr int kBoxes = kAdapterSlot / 8192;
  SlotRing at(p.config.slots);
  async_proxy_fence();
#pragma unroll 1
  for (int part = 0; part < 2 * kAdapterWeightSlots; ++part) {
    uint64_t* full = s.full + at.slot;
    barrier_wait(s.empty + at.slot, at.parity ^ 1);
    barrier_arrive_expect(full, kAdapterSlot);
    const bool up = (part >= kAdapterWeightSlots) != kBackward;
#pragma unroll 1
    for (int box = 0; box < kBoxes; ++box) {
      const int feature = s.feature(part % kAdapterWeightSlots * kBoxes + box);
      uint8_t* to = s.slot(at.slot) + box * 8192;
      tensor_load(to, up ? &maps.up : &maps.down, up ? 0 : feature, up ? feature : 0, full);
    }
    at.advance();
  }
#pragma unroll 1
  for (int tile = s.first_tile; tile < p.config.tiles; tile += p.config.clusters) {
#pragma unroll 1
    for (int pass = 0; pass < (p.own_skip ? 2 : 1); ++pass) {
      uint64_t* full = s.full + at.slot;
      barrier_wait(s.empty + at.slot, at.parity ^ 1);
      barrier_arrive_expect(full, p.box_tokens * kAdapterFeatures * 2);
#pragma unroll 1
      for (int chunk = 0; chunk < kAdapterChunks; ++chunk) {
        tensor_load(s.slot(at.slot) + chunk * kAdapterBox, pass == 0 ? &maps.x : &maps.skip, s.feature(chunk),
                    tile * p.config.tile, full);
      }
      at.advance();
    }
  }
}

// One thread: frees the slots in their order, those of outs when they are on their way.
__device__ __forceinline__ void adapter_store(const AdapterShared& s, const AdapterProblem& p,
                                              const AdapterMaps& maps) {
  SlotRing at(p.config.slots);
  const auto free = [&](int tile) {
    barrier_wait(s.written + at.slot, at.parity);
    if (tile >= 0) {
#pragma unroll 1
      for (int chunk = 0; chunk < p.config.chunks; ++chunk) {
        tensor_store(&maps.out, s.slot(at.slot) + chunk * kAdapterBox, s.feature(chunk), tile * p.config.tile);
      }
      tensor_store_wait<0>();
    }
    barrier_arrive(s.empty + at.slot);
    at.advance();
  };
#pragma unroll 1
  for (int i = 0; i < 2 * kAdapterWeightSlots; ++i) free(-1);
#pragma unroll 1
  for (int tile = s.first_tile; tile < p.config.tiles; tile += p.config.clusters) {
    if (p.own_skip) free(-1);
    free(p.writes ? tile : -1);
  }
  tensor_store_finish();
}

template <typename T, bool kBackward>
__global__ void __launch_bounds__(kAdapterThreads, 1)
    adapter_kernel(const __grid_constant__ AdapterMaps maps, const __grid_constant__ AdapterProblem p) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  const AdapterShared s(shared_bytes, p);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&maps.x);
    tensor_map_prefetch(&maps.down);
    tensor_map_prefetch(&maps.up);
    tensor_map_prefetch(&maps.out);
    s.init();
  }
  __syncthreads();
  cluster_sync();  // the barriers of all blocks are there
  allow_next_kernel();
  wait_for_earlier_kernels();
  if (warp < 4) {
    registers_decrease<88>();
    if (warp == 0) {
      if (threadIdx.x == 0) adapter_load<kBackward>(s, p, maps);
    } else if (warp == 3) {
      if (threadIdx.x % 32 == 0) adapter_store(s, p, maps);
    } else {
      AdapterMiddle<T, kBackward>(s, p, warp - 1).run();
    }
    __syncwarp();
  } else {
    registers_increase<208>();
    if (warp < 8) {
      adapter_down<T, kBackward>(s, p);
    } else {
      adapter_up<T, kBackward>(s, p);
    }
    __syncwarp();
  }
  cluster_sync();  // nobody sends to a block that has gone
}

}  // namespace peftkern
