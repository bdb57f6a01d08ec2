// lora_gemm's skinny jobs: projections and gradients.
#pragma once

#include <type_traits>

#include "common/dependent_launch.cuh"
#include "common/numbers.cuh"
#include "gemm/gemm_dropout.cuh"
#include "gemm/gemm_store.cuh"
#include "gemm/gemm_warpgroup.cuh"

namespace peftkern {

template <typename T, int kR, bool kDx, bool kDropout, int kLayers>
class GemmSkinnyJobs {
  using Skinny = GemmSkinny<kR>;
  static constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;
  static constexpr bool kMasked = kDropout && kDx;  // dA reads masked x; without kDx a projection does
  static constexpr int kColumns = Skinny::kProjectColumns;
  static constexpr int kX = 64 * 128;  // a warpgroup's rows of x in a stage

 public:
  __device__ __forceinline__ GemmSkinnyJobs(GemmWarpgroup& w, const GemmProblem<kLayers>& p) : w_(w), p_(p) {}

 private:
  __device__ __forceinline__ void project_step(float (&d)[kR / 2], int& previous, int accumulate) {
    const uint32_t stage = w_.open();
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const uint64_t x = wgmma_descriptor(stage + i * kGemmTokens * 128 + w_.group * kX);
      const uint32_t box = stage + Skinny::kProjectX + i * 64 * kR * 2;
      const uint64_t p1 = kDx ? wgmma_descriptor_mn<Skinny::kWidth>(box, Skinny::kP1Box) : wgmma_descriptor(box);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        WgmmaSS<kR>::template mma<kBFloat16, false, kDx>(d, x + 2 * q, p1 + (kDx ? 2 * Skinny::kWidth : 2) * q,
                                                         i + q > 0 ? 1 : accumulate);
      }
    }
    w_.close(previous);
  }

  __device__ __forceinline__ void project_steps(float (&d)[kR / 2], int steps) {
    int previous = -1;
    project_step(d, previous, 0);
#pragma unroll 1
    for (int step = 1; step < steps; ++step) project_step(d, previous, 1);
    w_.finish(d, previous);
  }

  // X goes through registers, where a thread's 16 columns of a row are those of one call of the generator: P1's columns
  // lie in the order that this multiplies them in (gemm_fragment_column). Masks are made beside the products before.
  // A thread's tokens are the same in all steps.
  __device__ __forceinline__ void masked_project_steps(float (&d)[kR / 2], int tile) {
    const int row = w_.warp * 16 + w_.lane / 4, token = tile * kGemmTokens + w_.group * 64 + row;
    const uint32_t place = w_.group * kX + dropout_place(row, w_.lane % 4);
    const DropoutCalls calls(p_.seed);
    const DropoutRow rows[2] = {calls.row(token), calls.row(token + 8)};
    uint32_t kept[kColumns][2][8];
    const auto make = [&](int step, int i) {
      const DropoutColumn column = calls.column((step * kColumns + i) * 4 + w_.lane % 4);
#pragma unroll
      for (int h = 0; h < 2; ++h) calls.kept(rows[h], column, p_.threshold, kept[i][h]);
    };
    const auto multiply = [&](int accumulate) {
      const uint32_t stage = w_.open();
      uint32_t x[kColumns][2][8];
#pragma unroll
      for (int i = 0; i < 2 * kColumns; ++i) {
        load_call(stage + place + i / 2 * kGemmTokens * 128 + i % 2 * 8 * 128, x[i / 2][i % 2]);
      }
#pragma unroll
      for (int i = 0; i < 16 * kColumns; ++i) x[i / 16][i / 8 % 2][i % 8] &= kept[i / 16][i / 8 % 2][i % 8];
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const uint64_t p1 = wgmma_descriptor(stage + Skinny::kProjectX + i * Skinny::kProjectRows * 128);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const uint32_t a[4] = {x[i][0][2 * q], x[i][1][2 * q], x[i][0][2 * q + 1], x[i][1][2 * q + 1]};
          WgmmaRS<kR>::template mma<kBFloat16>(d, a, p1 + 2 * q, i + q > 0 ? 1 : accumulate);
        }
      }
      wgmma_commit();
    };
    const auto follow = [&](int step) {
      make(step, 0);
      w_.settle(d);
      w_.release(w_.at.stage);
      w_.at.advance();
#pragma unroll
      for (int i = 1; i < kColumns; ++i) make(step, i);
    };
