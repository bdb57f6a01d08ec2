// nf4_mid_m: y[M, N] = x[M, K] dequant(weight[N, K])^T + bias for 17 to 128 tokens on wgmma (sm_90a), straight from the
// stored bytes.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "common/dependent_launch.cuh"
#include "common/hopper.cuh"
#include "common/nf4_code.h"
#include "common/wgmma.cuh"
#include "nf4/low_rank_parts.cuh"
#include "nf4/mid_m_decode.cuh"
#include "nf4/mid_m_produce.cuh"
#include "nf4/mid_m_write.cuh"

namespace peftkern {

// Multiplies this warp's 16 outs of every kSlices-th step into d. While the tensor cores take one piece, the lookups of
// the next are in flight and the words of the one after it are being loaded.
template <typename T, class Shape, int kSlice>
__device__ __forceinline__ void multiply(MidShared<Shape>& s, const MidPart& part, bool active, int out, int lane,
                                         float (&d)[Shape::kTokens / 2]) {
  constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;
  constexpr int kBuffers = Shape::kBuffers, kSlices = Shape::kSlices, kPieces = 2 * kMidChunk / kSlices;
  MidDecoder<T, Shape> decoder(s, out, lane);
  uint32_t a[kBuffers][2][4] = {};
  RingPosition<Shape::kStages> at;
  RingPosition<Shape::kRounds> round;
  barrier_wait(&s.weights_full[0], 0);
  if (active) {
    decoder.load_words(0, 2 * kSlice);
    decoder.load_scales(0, kSlice, 0);
    decoder.look_up();
    decoder.load_words(0, 2 * kSlice + 1);
  }
#pragma unroll 1
  for (int i = 0; i < part.count; ++i, round.advance()) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      const int sub = kSlice + piece / 2 * kSlices, half = piece % 2;  // of the chunk's steps, of the step
      const int stage = round.stage * kMidChunk + sub;
      auto& now = a[piece % kBuffers];
      if (active) {
        decoder.finish(now, piece / 2 % kBuffers);
        decoder.look_up();
      }
      if (half == 0) barrier_wait(&s.tokens_full[stage], round.parity);
      const uint64_t tokens = wgmma_descriptor(shared_address(s.tokens[stage])) + 4 * half;
      wgmma_fence();
      WgmmaRS<Shape::kTokens>::template mma<kBFloat16>(d, now[0], tokens, 1);
      WgmmaRS<Shape::kTokens>::template mma<kBFloat16>(d, now[1], tokens + 2, 1);
      wgmma_commit();
      const bool more = piece < kPieces - 2 || i + 1 < part.count;
      if (piece == kPieces - 2) {  // the chunk's words are all in registers
        barrier_arrive(&s.weights_empty[at.stage]);
        at.advance();
        if (more) barrier_wait(&s.weights_full[at.stage], at.parity);
      }
      if (active && more) {
        const int next = (piece + 2) % kPieces / 2;  // step of the chunk
        decoder.load_words(at.stage, 2 * (kSlice + next * kSlices) + half);
        if (half == kBuffers % 2) decoder.load_scales(at.stage, kSlice + next * kSlices, next % kBuffers);
      }
      wgmma_wait<kBuffers - 1>();  // the fragments made next are free
      // Of two fragments the second step's releases the first step's tokens.
      if (kBuffers == 1 ? half == 1 : half == 0 && (piece > 0 || i > 0)) {
        const int done = kBuffers == 1 ? stage : (stage - kSlices) & (Shape::kTokenStages - 1);
        if (lane == 0) barrier_arrive(&s.tokens_empty[done]);
      }
    }
  }
  wgmma_wait<0>();
  // What follows may not be moved up to where it would read sums in flight: the compiler would serialize the products.
#pragma unroll
  for (int i = 0; i < Shape::kTokens / 2; ++i) asm volatile("" : "+f"(d[i]));
}

// That meet when S is there: the consumers with outs and the warp of the codes.
template <class Shape>
__device__ __forceinline__ int low_rank_threads(const MidProblem& p) {
  return (p.rows + 63) / 64 * Shape::kSlices * 128 + 32;
}

