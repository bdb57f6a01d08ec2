// Gradients on their way out: 128 features x rank of sums, a warpgroup's 64 features in its registers.
#pragma once

#include "common/numbers.cuh"
#include "gemm/gemm_warpgroup.cuh"

namespace peftkern {

// f(row, column, sum) for each of a thread's sums, rows of the tile's features.
template <int kR, typename F>
__device__ __forceinline__ void gemm_each_sum(const GemmWarpgroup& w, int tile, const float (&d)[kR / 2], const F& f) {
  const int feature = tile * kGemmFeatures + w.group * 64 + w.warp * 16 + w.lane / 4;
#pragma unroll
  for (int i = 0; i < kR / 2; ++i) f(feature + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (w.lane % 4) + i % 2, d[i]);
}

// f(T{}) with the gradients' type.
template <typename F>
__device__ __forceinline__ void gemm_with_type(FloatType type, const F& f) {
  if (type == FloatType::kFloat32) {
    f(float{});
  } else if (type == FloatType::kBFloat16) {
    f(__nv_bfloat16{});
  } else {
    f(__half{});
  }
}

// A tile of one layer's dB.
template <int kR>
__device__ __forceinline__ void gemm_store_b(const GemmWarpgroup& w, const GemmLayer& layer, int tile,
                                             const float (&d)[kR / 2]) {
  gemm_with_type(layer.b.type, [&](auto type) {
    using G = decltype(type);
    G* out = static_cast<G*>(layer.dB);
    gemm_each_sum<kR>(w, tile, d, [&](int row, int column, float sum) {
      if (column < layer.rank && row < layer.b.features) {
        out[int64_t{row} * layer.rank + column] = round_to<G>(sum * layer.factor);
      }
    });
  });
}

// A tile of every layer's dA.
template <int kR, int kLayers>
__device__ __forceinline__ void gemm_store_a(const GemmWarpgroup& w, const GemmProblem<kLayers>& p, int tile,
                                             const float (&d)[kR / 2]) {
  gemm_with_type(p.a.type, [&](auto type) {
    using G = decltype(type);
#pragma unroll
    for (int j = 0; j < kLayers; ++j) {
      const GemmLayer& layer = p.layers[j];
      if (layer.dA == nullptr) continue;
      G* out = static_cast<G*>(layer.dA);
      gemm_each_sum<kR>(w, tile, d, [&](int row, int column, float sum) {
        const int own = kLayers == 1 ? column : column - layer.column;
        if (own >= 0 && own < layer.rank && row < p.a.features) {
          out[int64_t{own} * p.a.features + row] = round_to<G>(sum * layer.factor);
        }
      });
    }
  });
}

}  // namespace peftkern
