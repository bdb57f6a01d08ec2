// What the roles of nf4_mid_m share: its shape, the problem, shared memory.
#pragma once

#include <cstdint>

#include "nf4/decode.cuh"

namespace peftkern {

inline constexpr int kMidDepth = 64;  // of the contraction per step: no finer than a scale
inline constexpr int kMidChunk = 4;   // steps whose weights are loaded together, and stages of the tokens' ring that they meet

// Of a block: kTokens x at most kRows outs, a ring of kStages chunks of weights, kBlocks blocks on a multiprocessor.
// kBuffers: fragments of 32 columns a consumer holds; with 2 it decodes one while the tensor cores take the other.
// kSlices: warpgroups that share 64 outs, each taking every kSlices-th step. kRounds: chunks of tokens in
// their ring.
template <int kTokens_, int kRows_, int kStages_, int kBlocks_, int kBuffers_, int kSlices_ = 1,
          int kRounds_ = 1>
struct MidShape {
  static constexpr int kTokens = kTokens_, kRows = kRows_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kBuffers = kBuffers_, kSlices = kSlices_, kRounds = kRounds_;
  static_assert(kRounds == 1 || kRounds == 2, "");
  // Of two fragments the second step's releases the first step's tokens.
  static_assert(kBuffers == 1 || kSlices < kMidChunk * kRounds, "");
  static constexpr int kGroups = (kRows + 63) / 64;  // of 64 outs
  static constexpr int kConsumers = kGroups * kSlices * 128, kThreads = 128 + kConsumers;
  // What a thread starts with, then what producers keep and consumers get.
  static constexpr int kRegisters = 65536 / kBlocks / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kBlocks == 1 ? 56 : 40;
  static constexpr int kConsumerRegisters =
      (kRegisters * kThreads - kProducerRegisters * 128) / kConsumers / 8 * 8;
  static constexpr int kTokenBytes = kTokens * kMidDepth * 2;
};

struct MidProblem {
  NF4DeviceWeight weight;
  int64_t N, K;
  const void* bias;  // [N] or null
  void* y;
  int M, token_tiles;
  int rows;           // outs of a tile: a multiple of 16
  int chunks;         // of kMidChunk steps along the contraction
  int split;          // blocks of a cluster, which share a tile's contraction
  bool settled;       // nobody has written the weight recently: it may be read before the earlier kernels are done
  bool whole_words;   // the scale codes of a row's chunk are one aligned word, under one nested scale
  long long* profile;
};

#ifndef MID_PROFILE
#define MID_PROFILE 0
#endif
__device__ __forceinline__ void mark(const MidProblem& p, int slot) {
#if MID_PROFILE
  if (p.profile != nullptr) p.profile[blockIdx.x * 16 + slot] = clock64();
#endif
}

template <class Shape>
struct MidShared {
  alignas(1024) uint8_t codes[Shape::kStages][Shape::kRows * kMidChunk * kMidDepth / 2];
  alignas(1024) uint8_t tokens[Shape::kRounds * kMidChunk][Shape::kTokenBytes];
  alignas(128) uint32_t pairs[256][32];  // byte -> its two codes in T, a copy for each lane in its own bank
  alignas(8) uint2 scales[Shape::kStages][kMidChunk][Shape::kRows];  // high and low part in T, each twice
  float nested_code[256];
  uint64_t weights_full[Shape::kStages], weights_empty[Shape::kStages];
  uint64_t tokens_full[Shape::kRounds * kMidChunk], tokens_empty[Shape::kRounds * kMidChunk];
  uint64_t ready, received;  // of the cluster's exchange of sums
};

// A tile, and the chunks [first, last) that a block of its cluster takes.
struct MidPart {
  int token0, out0, first, last;
};

__device__ __forceinline__ MidPart mid_part(const MidProblem& p, int rank, int tokens) {
  const int tile = static_cast<int>(blockIdx.x) / p.split;
  // Neighbours share their outs, so that the weight is read once for all tokens.
  return {tile % p.token_tiles * tokens, tile / p.token_tiles * p.rows, p.chunks * rank / p.split,
          p.chunks * (rank + 1) / p.split};
}

}  // namespace peftkern