#pragma unroll
    for (int i = 0; i < kColumns; ++i) make(0, i);
    multiply(0);
#pragma unroll 1
    for (int step = 1; step < p_.layers[0].project_steps; ++step) {
      follow(step);
      multiply(1);
    }
    w_.finish(d, w_.at.stage);
    w_.at.advance();
  }

 public:
  __device__ __forceinline__ void project(const GemmJob& job) {
    // Backward, a job is of one layer's columns; forward, of all.
    const int tile = job.tile, layer = kLayers > 1 && kDx ? job.layer : 0;
    const int columns = kLayers > 1 && kDx ? p_.layers[layer].rank : p_.columns;
    float d[kR / 2];
    if constexpr (kDropout && !kDx) {
      masked_project_steps(d, tile);
    } else {
      project_steps(d, p_.layers[layer].project_steps);
    }
    const int token = tile * kGemmTokens + w_.group * 64 + w_.warp * 16 + w_.lane / 4;
    T* product = static_cast<T*>(p_.product) + int64_t{token} * p_.columns;
    if constexpr (kLayers > 1 && kDx) product += p_.layers[layer].column;
#pragma unroll
    for (int j = 0; j < kR / 8; ++j) {
      const int column = 8 * j + 2 * (w_.lane % 4);
      if (column >= columns) break;
      if (token < p_.tokens) *reinterpret_cast<uint32_t*>(product + column) = pack_pair<T>(d[4 * j], d[4 * j + 1]);
      if (token + 8 < p_.tokens) {
        *reinterpret_cast<uint32_t*>(product + 8 * p_.columns + column) = pack_pair<T>(d[4 * j + 2], d[4 * j + 3]);
      }
    }
    __threadfence();
    async_proxy_fence();  // other blocks read it through the copy engine
    w_.synchronize();
    if (w_.leader) {
      wait_for_earlier_kernels();  // which set the flags to 0
      flag_release_add(p_.flags + tile, 1);
      flag_release_add(p_.done + tile / p_.schedule.part_tiles, 1);
    }
  }

 private:
  // mask(box) masks Z in shared memory.
  template <typename Mask>
  __device__ __forceinline__ void gradient_step(float (&d)[kR / 2], int& previous, int accumulate, const Mask& mask) {
    const uint32_t stage = w_.open(), box = stage + w_.group * Skinny::kZBytes;
    mask(box);
    const uint64_t z = wgmma_descriptor_mn<64>(box, Skinny::kZBytes);
    const uint64_t q = wgmma_descriptor_mn<Skinny::kWidth>(stage + 2 * Skinny::kZBytes, Skinny::kBoxBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Skinny::kTokens / 16; ++k) {
      WgmmaSS<kR>::template mma<kBFloat16, true, true>(d, z + 128 * k, q + 2 * Skinny::kWidth * k,
                                                       k > 0 ? 1 : accumulate);
    }
    w_.close(previous);
  }

  // ahead(step): that step's mask may be made.
  template <typename Ahead, typename Mask>
  __device__ __forceinline__ void gradient_steps(float (&d)[kR / 2], const Ahead& ahead, const Mask& mask) {
    int previous = -1;
    ahead(0);
    gradient_step(d, previous, 0, mask);
#pragma unroll 1
    for (int step = 1; step < p_.gradient_steps; ++step) {
      ahead(step);
      gradient_step(d, previous, 1, mask);
    }
    w_.finish(d, previous);
  }

  __device__ __forceinline__ void gradient_steps(float (&d)[kR / 2]) {
    gradient_steps(d, [](int) {}, [](uint32_t) {});
  }

  // A thread's features are the same in all steps. Masks are made beside the products before.
  __device__ __forceinline__ void masked_gradient_steps(float (&d)[kR / 2], int tile, int part) {
    constexpr int kRows = Skinny::kTokens / 32;
    const int thread = threadIdx.x % 128, token0 = part * p_.schedule.part_tiles * kGemmTokens + thread / 4;
    const uint32_t place = dropout_place(thread / 4, thread % 4);
    const DropoutCalls calls(p_.seed);
    const DropoutColumn column = calls.column((tile * kGemmFeatures + w_.group * 64) / kDropoutColumns + thread % 4);
    uint32_t kept[kRows][8];
    const auto make = [&](int step) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        calls.kept(calls.row(token0 + step * Skinny::kTokens + i * 32), column, p_.threshold, kept[i]);
      }
    };
    gradient_steps(d, make, [&](uint32_t box) {
      uint32_t z[kRows][8];
#pragma unroll
      for (int i = 0; i < kRows; ++i) load_call(box + place + i * 32 * 128, z[i]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int k = 0; k < 8; ++k) z[i][k] &= kept[i][k];
        store_call(box + place + i * 32 * 128, z[i]);
      }
      shared_writes_fence();
      w_.synchronize();
    });
  }

 public:
  __device__ __forceinline__ void gradient(const GemmJob& job) {
    const bool of_a = job.kind == kGemmGradientA;
    const GemmLayer& layer = p_.layers[kLayers == 1 ? 0 : job.layer];
    float d[kR / 2];
    if constexpr (kMasked) {
      if (of_a) {
        masked_gradient_steps(d, job.tile, job.other);
      } else {
        gradient_steps(d);
      }
    } else {
      gradient_steps(d);
    }
    if (p_.schedule.parts > 1) {
      const int fours = of_a && kLayers > 1 ? p_.columns / 8 : kR / 8;  // of all layers' columns that there are
      if (!sum_parts(of_a ? p_.a : layer.b, fours, job.tile, job.other, d)) return;
    }
    if (of_a) {
      gemm_store_a<kR>(w_, p_, job.tile, d);
    } else {
      gemm_store_b<kR>(w_, layer, job.tile, d);
    }
  }

 private:
  // Leaves this part's sums; true with all parts' in d, added in their order, if it is the last to be done.
  __device__ __forceinline__ bool sum_parts(const GemmGradient& g, int fours, int tile, int part, float (&d)[kR / 2]) {
    constexpr int kFours = kR / 8;
    const int tiles = (g.features + kGemmFeatures - 1) / kGemmFeatures;
    float4* sums = reinterpret_cast<float4*>(g.sums) + int64_t{tile} * fours * 256 + threadIdx.x - 128;
    const int64_t stride = int64_t{tiles} * fours * 256;
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      if (kLayers > 1 && i >= fours) break;
      __stcg(sums + part * stride + i * 256, make_float4(d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]));
    }
    __threadfence();
    named_barrier(3, 256);
    if (w_.leader && w_.group == 0) {
      w_.s.arrived = atomicAdd(g.arrivals + tile, 1);
      __threadfence();
    }
    named_barrier(3, 256);
    if (w_.s.arrived + 1 < p_.schedule.parts) return false;
#pragma unroll
    for (int i = 0; i < kR / 2; ++i) d[i] = 0.0f;
#pragma unroll 1
    for (int from = 0; from < p_.schedule.parts; ++from) {
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        if (kLayers > 1 && i >= fours) break;
        const float4 v = __ldcg(sums + from * stride + i * 256);
        d[4 * i] += v.x;
        d[4 * i + 1] += v.y;
        d[4 * i + 2] += v.z;
        d[4 * i + 3] += v.w;
      }
    }
    return true;
  }

  GemmWarpgroup& w_;
  const GemmProblem<kLayers>& p_;
};

}  // namespace peftkern
