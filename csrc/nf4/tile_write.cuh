// nf4_tile's end: sums in registers to rows of y, across a cluster where its blocks hold parts of them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/hopper.cuh"
#include "nf4/tile_decode.cuh"

namespace peftkern {

// Writes sums, a batch of 32 tokens at a time, through shared memory, where a token's 64 outs of this warpgroup become
// a row of 128 bytes under the 128-byte swizzle.
template <typename T, int kTokens>
class Writer {
 public:
  __device__ __forceinline__ Writer(TileShared<kTokens>& s, const TileProblem& p, const CUtensorMap* y_map, int token0,
                                    int out0, int group, int warp, int lane)
      : s_(s), y_map_(y_map), token0_(token0), out0_(out0), group_(group), leader_(warp == 0 && lane == 0) {
    const int out = out0 + warp * 16 + lane / 4;
    const T* bias = static_cast<const T*>(p.bias);
    bias_low_ = bias != nullptr && out < p.outs ? to_float(bias[out]) : 0.0f;
    bias_high_ = bias != nullptr && out + 8 < p.outs ? to_float(bias[out + 8]) : 0.0f;
    // Lane l % 16 addresses token l % 8 of the first (outs 0-7 of the warp's 16) or second 8x8 block.
    const int chunk = (2 * warp + ((lane / 8) & 1)) ^ (lane % 8);
    row_ = shared_address(s.out[group]) + (lane % 8) * 128 + chunk * 16;
  }

  // v: four sums of each of the batch's four groups of 8 tokens, as wgmma leaves them. All of the warpgroup calls.
  __device__ __forceinline__ void write(int batch, const float* v) {
    const int buffer = batch % 2;
    if (leader_) tensor_store_wait<1>();
    named_barrier(1 + group_, 128);  // the buffer is free
#pragma unroll
    for (int g = 0; g < kTileBatch / 8; ++g) {
      const uint32_t low = pack_pair<T>(v[4 * g] + bias_low_, v[4 * g + 1] + bias_low_);
      const uint32_t high = pack_pair<T>(v[4 * g + 2] + bias_high_, v[4 * g + 3] + bias_high_);
      asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                       row_ + buffer * TileShared<kTokens>::kOutBytes + g * 1024),
                   "r"(low), "r"(high)
                   : "memory");
    }
    shared_writes_fence();
    named_barrier(1 + group_, 128);
    if (leader_) tensor_store(y_map_, s_.out[group_][buffer], out0_, token0_ + batch * kTileBatch);
  }

 private:
  TileShared<kTokens>& s_;
  const CUtensorMap* y_map_;
  int token0_, out0_, group_;
  bool leader_;
  float bias_low_, bias_high_;
  uint32_t row_;
};

// The parts of a cluster's blocks become the tile: every block leaves its sums in its (now idle) token buffers, and
// rank r adds up and writes its share of the batches, in rank order. A loop, not unrolled: straight code that runs once
// would wait for its instructions longer than for the sums.
template <typename T, int kTokens>
__device__ __forceinline__ void reduce_and_write(TileShared<kTokens>& s, const TileProblem& p,
                                                 const float (&d)[kTokens / 2], Writer<T, kTokens> writer, int token0,
                                                 int rank, int thread) {
  constexpr int kBatches = kTokens / kTileBatch, kGroups = kTileBatch / 8;
  float4* own = reinterpret_cast<float4*>(s.tokens) + thread;  // [group of 8 tokens][thread]
  named_barrier(3, 256);                                       // both warpgroups are done with the token buffers
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) own[j * 256] = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
  cluster_sync();
  const int share = (kBatches + p.split - 1) / p.split, last = min((rank + 1) * share, kBatches);
#pragma unroll 1
  for (int batch = rank * share; batch < last && token0 + batch * kTileBatch < p.M; ++batch) {
    const uint32_t local = shared_address(own + batch * kGroups * 256);
    float sum[4 * kGroups];
#pragma unroll
    for (int i = 0; i < 4 * kGroups; ++i) sum[i] = 0.0f;
#pragma unroll 2
    for (int r = 0; r < p.split; ++r) {
      const uint32_t part = cluster_address(local, static_cast<uint32_t>(r));
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const float4 x = cluster_load(part + g * 4096);
        sum[4 * g] += x.x;
        sum[4 * g + 1] += x.y;
        sum[4 * g + 2] += x.z;
        sum[4 * g + 3] += x.w;
      }
    }
    writer.write(batch, sum);
  }
  cluster_arrive();  // a block may end when nobody reads its sums any more: waited for at the kernel's end
}

}  // namespace peftkern