// slice: of the warpgroups that share a tile's outs and take turns with the steps.
template <typename T, class Shape, bool kCluster, class Problem>
__device__ __forceinline__ void consume(MidShared<Shape>& s, const Problem& p, const MidPart& part, int slice,
                                        int group, int warp, int lane) {
  constexpr int kLast = Shape::kSlices - 1;
  const int thread = group * 128 + warp * 32 + lane, out = group * 64 + warp * 16;
  if (p.weight.nested_code != nullptr) {
    for (int i = slice * Shape::kGroups * 128 + thread; i < 256; i += Shape::kConsumers) {
      s.nested_code[i] = __ldg(p.weight.nested_code + i);
    }
    named_barrier_arrive(kMidCodeBookBarrier, Shape::kConsumers + 32 * kMidScaleWarps);
  }
  if (group * 64 >= p.rows) {  // none of the tile's outs
    if constexpr (kCluster) cluster_wait();
    return;
  }
  float d[Shape::kTokens / 2] = {};
  if (slice == 0) {
    multiply<T, Shape, 0>(s, part, out < p.rows, out, lane, d);
  } else {
    multiply<T, Shape, kLast>(s, part, out < p.rows, out, lane, d);
  }
  if (p.early) wait_for_earlier_kernels();
  if constexpr (std::is_same<Problem, MidLowRankProblem>::value) {
    MidLowRankTerm<T, Shape> term(p, part, slice, out, lane);
    named_barrier(kMidLowRankBarrier, low_rank_threads<Shape>(p));
    if (out < p.rows) term.add(lane / 4, p.M, d);
  }
  if constexpr (kCluster) cluster_wait();  // the barriers of all blocks are there
  if constexpr (Shape::kSlices > 1) add_slices<Shape>(s, p, slice, thread, d);
  if constexpr (kCluster) {
    if (slice == 0) {
      exchange_and_write<T, Shape, 0>(s, p, part, d, thread, out, lane);
    } else {
      exchange_and_write<T, Shape, kLast>(s, p, part, d, thread, out, lane);
    }
  } else if (out < p.rows) {
    constexpr int kOwn = Shape::kTokens / 8 / Shape::kSlices;
    MidWriter<T> writer(p, part, out, lane);
#pragma unroll
    for (int j = 0; j < Shape::kTokens / 8; ++j) {
      if (j / kOwn == slice && 8 * j < p.M) writer.write(j, {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]});
    }
  }
}

template <typename T, class Shape, bool kCluster, class Problem>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    nf4_mid_m_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap code_map,
                     const __grid_constant__ Problem p) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  MidShared<Shape>& s = *reinterpret_cast<MidShared<Shape>*>(shared_bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  if constexpr (std::is_same<Problem, MidLowRankProblem>::value) {
    block -= p.makers, blocks -= p.makers;
    if (block < 0) {
      allow_next_kernel();
      if (blockIdx.x >= part_tasks(p.low_rank, p.parts)) return;  // it fills a cluster
      static_assert(sizeof s.codes >= Shape::kThreads * 32, "for sums");
      make_part<T, Shape::kTokens / 8, Shape::kThreads / 32>(p.low_rank, p.parts, static_cast<const T*>(p.x), p.M, p.K,
                                                             blockIdx.x, shared_address(&s));
      finish_part<T>(p.low_rank, p.parts, p.M, blockIdx.x, blocks, reinterpret_cast<int*>(&s), Shape::kThreads);
      return;
    }
  }
  const MidPart part = mid_part(p, block);
  if (p.early) {
    allow_next_kernel();
  } else {
    prefetch_part<Shape>(p, part, &code_map);
  }
  if constexpr (std::is_same<Problem, MidLowRankProblem>::value) {
    prefetch_rows(p.low_rank, part.out0, min(static_cast<int64_t>(part.out0 + p.rows), p.N), threadIdx.x,
                  Shape::kThreads);
  }
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&x_map);
    tensor_map_prefetch(&code_map);
    const int groups = (p.rows + 63) / 64;  // with outs of the tile
    for (int i = 0; i < Shape::kStages; ++i) {
      barrier_init(&s.weights_full[i], 33);  // the loading thread and the scales' warp
      barrier_init(&s.weights_empty[i], groups * Shape::kSlices * 128);
    }
    for (int i = 0; i < Shape::kTokenStages; ++i) {
      barrier_init(&s.tokens_full[i], 1);
      barrier_init(&s.tokens_empty[i], groups * 4);
    }
    barrier_init(&s.ready, p.split * groups * Shape::kSlices * 4);
    barrier_init(&s.received, 1);
    barrier_init_fence();
  }
  for (int i = threadIdx.x; i < 256 * 8; i += Shape::kThreads) {
    const uint32_t pair = pack_pair<T>(kNF4CodeDevice[(i / 8) >> 4], kNF4CodeDevice[(i / 8) & 15]);
    reinterpret_cast<uint4*>(s.pairs)[i] = make_uint4(pair, pair, pair, pair);
  }
  __syncthreads();
  if constexpr (kCluster) cluster_arrive_relaxed();
  if (!p.early) {
    wait_for_earlier_kernels();
    allow_next_kernel();
  }
  if (warp < 4) {
    registers_decrease<Shape::kProducerRegisters>();
    if (warp == 0) {
      if (lane == 0) produce_codes(s, p, part, &code_map);
      if constexpr (std::is_same<Problem, MidLowRankProblem>::value) {
        if (p.early) wait_for_earlier_kernels();  // which may count with the same turnstile
        if (lane == 0) wait_for_whole(p.low_rank, blocks);
        __syncwarp();
        named_barrier_arrive(kMidLowRankBarrier, low_rank_threads<Shape>(p));
      }
    } else if (warp == 1) {
      if (p.early) wait_for_earlier_kernels();
      if (lane == 0) produce_tokens(s, p, part, &x_map);
    } else {
      produce_scales<T>(s, p, part, warp - 2, lane);
    }
    __syncwarp();
    if constexpr (kCluster) cluster_wait();
  } else {
    registers_increase<Shape::kConsumerRegisters>();
    const int group = warp / 4 - 1;
    const int slice = Shape::kSlices == 1 ? 0 : group / Shape::kGroups;
    consume<T, Shape, kCluster>(s, p, part, slice, group - slice * Shape::kGroups, warp % 4, lane);
  }
}

}  // namespace peftkern
