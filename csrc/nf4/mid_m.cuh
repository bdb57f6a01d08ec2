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
#include "nf4/mid_m_produce.cuh"
#include "nf4/mid_m_write.cuh"

#ifndef MID_LOOKUP
#define MID_LOOKUP 0
#endif

namespace peftkern {

template <typename T>
__device__ __forceinline__ uint32_t mid_weight(uint32_t table, uint32_t word, uint32_t selector, uint2 scale) {
  uint32_t codes;
#if MID_LOOKUP == 0  // selector: 128 in this lane's byte
  const uint32_t at = __dp4a(word, selector, table);
#else
  const uint32_t at = table + __byte_perm(word, 0, selector) * 128;
#endif
  asm("ld.shared.u32 %0, [%1];" : "=r"(codes) : "r"(at));
  const auto pair = as_pair(codes, T());
  const auto weights = __hfma2(pair, as_pair(scale.x, T()), __hmul2(pair, as_pair(scale.y, T())));
  return *reinterpret_cast<const uint32_t*>(&weights);
}

// What a lane decodes at a time: packed words and scales of rows lane / 4 and lane / 4 + 8 of the warp's 16 outs, 32
// columns.
struct MidPiece {
  uint4 words[2];
  uint2 scales[2];
};

template <typename T, class Shape, bool kSplit, int kSlice>
__device__ __forceinline__ void consume(MidShared<Shape>& s, const MidProblem& p, const MidPart& part, int rank,
                                        int group, int warp, int lane) {
  constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;
  constexpr int kPieces = 2, kLastSub = kMidChunk - Shape::kSlices + kSlice;
  const int thread = group * 128 + warp * 32 + lane, row = lane / 4, out = group * 64 + warp * 16;
  const bool active = out < p.rows;
  if (p.weight.nested_code != nullptr) {
    for (int i = kSlice * Shape::kGroups * 128 + thread; i < 256; i += Shape::kConsumers) s.nested_code[i] = __ldg(p.weight.nested_code + i);
    named_barrier_arrive(kMidCodeBookBarrier, Shape::kConsumers + 32 * kMidScaleWarps);
  }
  if (group * 64 >= p.rows) {  // none of the tile's outs
    if constexpr (kSplit) cluster_wait();
    return;
  }
  uint32_t table = shared_address(s.pairs) + lane * 4;
#if MID_LOOKUP == 0
  uint32_t selector = 128u << 8 * (lane % 4);
#else
  uint32_t selector = 0x4440 | (lane % 4);
#endif
  uint32_t codes_at = (out + row) * 128 + row * 16;
  // Kept in registers: the compiler would compute them anew for every piece.
  asm volatile("" : "+r"(table), "+r"(selector), "+r"(codes_at));
  float d[Shape::kTokens / 2] = {};
  uint32_t a[Shape::kBuffers][2][4] = {};
  MidPiece raw;
  RingPosition<Shape::kStages> at;
  // Codes lie [rows][128 bytes]; the 128-byte swizzle permutes a row's 16-byte pieces by row % 8.
  const auto load = [&](int sub, int piece) {
    const uint8_t* base = s.codes[at.stage] + (codes_at ^ ((2 * sub + piece) * 16));
    raw.words[0] = *reinterpret_cast<const uint4*>(base);
    raw.words[1] = *reinterpret_cast<const uint4*>(base + 8 * 128);
    if (piece == 0) {
      raw.scales[0] = s.scales[at.stage][sub][out + row];
      raw.scales[1] = s.scales[at.stage][sub][out + row + 8];
    }
  };
  RingPosition<Shape::kRounds> round;
  barrier_wait(&s.weights_full[0], 0);
  if (thread == 0 && kSlice == 0) mark(p, 3);
  if (active) load(kSlice, 0);
#pragma unroll 1
  for (int chunk = part.first; chunk < part.last; ++chunk, round.advance()) {
#pragma unroll
    for (int sub = kSlice; sub < kMidChunk; sub += Shape::kSlices) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        const int stage = round.stage * kMidChunk + sub;
        auto& now = a[piece % Shape::kBuffers];
        if (active) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            now[0][r] = mid_weight<T>(table, raw.words[r].x, selector, raw.scales[r]);
            now[0][2 + r] = mid_weight<T>(table, raw.words[r].y, selector, raw.scales[r]);
            now[1][r] = mid_weight<T>(table, raw.words[r].z, selector, raw.scales[r]);
            now[1][2 + r] = mid_weight<T>(table, raw.words[r].w, selector, raw.scales[r]);
          }
        }
        if (piece == 0) {
          barrier_wait(&s.tokens_full[stage], round.parity);
          if (sub == 0 && thread == 0 && chunk == part.first) mark(p, 4);
        }
        const uint64_t tokens = wgmma_descriptor(shared_address(s.tokens[stage])) + 4 * piece;
        wgmma_fence();
        WgmmaRS<Shape::kTokens>::template mma<kBFloat16>(d, now[0], tokens, 1);
        WgmmaRS<Shape::kTokens>::template mma<kBFloat16>(d, now[1], tokens + 2, 1);
        wgmma_commit();
        // While the tensor cores work, the next piece's words.
        if (sub == kLastSub && piece == kPieces - 1) {
          __syncwarp();
          if (lane == 0) barrier_arrive(&s.weights_empty[at.stage]);
          at.advance();
          if (chunk + 1 < part.last) {
            barrier_wait(&s.weights_full[at.stage], at.parity);
            if (active) load(kSlice, 0);
          }
        } else if (active) {
          load(sub + (piece + 1) / kPieces * Shape::kSlices, (piece + 1) % kPieces);
        }
        wgmma_wait<Shape::kBuffers - 1>();  // the fragments decoded next are free
        constexpr int kLast = kPieces - Shape::kBuffers;  // after this piece's wait a step's tokens are free
        if (kLast == 0 ? piece == 0 && (sub > kSlice || chunk > part.first) : piece == kLast) {
          constexpr int kRing = Shape::kRounds * kMidChunk;
          const int done = kLast == 0 ? (stage + kRing - Shape::kSlices) % kRing : stage;
          if (lane == 0) barrier_arrive(&s.tokens_empty[done]);
        }
      }
    }
  }
  wgmma_wait<0>();
  // What follows may not be moved up to where it would read sums in flight: the compiler would serialize the products.
