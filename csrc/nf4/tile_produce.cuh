// nf4_tile's producers: the warp that loads tokens and packed weights, and the warps that decode scales.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/dependent_launch.cuh"
#include "common/hopper.cuh"
#include "nf4/tile_decode.cuh"

namespace peftkern {

// Fetches what the block's first tile starts with into the L2 cache: weights, which an earlier kernel may be writing,
// so that they may not be read yet, and whose first touch costs the most.
template <bool kDx>
__device__ __forceinline__ void prefetch_weights(const TileProblem& p, const ChunkRange& range) {
  const NF4DeviceWeight& w = p.weight;
  const int outs = tile_position(p, p.first_tile + blockIdx.x / p.split).out_tile * kTileOuts;
  const int depth = range.first * kTileChunk * kTileDepth;
  for (int i = threadIdx.x; i < (kDx ? kTileChunk * kTileDepth : kTileOuts); i += kTileThreads) {
    const int64_t row = (kDx ? depth : outs) + i, col = kDx ? outs : depth;
    if (row >= p.weight_rows || col >= p.weight_cols) continue;
    const int64_t element = row * p.weight_cols + col, block = element >> w.log2_blocksize;
    prefetch_l2(w.packed + element / 2);
    if (w.absmax_codes == nullptr) {
      prefetch_l2(w.absmax + block);
    } else {
      prefetch_l2(w.absmax_codes + block);
      if (i % 32 == 0) prefetch_l2(w.nested_absmax + (block >> w.log2_nested_blocksize));
    }
  }
  if (w.nested_code != nullptr && threadIdx.x < 9) {
    prefetch_l2(threadIdx.x < 8 ? w.nested_code + threadIdx.x * 32 : w.nested_offset);
  }
}

// Decodes the scales of every kWeightStages-th chunk, the loads of all its steps in flight together. A warp thus always
// fills the same stage: it could not tell the parities of a stage two rounds apart.
template <typename T, bool kDx, int kTokens>
__device__ __forceinline__ void produce_scales(TileShared<kTokens>& s, const TileProblem& p, const ChunkRange& range,
                                               int tile_blocks, int warp, int lane) {
  using Shared = TileShared<kTokens>;
  constexpr int kRows = kTileOuts / 32;
  const NF4DeviceWeight& w = p.weight;
  const bool nested = w.absmax_codes != nullptr;
  const float offset = nested ? __ldg(w.nested_offset) : 0.0f;
  bool code_ready = !nested;
  RingPosition<Shared::kWeightStages> at;
  for (int tile = p.first_tile + blockIdx.x / p.split; tile < p.last_tile; tile += tile_blocks) {
    const TilePosition where = tile_position(p, tile);
    for (int chunk = range.first; chunk < range.last; ++chunk) {
      if (at.stage == warp) {
        constexpr int kTogether = kTokens == 256 ? 2 : kTileChunk;  // steps, limited by the producers' registers
#pragma unroll
        for (int sub0 = 0; sub0 < kTileChunk; sub0 += kTogether) {
          float value[kTogether][kRows];
          int code[kTogether][kRows];
#pragma unroll
          for (int sub = 0; sub < kTogether; ++sub) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              const int e = lane + 32 * i;
              const int64_t depth = int64_t{chunk * kTileChunk + sub0 + sub} * kTileDepth;
              const int64_t row = kDx ? depth + e % 64 : where.out_tile * kTileOuts + e;
              const int64_t col = kDx ? where.out_tile * kTileOuts + e / 64 * 64 : depth;
              value[sub][i] = 0.0f;  // of rows and columns beyond the weight
              code[sub][i] = -1;
              if (row < p.weight_rows && col < p.weight_cols) {
                const int64_t block = (row * p.weight_cols + col) >> w.log2_blocksize;
                if (nested) {
                  code[sub][i] = __ldg(w.absmax_codes + block);
                  value[sub][i] = __ldg(w.nested_absmax + (block >> w.log2_nested_blocksize));
                } else {
                  value[sub][i] = __ldg(w.absmax + block);
                }
              }
            }
          }
          if (!code_ready) {  // the consumers fetch it meanwhile
            named_barrier(4, 256 + 32 * Shared::kWeightStages);
            code_ready = true;
          }
          if (sub0 == 0) barrier_wait_idle(&s.weights_empty[at.stage], at.parity ^ 1);
#pragma unroll
          for (int sub = 0; sub < kTogether; ++sub) {
#pragma unroll
            for (int i = 0; i < kRows; ++i) {
              float v = value[sub][i];
              if (code[sub][i] >= 0) v = __fadd_rn(__fmul_rn(s.nested_code[code[sub][i]], v), offset);
              s.scales[at.stage][sub0 + sub][lane + 32 * i] = split_scale<T>(v);
            }
          }
        }
        barrier_arrive(&s.weights_full[at.stage]);
      }
      at.advance();
    }
  }
  if (!code_ready) named_barrier_arrive(4, 256 + 32 * Shared::kWeightStages);  // fewer chunks than warps
}

template <bool kDx, int kTokens>
__device__ __forceinline__ void produce_tiles(TileShared<kTokens>& s, const TileProblem& p, const CUtensorMap* x_map,
                                              const CUtensorMap* code_map, const ChunkRange& range, int tile_blocks) {
  using Shared = TileShared<kTokens>;
  RingPosition<Shared::kTokenStages> token_at;
  RingPosition<Shared::kWeightStages> weight_at;
  for (int tile = p.first_tile + blockIdx.x / p.split; tile < p.last_tile; tile += tile_blocks) {
    const TilePosition where = tile_position(p, tile);
    const int outs = where.out_tile * kTileOuts, tokens = where.token_tile * kTokens;
    for (int chunk = range.first; chunk < range.last; ++chunk) {
      const int depth = chunk * kTileChunk * kTileDepth;
      uint64_t* weights_full = &s.weights_full[weight_at.stage];
      barrier_wait(&s.weights_empty[weight_at.stage], weight_at.parity ^ 1);
      barrier_arrive_expect(weights_full, Shared::kCodeBytes);
      tensor_load(s.codes[weight_at.stage], code_map, kDx ? outs / 2 : depth / 2, kDx ? depth : outs, weights_full);
      weight_at.advance();
      for (int step = chunk * kTileChunk; step < (chunk + 1) * kTileChunk && step < range.last_step; ++step) {
        uint64_t* tokens_full = &s.tokens_full[token_at.stage];
        barrier_wait(&s.tokens_empty[token_at.stage], token_at.parity ^ 1);
        barrier_arrive_expect(tokens_full, Shared::kTokenBytes);
        tensor_load(s.tokens[token_at.stage], x_map, step * kTileDepth, tokens, tokens_full);
        token_at.advance();
      }
    }
  }
}

}  // namespace peftkern
