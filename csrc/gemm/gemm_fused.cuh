// lora_gemm's fused project jobs: D = dy B and a part of dB = dy^T S from one reading of dy.
//
// 256 tokens, 64 features of dy a step. The first consumer warpgroup sums those features of dB over the tokens and
// leaves the sums in memory at the step's end; the second sums D of all tokens over the features. A block's jobs add to
// one part of dB, in their order; sum jobs add up the parts.
#pragma once

#include <type_traits>

#include "common/dependent_launch.cuh"
#include "common/numbers.cuh"
#include "gemm/gemm_store.cuh"

namespace peftkern {

template <typename T, int kLayers>
class GemmFusedJobs {
  static constexpr int kR = kGemmMaxFusedRank;
  using Skinny = GemmSkinny<kR>;
  static constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;
  static constexpr int kFours = kR / 8, kBlocks = kGemmFusedTiles * 2;  // of four sums; of 64 tokens

 public:
  __device__ __forceinline__ GemmFusedJobs(GemmWarpgroup& w, const GemmProblem<kLayers>& p, const GemmJob& job)
      : w_(w), p_(p), job_(job), layer_(p.layers[kLayers == 1 ? 0 : job.layer]) {}

  // Part blockIdx.x of the layer's dB: [part][64 features][rank / 8][thread] of four sums.
  __device__ __forceinline__ void sum_features() {
    const bool first = job_.other == 0;
    const uint32_t product = shared_address(w_.s.out[0][0]);
    float4* sums = reinterpret_cast<float4*>(layer_.b.sums) +
                   int64_t{blockIdx.x} * layer_.project_steps * kFours * 128 + threadIdx.x % 128;
#pragma unroll 1
    for (int step = 0; step < layer_.project_steps; ++step, sums += kFours * 128) {
      float d[kR / 2];
      float4 before[kFours];
#pragma unroll
      for (int i = 0; i < kFours; ++i) before[i] = first ? float4{} : __ldcg(sums + i * 128);
      const uint32_t stage = w_.open();
      wgmma_fence();
#pragma unroll
      for (int tile = 0; tile < kGemmFusedTiles; ++tile) {
        const uint64_t z = wgmma_descriptor_mn<64>(stage + tile * Skinny::kZBytes, Skinny::kZBytes);
        const uint64_t q = wgmma_descriptor_mn<Skinny::kWidth>(product + tile * Skinny::kBoxBytes, Skinny::kBoxBytes);
#pragma unroll
        for (int k = 0; k < Skinny::kTokens / 16; ++k) {
          WgmmaSS<kR>::template mma<kBFloat16, true, true>(d, z + 128 * k, q + 2 * Skinny::kWidth * k, tile + k > 0);
        }
      }
      wgmma_commit();
      w_.finish(d, w_.at.stage);
      w_.at.advance();
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const float4 v = before[i];
        __stcg(sums + i * 128, make_float4(v.x + d[4 * i], v.y + d[4 * i + 1], v.z + d[4 * i + 2], v.w + d[4 * i + 3]));
      }
    }
    __threadfence();
    w_.synchronize();
    if (w_.leader) {
      wait_for_earlier_kernels();  // which set the flags to 0
      flag_release_add(p_.summed, 1);
    }
  }

  __device__ __forceinline__ void project() {
    float d[kBlocks][kR / 2];
    int previous = -1;
    step(d, previous, 0);
#pragma unroll 1
    for (int s = 1; s < layer_.project_steps; ++s) step(d, previous, 1);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) w_.settle(d[block]);
    w_.release(previous);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const int token = (job_.tile * kBlocks + block) * 64 + w_.warp * 16 + w_.lane / 4;
      T* product = static_cast<T*>(p_.product) + int64_t{token} * p_.columns + layer_.column;
#pragma unroll
      for (int j = 0; j < kR / 8; ++j) {
        const float* sums = d[block] + 4 * j;
        const int column = 8 * j + 2 * (w_.lane % 4);
        if (column >= layer_.rank) break;
        if (token < p_.tokens) *reinterpret_cast<uint32_t*>(product + column) = pack_pair<T>(sums[0], sums[1]);
        if (token + 8 < p_.tokens) {
          *reinterpret_cast<uint32_t*>(product + 8 * p_.columns + column) = pack_pair<T>(sums[2], sums[3]);
        }
      }
    }
    __threadfence();
    async_proxy_fence();  // other blocks read it through the copy engine
    w_.synchronize();
    if (w_.leader) {
      wait_for_earlier_kernels();  // which set the flags to 0
#pragma unroll
      for (int i = 0; i < kGemmFusedTiles; ++i) {
        const int tile = job_.tile * kGemmFusedTiles + i;
        if (tile >= p_.schedule.token_tiles) break;
        flag_release_add(p_.flags + tile, 2);
        flag_release_add(p_.done + tile / p_.schedule.part_tiles, 2);
      }
    }
  }

  // Adds up what all blocks have left of 128 features of the layer's dB.
  __device__ __forceinline__ void sum() {
    w_.release(w_.at.stage);  // brings the job only
    w_.at.advance();
    const int chunk = 2 * job_.tile + w_.group;
    if (chunk >= layer_.project_steps) return;
    const float4* sums =
        reinterpret_cast<const float4*>(layer_.b.sums) + int64_t{chunk} * kFours * 128 + threadIdx.x % 128;
    const int64_t stride = int64_t{layer_.project_steps} * kFours * 128;
    float d[kR / 2];
#pragma unroll
    for (int i = 0; i < kR / 2; ++i) d[i] = 0.0f;
#pragma unroll 4
    for (int part = 0; part < p_.schedule.project_blocks; ++part) {
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const float4 v = __ldcg(sums + part * stride + i * 128);
        d[4 * i] += v.x;
        d[4 * i + 1] += v.y;
        d[4 * i + 2] += v.z;
        d[4 * i + 3] += v.w;
      }
    }
    gemm_store_b<kR>(w_, layer_, job_.tile, d);
  }

 private:
  __device__ __forceinline__ void step(float (&d)[kBlocks][kR / 2], int& previous, int accumulate) {
    const uint32_t stage = w_.open();
    const uint64_t p1 = wgmma_descriptor_mn<Skinny::kWidth>(stage + Skinny::kFusedX, Skinny::kP1Box);
    wgmma_fence();
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const uint64_t x = wgmma_descriptor(stage + block * 64 * 128);
        WgmmaSS<kR>::template mma<kBFloat16, false, true>(d[block], x + 2 * q, p1 + 2 * Skinny::kWidth * q,
                                                          q == 0 ? accumulate : 1);
      }
    }
    w_.close(previous);
  }

  GemmWarpgroup& w_;
  const GemmProblem<kLayers>& p_;
  const GemmJob job_;
  const GemmLayer& layer_;
};

template <typename T, int kLayers>
__device__ __forceinline__ void gemm_fused_project(GemmWarpgroup& w, const GemmProblem<kLayers>& p,
                                                   const GemmJob& job) {
  GemmFusedJobs<T, kLayers> jobs(w, p, job);
  if (w.group == 0) {
    jobs.sum_features();
  } else {
    jobs.project();
  }
  named_barrier(3, 256);  // from here on S's place may be written
}

template <typename T, int kLayers>
__device__ __forceinline__ void gemm_fused_sum(GemmWarpgroup& w, const GemmProblem<kLayers>& p, const GemmJob& job) {
  GemmFusedJobs<T, kLayers>(w, p, job).sum();
}

}  // namespace peftkern