#pragma unroll
  for (int i = 0; i < Shape::kTokens / 2; ++i) asm volatile("" : "+f"(d[i]));
  if (thread == 0 && kSlice == 0) mark(p, 5);
  if (p.settled) wait_for_earlier_kernels();
  if constexpr (kSplit) {
    cluster_wait();  // the barriers of all blocks are there
    reduce_and_write<T>(s, p, part, d, rank, kSlice, thread, out, lane);
  } else if (active) {
    MidWriter<T> writer(p, part, out, lane);
#pragma unroll
    for (int j = 0; j < Shape::kTokens / 8; ++j) {
      if (part.token0 + 8 * j < p.M) writer.write(j, {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]});
    }
  }
  if (thread == 0 && kSlice == 0) mark(p, 8);
#if MID_PROFILE
  if (thread == 0 && kSlice == 0 && p.profile != nullptr) {
    uint32_t sm;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
    p.profile[blockIdx.x * 16 + 9] = sm;
    long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    p.profile[blockIdx.x * 16 + 11] = now;
  }
#endif
}

template <typename T, class Shape, bool kSplit>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    nf4_mid_m_kernel(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap code_map,
                     const __grid_constant__ MidProblem p) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  MidShared<Shape>& s = *reinterpret_cast<MidShared<Shape>*>(shared_bytes);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = kSplit ? static_cast<int>(cluster_rank()) : 0;
  const MidPart part = mid_part(p, rank, Shape::kTokens);
  if (threadIdx.x == 0) mark(p, 0);
#if MID_PROFILE
  if (threadIdx.x == 0 && p.profile != nullptr) {
    long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    p.profile[blockIdx.x * 16 + 10] = now;
  }
#endif
  if (p.settled) {
    allow_next_kernel();
  } else {
    prefetch_part<Shape>(p, part, &code_map);
  }
  if (threadIdx.x == 0) {
    tensor_map_prefetch(&x_map);
    const int groups = (p.rows + 63) / 64;  // with outs of the tile
    for (int i = 0; i < Shape::kStages; ++i) {
      barrier_init(&s.weights_full[i], 2);  // the loading thread and the scales' warp
      barrier_init(&s.weights_empty[i], groups * Shape::kSlices * 4);
    }
    for (int i = 0; i < Shape::kRounds * kMidChunk; ++i) {
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
  if constexpr (kSplit) cluster_arrive_relaxed();
  if (threadIdx.x == 0) mark(p, 1);
  if (!p.settled) {
    wait_for_earlier_kernels();
    allow_next_kernel();
  }
  if (warp < 4) {
    registers_decrease<Shape::kProducerRegisters>();
    if (warp == 0) {
      if (lane == 0) produce_codes(s, p, part, &code_map);
    } else if (warp == 1) {
      if (p.settled) wait_for_earlier_kernels();
      if (lane == 0) mark(p, 2);
      if (lane == 0) produce_tokens(s, part, &x_map);
    } else {
      produce_scales<T>(s, p, part, warp - 2, lane);
    }
    __syncwarp();
    if constexpr (kSplit) cluster_wait();
  } else {
    registers_increase<Shape::kConsumerRegisters>();
    const int group = warp / 4 - 1;
    if constexpr (Shape::kSlices == 1) {
      consume<T, Shape, kSplit, 0>(s, p, part, rank, group, warp % 4, lane);
    } else if (group < Shape::kGroups) {
      consume<T, Shape, kSplit, 0>(s, p, part, rank, group, warp % 4, lane);
    } else if (Shape::kSlices == 2 || group < 2 * Shape::kGroups) {
      consume<T, Shape, kSplit, 1>(s, p, part, rank, group - Shape::kGroups, warp % 4, lane);
    } else if (group < 3 * Shape::kGroups) {
      consume<T, Shape, kSplit, 2 % Shape::kSlices>(s, p, part, rank, group - 2 * Shape::kGroups, warp % 4, lane);
    } else {
      consume<T, Shape, kSplit, 3 % Shape::kSlices>(s, p, part, rank, group - 3 * Shape::kGroups, warp % 4, lane);
    }
  }
}

}  // namespace peftkern
