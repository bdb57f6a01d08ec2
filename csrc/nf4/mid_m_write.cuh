// nf4_mid_m's end: sums in registers to rows of y, across a cluster where its blocks hold parts of them.
#pragma once

#include <cstdint>

#include "common/hopper.cuh"
#include "nf4/low_rank.cuh"
#include "nf4/mid_m_shared.cuh"
#include "nf4/tile_decode.cuh"

namespace peftkern {

// Writes this lane's part of 8 tokens x the warp's 16 outs.
template <typename T>
class MidWriter {
 public:
  __device__ __forceinline__ MidWriter(const MidProblem& p, const MidPart& part, int out, int lane)
      : M_(p.M), N_(p.N), out_(part.out0 + out + lane % 4 * 2), token_(lane / 4) {
    const int row = part.out0 + out + lane / 4;
    const T* bias = static_cast<const T*>(p.bias);
    bias_low_ = bias != nullptr && row < p.N ? to_float(bias[row]) : 0.0f;
    bias_high_ = bias != nullptr && row + 8 < p.N ? to_float(bias[row + 8]) : 0.0f;
    y_ = static_cast<T*>(p.y) + token_ * p.N + out_;
  }

  // v: four sums of tokens 8 j to 8 j + 7, as wgmma leaves them.
  __device__ __forceinline__ void write(int j, float4 v) {
    // Transposed, a lane holds two neighbouring outs of one token.
    const uint32_t low = transpose_8x8(pack_pair<T>(v.x + bias_low_, v.y + bias_low_));
    const uint32_t high = transpose_8x8(pack_pair<T>(v.z + bias_high_, v.w + bias_high_));
    if (token_ + 8 * j >= M_) return;
    uint32_t* to = reinterpret_cast<uint32_t*>(y_ + 8 * j * N_);
    if (out_ < N_) to[0] = low;
    if (out_ + 8 < N_) to[4] = high;
  }

 private:
  int M_;
  int64_t N_;
  int out_, token_;
  T* y_;
  float bias_low_, bias_high_;
};

// The low-rank term of a warp's 16 outs. Blocks and warpgroups that share outs take turns with the term's steps.
template <typename T, class Shape>
class MidLowRankTerm {
 public:
  // Loads what the first step needs of B.
  __device__ __forceinline__ MidLowRankTerm(const MidLowRankProblem& p, const MidPart& part, int slice, int out,
                                            int lane)
      : l_(p.low_rank),
        row_(part.out0 + out + lane / 4),
        column_((part.rank * Shape::kSlices + slice) * 16 + lane % 4 * 4),
        stride_(p.split * Shape::kSlices * 16),
        top_valid_(out < p.rows && row_ < p.N),
        bottom_valid_(out < p.rows && row_ + 8 < p.N) {
    load();
  }

  // Adds it to the warp's sums, once S is there. The acquire of the thread that waited for it, and the barrier behind
  // that, make what other multiprocessors wrote visible to loads through the L1 cache. token: of this lane, the first
  // of M.
  __device__ __forceinline__ void add(int token, int M, float (&d)[Shape::kTokens / 2]) {
    constexpr int kGroups = Shape::kTokens / 8;
#pragma unroll 1
    while (column_ < l_.padded) {
      const uint2* S = reinterpret_cast<const uint2*>(static_cast<const T*>(l_.whole) + token * l_.padded + column_);
      uint2 tokens[kGroups];
#pragma unroll
      for (int j = 0; j < kGroups; ++j) tokens[j] = 8 * j + token < M ? S[j * 2 * l_.padded] : uint2{};
      const uint2 low = top_.template convert<T>(l_), high = bottom_.template convert<T>(l_);
      column_ += stride_;
      load();
#pragma unroll
      for (int j = 0; j < kGroups; ++j) {
        float sums[4] = {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]};
        add_step<T>(sums, l_.factor, low, high, tokens[j]);
#pragma unroll
        for (int i = 0; i < 4; ++i) d[4 * j + i] = sums[i];
      }
    }
  }

 private:
  __device__ __forceinline__ void load() {
    top_.load(l_, row_, column_, top_valid_);
    bottom_.load(l_, row_ + 8, column_, bottom_valid_);
  }

