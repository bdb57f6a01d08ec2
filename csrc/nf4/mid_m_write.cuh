// nf4_mid_m's end: sums in registers to rows of y, across a cluster where its blocks hold parts of them.
#pragma once

#include <cstdint>

#include "common/hopper.cuh"
#include "nf4/mid_m_shared.cuh"
#include "nf4/tile_decode.cuh"

namespace peftkern {

// Writes this lane's part of 8 tokens x the warp's 16 outs.
template <typename T>
class MidWriter {
 public:
  __device__ __forceinline__ MidWriter(const MidProblem& p, const MidPart& part, int out, int lane)
      : M_(p.M), N_(p.N), out_(part.out0 + out + lane % 4 * 2), token_(part.token0 + lane / 4) {
    const int row = part.out0 + out + lane / 4;
    const T* bias = static_cast<const T*>(p.bias);
    bias_low_ = bias != nullptr && row < p.N ? to_float(bias[row]) : 0.0f;
    bias_high_ = bias != nullptr && row + 8 < p.N ? to_float(bias[row + 8]) : 0.0f;
    y_ = static_cast<T*>(p.y) + token_ * p.N + out_;
  }

  // v: four sums of tokens 8 j to 8 j + 7 of the tile, as wgmma leaves them.
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

// The parts of a cluster's blocks become the tile: every block sends its sums of a share of the tokens to the block
// that owns the share, which adds them up in rank order. They land in the rings, which by then are idle.
template <typename T, class Shape>
__device__ __forceinline__ void reduce_and_write(MidShared<Shape>& s, const MidProblem& p, const MidPart& part,
                                                 const float (&d)[Shape::kTokens / 2], int rank, int slice, int thread, int out,
                                                 int lane) {
  const int live = min((p.M - part.token0 + 7) / 8, Shape::kTokens / 8);  // groups of 8 tokens
  const int share = (live + p.split - 1) / p.split, cell = p.rows * 2 * 16;
  const uint32_t sums = shared_address(&s), received = shared_address(&s.received);
  if (thread % 32 < p.split) cluster_barrier_arrive(cluster_address(shared_address(&s.ready), thread % 32));
  const int mine = max(min(live - rank * share, share), 0);
  const int parts_count = p.split * Shape::kSlices;
  if (thread == 0 && slice == 0) barrier_arrive_expect(&s.received, parts_count * mine * cell);
  barrier_wait(&s.ready, 0);
  if (thread == 0 && slice == 0) mark(p, 6);
  if (out >= p.rows) return;
  const uint32_t from = sums + (rank * Shape::kSlices + slice) * share * cell + thread * 16;
  int owner = 0, at = 0;
#pragma unroll
  for (int j = 0; j < Shape::kTokens / 8; ++j) {
    if (j < live) {
      cluster_send(cluster_address(from + at * cell, owner), cluster_address(received, owner), d[4 * j], d[4 * j + 1],
                   d[4 * j + 2], d[4 * j + 3]);
    }
    if (++at == share) {
      at = 0;
      ++owner;
    }
  }
  MidWriter<T> writer(p, part, out, lane);
  barrier_wait(&s.received, 0);
  if (thread == 0 && slice == 0) mark(p, 7);
#pragma unroll 1
  for (int i = slice; i < mine; i += Shape::kSlices) {
    const float4* parts = reinterpret_cast<const float4*>(reinterpret_cast<const uint8_t*>(&s) + i * cell) + thread;
    float4 sum = *parts;
#pragma unroll 4
    for (int r = 1; r < parts_count; ++r) {
      const float4 v = parts[r * share * (cell / 16)];
      sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    }
    writer.write(rank * share + i, sum);
  }
}

}  // namespace peftkern
