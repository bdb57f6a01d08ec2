// nf4_mid_m's producers: a thread each for packed weights and tokens, two warps for scales.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/dependent_launch.cuh"
#include "common/hopper.cuh"
#include "nf4/mid_m_shared.cuh"
#include "nf4/tile_decode.cuh"

namespace peftkern {

inline constexpr int kMidScaleWarps = 2;
// Named barriers: the consumers fetch the nested code book, the scale warps wait for it; the consumers; the warp of the
// codes learns that S is there, the consumers wait for it.
inline constexpr int kMidCodeBookBarrier = 1, kMidSlicesBarrier = 2, kMidLowRankBarrier = 3;

// What the block starts with into the L2 cache: an earlier kernel may be writing it, so that it may not be read yet,
// and its first touch costs the most.
template <class Shape>
__device__ __forceinline__ void prefetch_part(const MidProblem& p, const MidPart& part, const CUtensorMap* code_map) {
  const NF4DeviceWeight& w = p.weight;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < min(Shape::kStages, part.count)) {
    tensor_prefetch(code_map, part.chunk(thread) * (kMidChunk * kMidDepth / 2), part.out0);
  }
  for (int i = thread; i < p.rows && part.out0 + i < p.N; i += Shape::kThreads) {
    const int64_t block = ((part.out0 + i) * p.K + part.chunk(0) * (kMidChunk * kMidDepth)) >> w.log2_blocksize;
    if (w.absmax_codes == nullptr) {
      prefetch_l2(w.absmax + block);
    } else {
      prefetch_l2(w.absmax_codes + block);
      if (i % 8 == 0) prefetch_l2(w.nested_absmax + (block >> w.log2_nested_blocksize));
    }
  }
  if (w.nested_code != nullptr && thread < 9) {
    prefetch_l2(thread < 8 ? w.nested_code + thread * 32 : w.nested_offset);
  }
}

template <class Shape>
__device__ __forceinline__ void produce_codes(MidShared<Shape>& s, const MidProblem& p, const MidPart& part,
                                              const CUtensorMap* code_map) {
  RingPosition<Shape::kStages> at;
  for (int i = 0; i < part.count; ++i, at.advance()) {
    barrier_wait(&s.weights_empty[at.stage], at.parity ^ 1);
    barrier_arrive_expect(&s.weights_full[at.stage], p.rows * (kMidChunk * kMidDepth / 2));
    tensor_load(s.codes[at.stage], code_map, part.chunk(i) * (kMidChunk * kMidDepth / 2), part.out0,
                &s.weights_full[at.stage]);
  }
}

template <class Shape>
__device__ __forceinline__ void produce_tokens(MidShared<Shape>& s, const MidProblem& p, const MidPart& part,
                                               const CUtensorMap* x_map) {
  RingPosition<Shape::kRounds> at;
  for (int i = 0; i < part.count; ++i, at.advance()) {
    const int column = part.chunk(i) * (kMidChunk * kMidDepth);
#pragma unroll
    for (int sub = 0; sub < kMidChunk; ++sub) {
      const int stage = at.stage * kMidChunk + sub;
      barrier_wait(&s.tokens_empty[stage], at.parity ^ 1);
      barrier_arrive_expect(&s.tokens_full[stage], p.M * (kMidDepth * 2));
      tensor_load(s.tokens[stage], x_map, column + sub * kMidDepth, 0, &s.tokens_full[stage]);
    }
  }
}

// Decodes the scales of every other chunk, the loads of a chunk in flight together.
template <typename T, class Shape>
__device__ __forceinline__ void produce_scales(MidShared<Shape>& s, const MidProblem& p, const MidPart& part, int warp,
                                               int lane) {
  constexpr int kLaneRows = (Shape::kRows + 31) / 32;
  const NF4DeviceWeight& w = p.weight;
  const bool nested = w.absmax_codes != nullptr;
  const float offset = nested ? __ldg(w.nested_offset) : 0.0f;
  bool code_book_ready = !nested;
  const auto wait_for_code_book = [&] {
    if (!code_book_ready) named_barrier(kMidCodeBookBarrier, Shape::kConsumers + 32 * kMidScaleWarps);
    code_book_ready = true;
  };
  const int live_rows = static_cast<int>(min(static_cast<int64_t>(p.rows), p.N - part.out0));
  int stage = warp % Shape::kStages;
  uint32_t parity = 1 ^ (warp / Shape::kStages);
  for (int turn = warp; turn < part.count; turn += kMidScaleWarps) {
    const auto store = [&](int i, int sub, float scale) {
      const int row = lane + 32 * i;
      if (row < Shape::kRows) s.scales[stage][sub][row] = split_scale<T>(row < live_rows ? scale : 0.0f);
    };
    const auto decode = [&](uint32_t code, float nested_scale) {
      return __fadd_rn(__fmul_rn(s.nested_code[code], nested_scale), offset);
    };
    // A lane's rows are lane, lane + 32, ... of the tile; those beyond it or the weight read row 0 and count as 0.
    const uint32_t blocks = static_cast<uint32_t>(p.K / kMidDepth), first_block = part.chunk(turn) * kMidChunk;
    const auto block_of = [&](int i, int sub) {
      const int row = lane + 32 * i < live_rows ? part.out0 + lane + 32 * i : 0;
      return (static_cast<uint32_t>(row) * blocks + first_block + sub) >> (w.log2_blocksize - 6);
    };
    if (p.whole_words) {
      uint32_t codes[kLaneRows];
      float nested_scale[kLaneRows];
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
        const uint32_t block = block_of(i, 0);
        codes[i] = __ldg(reinterpret_cast<const uint32_t*>(w.absmax_codes + block));
        nested_scale[i] = __ldg(w.nested_absmax + (block >> w.log2_nested_blocksize));
      }
      wait_for_code_book();
      barrier_wait_idle(&s.weights_empty[stage], parity);
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
        for (int sub = 0; sub < kMidChunk; ++sub) {
          store(i, sub, decode(codes[i] >> 8 * sub & 255, nested_scale[i]));
        }
      }
    } else {
      wait_for_code_book();
      barrier_wait_idle(&s.weights_empty[stage], parity);
#pragma unroll 1
      for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
        for (int sub = 0; sub < kMidChunk; ++sub) {
          float scale = 0.0f;
          if (first_block + sub < blocks) {
            const uint32_t block = block_of(i, sub);
            scale = nested ? decode(__ldg(w.absmax_codes + block),
                                    __ldg(w.nested_absmax + (block >> w.log2_nested_blocksize)))
                           : __ldg(w.absmax + block);
          }
          store(i, sub, scale);
        }
      }
    }
    barrier_arrive(&s.weights_full[stage]);
    stage += kMidScaleWarps;
    if (stage >= Shape::kStages) {
      stage -= Shape::kStages;
      parity ^= 1;
    }
  }
  if (!code_book_ready) named_barrier_arrive(kMidCodeBookBarrier, Shape::kConsumers + 32 * kMidScaleWarps);
}

}  // namespace peftkern