  const NF4LowRank& l_;
  int64_t row_;
  int column_, stride_;
  bool top_valid_, bottom_valid_;
  RawFour top_, bottom_;
};

// The sums of two warpgroups that share outs: each adds up half of the tokens. They meet in the rings, which
// by then are idle.
template <class Shape>
__device__ __forceinline__ void add_slices(MidShared<Shape>& s, const MidProblem& p, int slice, int thread,
                                           float (&d)[Shape::kTokens / 2]) {
  constexpr int kHalf = Shape::kTokens / 16;  // groups of 8 tokens of a warpgroup
  const int threads = (p.rows + 63) / 64 * 128;
  float4* sums = reinterpret_cast<float4*>(&s) + thread;
  named_barrier(kMidSlicesBarrier, 2 * threads);
#pragma unroll
  for (int j = 0; j < 2 * kHalf; ++j) {
    if (j / kHalf != slice) sums[j * threads] = make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
  }
  named_barrier(kMidSlicesBarrier, 2 * threads);
#pragma unroll
  for (int j = 0; j < 2 * kHalf; ++j) {
    if (j / kHalf != slice) continue;
    const float4 v = sums[j * threads];
    d[4 * j] += v.x, d[4 * j + 1] += v.y, d[4 * j + 2] += v.z, d[4 * j + 3] += v.w;
  }
  named_barrier(kMidSlicesBarrier, 2 * threads);  // the exchange writes where these were
}

// The parts of a cluster's blocks become the tile: every block sends its sums of a share of the tokens to the block
// that owns the share, which adds them up in rank order. They land in the rings, which by then are idle.
template <typename T, class Shape, int kSlice>
__device__ __forceinline__ void exchange_and_write(MidShared<Shape>& s, const MidProblem& p, const MidPart& part,
                                                   const float (&d)[Shape::kTokens / 2], int thread, int out,
                                                   int lane) {
  constexpr int kOwn = Shape::kTokens / 8 / Shape::kSlices;  // groups of 8 tokens of this slice
  const int share = (kOwn + p.split - 1) / p.split, cell = p.rows * 2 * 16;
  const int live = (p.M + 7) / 8;
  const auto owned = [&](int slice) {  // with tokens, by this block
    return max(min(min(live - slice * kOwn, kOwn), (part.rank + 1) * share) - part.rank * share, 0);
  };
  const uint32_t received = shared_address(&s.received);
  if (lane < p.split) cluster_barrier_arrive(cluster_address(shared_address(&s.ready), lane));
  if (thread == 0 && kSlice == 0) {
    int cells = owned(0);
    if (Shape::kSlices > 1) cells += owned(1);
    barrier_arrive_expect(&s.received, (p.split - 1) * cells * cell);
  }
  barrier_wait(&s.ready, 0);
  if (out >= p.rows) return;
  uint8_t* parts = reinterpret_cast<uint8_t*>(&s) + kSlice * p.split * share * cell + thread * 16;
  uint8_t* from = parts + part.rank * share * cell;
  int owner = 0, at = 0;
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int i = 4 * (kSlice * kOwn + j);
    if (kSlice * kOwn + j < live) {
      if (owner == part.rank) {
        *reinterpret_cast<float4*>(from + at * cell) = make_float4(d[i], d[i + 1], d[i + 2], d[i + 3]);
      } else {
        cluster_send(cluster_address(shared_address(from + at * cell), owner), cluster_address(received, owner), d[i],
                     d[i + 1], d[i + 2], d[i + 3]);
      }
    }
    if (++at == share) {
      at = 0;
      ++owner;
    }
  }
  MidWriter<T> writer(p, part, out, lane);
  barrier_wait(&s.received, 0);
  const int mine = owned(kSlice);
#pragma unroll 1
  for (int i = 0; i < mine; ++i) {
    const uint8_t* next = parts + i * cell;
    float4 sum = *reinterpret_cast<const float4*>(next);
#pragma unroll 4
    for (int r = 1; r < p.split; ++r) {
      next += share * cell;
      const float4 v = *reinterpret_cast<const float4*>(next);
      sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    }
    writer.write(kSlice * kOwn + part.rank * share + i, sum);
  }
}

}  // namespace peftkern
