// lora_gemm: a LoRA linear's forward or backward as one persistent kernel on wgmma (sm_90a).
//
//   forward    S = (m x) A^T    y = x W^T + S P2^T + bias      P1 = A,   P2 = c B
//   backward   D = dy B         dx = dy W + m (D P2^T)         P1 = B^T, P2 = c A^T
//              dB = c dy^T S    dA = c D^T (m x)               m: dropout's mask (kDropout)
//
// Of kLayers linear layers on one x: S has the columns of all, and dx and dA's D go over all.
//
// The skinny products are further tiles of the GEMM (gemm_config.h): a pass of their own would be bound by memory while
// the GEMM leaves memory idle. Warpgroup 0 produces: one thread takes jobs and loads. Warpgroups 1 and 2 multiply 64
// tokens x 256 outs each, and write a tile's outs while they multiply the next.
// Floor: 2 M N K / the card's matrix rate for each of y and dx.
#pragma once

#include "common/dependent_launch.cuh"
#include "gemm/gemm_consume.cuh"
#include "gemm/gemm_produce.cuh"

namespace peftkern {

template <typename T, int kR, bool kDx, bool kDropout, int kLayers>
__global__ void __launch_bounds__(kGemmThreads, 1)
    lora_gemm_kernel(const __grid_constant__ GemmMaps<kLayers> maps, const __grid_constant__ GemmProblem<kLayers> p) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  GemmShared& s = *reinterpret_cast<GemmShared*>(shared_bytes);
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&maps.x[0]);
    tensor_map_prefetch(&maps.w[0]);
    for (int i = 0; i < kGemmStages; ++i) {
      barrier_init(&s.full[i], 1);
      barrier_init(&s.empty[i], 8);  // the consumers' warps
    }
    barrier_init_fence();
  }
  __syncthreads();
  allow_next_kernel();
  if (threadIdx.x < 128) {
    registers_decrease<40>();
    if (threadIdx.x == 0) GemmProducer<kR, kDx, kLayers>(s, p, maps).run();
  } else {
    registers_increase<232>();
    gemm_consume<T, kR, kDx, kDropout, kLayers>(s, p, maps);
  }
}

}  // namespace peftkern
