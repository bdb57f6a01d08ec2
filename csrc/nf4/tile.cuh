// nf4_tile: y[M, outs] = x[M, contraction] W^T on wgmma (sm_90a), reading the stored weight: forward, and dX (kDx).
//
// A block makes tiles of 128 outs x kTokens tokens. The weight is the A operand: it goes from packed bytes through a
// table to registers, in T. The tokens are the B operand and come through the copy engine. Warpgroup 0 produces: one
// warp loads tokens and codes, the others decode scales. Warpgroups 1 and 2 take 64 outs each: they decode step i + 1
// while the tensor cores do step i. What they then read from shared memory and issue delays the tensor cores, so a pair
// of weights takes one 4-byte lookup and two packed multiplications: by the scale's low and high part in T, the sum
// rounded once. Only the rounding of the code itself to T comes on top of what dequantize rounds.
//
// Small problems split the contraction over a cluster, which adds up its parts in rank order through distributed
// shared memory; large ones give each multiprocessor several tiles.
// Floor: 2 M outs contraction / the card's matrix rate.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "common/dependent_launch.cuh"
#include "common/hopper.cuh"
#include "common/nf4_code.h"
#include "common/wgmma.cuh"
#include "nf4/tile_decode.cuh"
#include "nf4/tile_produce.cuh"
#include "nf4/tile_write.cuh"

namespace peftkern {

template <typename T, bool kDx, int kTokens, bool kSplit>
__device__ __forceinline__ void consume(TileShared<kTokens>& s, const TileProblem& p, const CUtensorMap* y_map,
                                        const ChunkRange& range, int tile_blocks, int rank, int group, int warp,
                                        int lane) {
  using Shared = TileShared<kTokens>;
  constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;
  const uint32_t table = shared_address(s.pairs) + lane * 4;
  RingPosition<Shared::kTokenStages> token_at;
  RingPosition<Shared::kWeightStages> weight_at;
  if (p.weight.nested_code != nullptr) {
    const int thread = group * 128 + warp * 32 + lane;
    s.nested_code[thread] = __ldg(p.weight.nested_code + thread);
    named_barrier_arrive(4, 256 + 32 * Shared::kWeightStages);
  }
  float d[kTokens / 2];
  uint32_t a[2][4][4];
  RawStep<kDx> raw;
  // Loads step `sub` of the current chunk; after a chunk's last step its stage is free.
  const auto load = [&](int step, int sub) {
    if (sub == 0) barrier_wait(&s.weights_full[weight_at.stage], weight_at.parity);
    load_step<kDx>(raw, s, weight_at.stage, sub, group, warp, lane);
    if (sub == kTileChunk - 1 || step + 1 == range.last_step) {
      barrier_arrive(&s.weights_empty[weight_at.stage]);
      weight_at.advance();
    }
  };
  for (int tile = p.first_tile + blockIdx.x / p.split; tile < p.last_tile; tile += tile_blocks) {
    const TilePosition where = tile_position(p, tile);
    const int first_step = range.first * kTileChunk;
    int accumulate = 0;
    int previous = -1;  // the token stage of the step before
    load(first_step, 0);
    decode_step<T, kDx>(a[0], raw, table, lane);
    if (first_step + 1 < range.last_step) load(first_step + 1, 1);
    for (int chunk = range.first; chunk < range.last; ++chunk) {
#pragma unroll
      for (int sub = 0; sub < kTileChunk; ++sub) {
        const int step = chunk * kTileChunk + sub;
        if (step >= range.last_step) break;
        barrier_wait(&s.tokens_full[token_at.stage], token_at.parity);
        const uint64_t tokens = wgmma_descriptor(shared_address(s.tokens[token_at.stage]));
        wgmma_fence();
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          WgmmaRS<kTokens>::template mma<kBFloat16>(d, a[sub % 2][q], tokens + 2 * q, accumulate);
          accumulate = 1;
        }
        wgmma_commit();
        wgmma_wait<1>();  // the step before this one is done: its fragments and its tokens are free
        if (previous >= 0 && lane == 0) barrier_arrive(&s.tokens_empty[previous]);
        previous = token_at.stage;
        token_at.advance();
        // While the tensor cores work: fragments of the next step, words of the one after.
        if (step + 1 < range.last_step) decode_step<T, kDx>(a[1 - sub % 2], raw, table, lane);
        if (step + 2 < range.last_step) load(step + 2, (sub + 2) % kTileChunk);
      }
    }
    wgmma_wait<0>();
    // What follows may not be moved up to where it would read sums in flight: the compiler would serialize the
    // products.
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) asm volatile("" : "+f"(d[i]));
    if (lane == 0) barrier_arrive(&s.tokens_empty[previous]);
    const int token0 = where.token_tile * kTokens, out0 = where.out_tile * kTileOuts + group * 64;
    Writer<T, kTokens> writer(s, p, y_map, token0, out0, group, warp, lane);
    if constexpr (kSplit) {
      reduce_and_write<T, kTokens>(s, p, d, writer, token0, rank, group * 128 + warp * 32 + lane);
    } else {
#pragma unroll
      for (int batch = 0; batch < kTokens / kTileBatch; ++batch) {
        if (token0 + batch * kTileBatch < p.M) writer.write(batch, d + 4 * batch * (kTileBatch / 8));
      }
    }
  }
  if (warp == 0 && lane == 0) tensor_store_finish();
  if constexpr (kSplit) {
    __syncwarp();
    cluster_wait();
  }
}

