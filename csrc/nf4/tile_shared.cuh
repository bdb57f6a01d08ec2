// What the roles of nf4_tile share: the problem, the shared memory, rings, and who takes which tiles and chunks.
#pragma once

#include <cstdint>

#include "common/hopper.cuh"
#include "nf4/decode.cuh"
#include "nf4/tile_config.h"

namespace peftkern {

struct TileProblem {
  NF4DeviceWeight weight;
  int64_t weight_rows, weight_cols;
  const void* bias;  // [outs] or null
  int64_t M, outs;
  int token_tiles, out_tiles;
  int first_tile, last_tile;  // of this launch
  int steps;                  // of kTileDepth along the contraction
  int split;
};

template <int kTokens>
struct TileShared {
  static constexpr int kTokenStages = tile_token_stages(kTokens), kWeightStages = tile_weight_stages(kTokens);
  static constexpr int kTokenBytes = kTokens * kTileDepth * 2;
  static constexpr int kCodeBytes = kTileOuts * kTileDepth / 2 * kTileChunk;
  static constexpr int kOutBytes = kTileBatch * kTileOuts / 2 * 2;  // a batch of tokens, 64 outs of one warpgroup

  alignas(1024) uint8_t tokens[kTokenStages][kTokenBytes];
  alignas(1024) uint8_t codes[kWeightStages][kCodeBytes];
  alignas(1024) uint8_t out[2][2][kOutBytes];
  alignas(128) uint32_t pairs[256][32];  // byte -> its two codes in T, a copy for each lane in its own bank
  alignas(8) uint2 scales[kWeightStages][kTileChunk][kTileOuts];  // high and low part in T, each twice
  float nested_code[256];
  uint64_t tokens_full[kTokenStages], tokens_empty[kTokenStages];
  uint64_t weights_full[kWeightStages], weights_empty[kWeightStages];
};

// The chunks of the contraction [first, last) that a block of the cluster takes, and where its steps end.
struct ChunkRange {
  int first, last, last_step;
};

__device__ __forceinline__ ChunkRange chunk_range(const TileProblem& p, int rank) {
  const int chunks = (p.steps + kTileChunk - 1) / kTileChunk;
  const int first = chunks * rank / p.split, last = chunks * (rank + 1) / p.split;
  return {first, last, last * kTileChunk < p.steps ? last * kTileChunk : p.steps};
}

struct TilePosition {
  int token_tile, out_tile;
};

// Eight consecutive tiles along the tokens share their outs, so that the weight is read once for them all and their
// tokens stay in the L2 cache.
__device__ __forceinline__ TilePosition tile_position(const TileProblem& p, int tile) {
  constexpr int kGroup = 8;
  const int group = tile / (kGroup * p.out_tiles), first = group * kGroup;
  const int height = p.token_tiles - first < kGroup ? p.token_tiles - first : kGroup;
  const int within = tile - group * kGroup * p.out_tiles;
  return {first + within % height, within / height};
}

}  // namespace peftkern
