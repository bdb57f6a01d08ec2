// adapter: a bottleneck's forward, or its backward up to the gradients of the weights, as one persistent kernel on
// wgmma (sm_90a).
//
//   forward    h = x Wd^T + bd                   y  = skip + factor (m act(h)) Wu^T + bias
//   backward   dh = act'(h) factor m (dy Wu)     dx = dy + dh Wd          m: dropout's mask; a = m act(h) for the
//   gradients
//
// A tile of tokens needs all features for h, and all of h for y. A block holds a slice of the features: its x stays in
// shared memory from the first product to the sum, so x is read once and y written once, by a cluster of eight whose
// blocks exchange their sums of h (adapter_exchange.cuh). Weights come from the L2 cache for every tile.
// Floor: bytes of x and y over the card's bandwidth: 4096 features, 8192 tokens: 134 MB, 45 us at 2.97 TB/s.
#pragma once

#include "bottleneck/adapter_consume.cuh"
#include "bottleneck/adapter_produce.cuh"

namespace peftkern {

template <typename T, int kTokens, int kTeams, int kWidth, bool kBackward>
__global__ void __launch_bounds__(kAdapterThreads, 1)
    adapter_kernel(const __grid_constant__ AdapterMaps maps, const __grid_constant__ AdapterProblem p) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  using Shared = AdapterShared<kTokens, kTeams, kWidth>;
  const int warp = threadIdx.x / 32;
  const Shared s(shared_bytes, p, kTeams == 1 ? 0 : warp < 4 ? warp / 2 : warp / 4 - 1);
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&maps.x);
    tensor_map_prefetch(&maps.down);
    tensor_map_prefetch(&maps.up);
    tensor_map_prefetch(&maps.out);
#pragma unroll
    for (int team = 0; team < kTeams; ++team) Shared(shared_bytes, p, team).init(p.config);
  }
  __syncthreads();
  cluster_sync();  // the barriers of all blocks are there
  allow_next_kernel();
  if (warp < 4) {
    registers_decrease<40>();
    if (threadIdx.x % 32 == 0 && warp / 2 < kTeams) {
      if (warp % 2 == 0) {
        produce_x(s, p, maps);
      } else {
        produce_weights<kTokens, kTeams, kWidth, kBackward>(s, p, maps);
      }
    }
    __syncwarp();
  } else {
    registers_increase<232>();
    AdapterConsumer<T, kTokens, kTeams, kWidth, kBackward>(s, p, maps).run();
    __syncwarp();
  }
  cluster_sync();
}

}  // namespace peftkern