template <typename T, bool kDx, int kTokens, bool kSplit>
__global__ void __launch_bounds__(kTileThreads, 1)
    nf4_tile_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap code_map,
                    const __grid_constant__ CUtensorMap y_map, const __grid_constant__ TileProblem p) {
  using Shared = TileShared<kTokens>;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Shared& s = *reinterpret_cast<Shared*>(shared_bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&x_map);
    tensor_map_prefetch(&code_map);
    tensor_map_prefetch(&y_map);
    for (int i = 0; i < Shared::kTokenStages; ++i) {
      barrier_init(&s.tokens_full[i], 1);
      barrier_init(&s.tokens_empty[i], 8);  // the consumers' warps
    }
    for (int i = 0; i < Shared::kWeightStages; ++i) {
      barrier_init(&s.weights_full[i], 33);  // the loading thread and the scales' warp
      barrier_init(&s.weights_empty[i], 256);
    }
    barrier_init_fence();
  }
  for (int i = threadIdx.x; i < 256 * 8; i += kTileThreads) {
    const uint32_t pair = pack_pair<T>(kNF4CodeDevice[(i / 8) >> 4], kNF4CodeDevice[(i / 8) & 15]);
    reinterpret_cast<uint4*>(s.pairs)[i] = make_uint4(pair, pair, pair, pair);
  }
  const int rank = kSplit ? static_cast<int>(cluster_rank()) : 0;
  const int tile_blocks = gridDim.x / p.split;
  const ChunkRange range = chunk_range(p, rank);
  prefetch_weights<kDx>(p, range);
  __syncthreads();
  wait_for_earlier_kernels();
  allow_next_kernel();
  if (warp < 4) {
    if constexpr (kTokens == 256) registers_decrease<56>();
    if (warp == 0) {
      if (lane == 0) produce_tiles<kDx>(s, p, &x_map, &code_map, range, tile_blocks);
      __syncwarp();
    } else {
      if (warp <= Shared::kWeightStages) produce_scales<T, kDx>(s, p, range, tile_blocks, warp - 1, lane);
    }
    if constexpr (kSplit) {  // as the consumers do
      cluster_sync();
      cluster_arrive();
      cluster_wait();
    }
  } else {
    if constexpr (kTokens == 256) registers_increase<224>();
    consume<T, kDx, kTokens, kSplit>(s, p, &y_map, range, tile_blocks, rank, (warp - 4) / 4, warp % 4, lane);
  }
}

}  // namespace peftkern
