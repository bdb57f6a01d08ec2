// What the roles of nf4_mid_m share: its shape, the problem, shared memory.
#pragma once

#include <cstdint>

#include "nf4/decode.cuh"
#include "nf4/low_rank.h"
#include "nf4/mid_m_config.h"

namespace peftkern {

template <const MidMShape& S>
struct MidShape {
  static constexpr int kTokens = S.tokens, kRows = S.rows, kStages = S.stages, kRounds = S.rounds;
  static constexpr int kSlices = S.slices, kBuffers = S.buffers, kBlocks = S.blocks;
  static constexpr bool kEarly = S.early;
  static_assert(kRounds == 1 || kRounds == 2, "");
  static_assert(kSlices == 1 || kSlices == 2, "");  // a consumer's steps per chunk are even: scales alternate
  static constexpr int kGroups = S.groups(), kConsumers = S.consumers(), kThreads = S.threads();
  // What a thread starts with, then what producers keep and consumers get.
  static constexpr int kRegisters = 65536 / kBlocks / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kBlocks == 1 ? 56 : 40;
  static constexpr int kConsumerRegisters = (kRegisters * kThreads - kProducerRegisters * 128) / kConsumers / 8 * 8;
  static constexpr int kTokenStages = kRounds * kMidChunk;
};

struct MidProblem {
  NF4DeviceWeight weight;
  int64_t N, K;
  const void* bias;  // [N] or null
  void* y;
  int M;
  int rows;          // of a tile: a multiple of 16
  int chunks;        // of kMidChunk steps along the contraction
  int split;         // blocks of a cluster, which share a tile's contraction
  bool early;        // nobody has written the weight recently: it is read before the earlier kernels are done
  bool whole_words;  // the scale codes of a row's chunk are one aligned word, under one nested scale
};

struct MidLowRankProblem : MidProblem {
  NF4LowRank low_rank;
  const void* x;
  int parts;   // in which S is made
  int makers;  // blocks before the others that make them, whole clusters of them
};

template <class Shape>
struct MidShared {
  alignas(1024) uint8_t codes[Shape::kStages][Shape::kRows * kMidChunk * kMidDepth / 2];
  alignas(1024) uint8_t tokens[Shape::kTokenStages][Shape::kTokens * kMidDepth * 2];
  alignas(128) uint32_t pairs[256][32];  // byte -> its two codes in T, a copy for each lane in its own bank
  alignas(8) uint2 scales[Shape::kStages][kMidChunk][Shape::kRows];  // high and low part in T, each twice
  float nested_code[256];
  uint64_t weights_full[Shape::kStages], weights_empty[Shape::kStages];
  uint64_t tokens_full[Shape::kTokenStages], tokens_empty[Shape::kTokenStages];
  uint64_t ready, received;  // of the cluster's exchange of sums
};

// A block's outs, and its part of the contraction: `count` chunks from `first` on, taken in turn from `start` on.
struct MidPart {
  int out0, first, count, start;
  int rank;  // in the cluster

  __device__ __forceinline__ int chunk(int i) const {
    return first + (start + i < count ? start + i : start + i - count);
  }
};

__device__ __forceinline__ MidPart mid_part(const MidProblem& p, int block) {
  MidPart part;
  part.rank = block % p.split;
  part.out0 = block / p.split * p.rows;
  part.first = p.chunks * part.rank / p.split;
  part.count = p.chunks * (part.rank + 1) / p.split - part.first;
  // Tiles start at different chunks: reading the same tokens at the same time, they would queue at a few slices of L2.
  part.start = block / p.split % part.count;
  return part;
}

}  // namespace peftkern
