// The low-rank term in nf4_small_m: S = x A^T by the blocks of a cluster, and c S B^T for the tiles of a block.
//
// Both stay off the way from one tile to the next, where all warps wait for the slowest: S is made beside the arrival
// of the first weights and is not asked for before the last pass, and then every warp makes the term of one tile, or
// some steps of it, all at once, and adds it to its own sums when that tile's turn comes.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/hopper.cuh"
#include "nf4/low_rank.cuh"
#include "nf4/small_m_config.h"
#include "nf4/small_m_device.cuh"

namespace peftkern {

struct SmallMArguments {
  const void* x;
  NF4DeviceWeight weight;
  const void* bias;
  void* y;
  int64_t M, N, K;
  uint32_t scales;  // of the whole weight
  int passes;
  int group_rows, longer_groups;  // rows of a CTA; the first CTAs have one more
  bool whole_words;               // a row's 4 scale codes of a quad are one aligned word, under one nested scale
  bool settled;                   // as in NF4Matmul
};

// S comes from the kernel before.
struct SmallMLowRankArguments : SmallMArguments {
  NF4LowRank low_rank;
  int tiles;  // of a CTA, at most
};

// S is made here.
struct SmallMLoraArguments : SmallMLowRankArguments {
  bool A_float32, B_float32;  // else in x's dtype
  int cluster;                // CTAs that share S, each with a part of K
  int parked_bytes;  // of sums parked between passes; behind them a barrier and the parts of S, [cluster][M][padded]
};

// S by the CTAs of a cluster: each makes its part, of some of the columns of x and A, and sends it to all. A warp has
// 16 rows of A, side by side with the others; as often as the ranks fit 8 warps, these share the columns.
template <typename T, class Arguments, int kTokenTiles>
class SmallMCluster {
 public:
  __device__ __forceinline__ SmallMCluster(const Arguments&, uint32_t, uint32_t, int, int, int) {}
  __device__ __forceinline__ uint32_t parts() const { return 0; }
};

template <typename T, int kTokenTiles>
class SmallMCluster<T, SmallMLoraArguments, kTokenTiles> {
  static constexpr int kTogether = kTokenTiles == 1 ? 2 : 1;  // steps of 64 columns whose loads are in flight
  static constexpr int kCells = kTokenTiles * 128;            // of 16 rows of A and the tokens

 public:
  __device__ __forceinline__ SmallMCluster(const SmallMLoraArguments& a, uint32_t rank, uint32_t parked_at, int warp,
                                           int warps, int lane)
      : a_(a), rank_(static_cast<int>(rank)), warp_(warp), warps_(warps), lane_(lane), side_(a.low_rank.padded / 16) {
    const int steps = static_cast<int>(a.K / 64), share = warp / side_;
    stride_ = warps / side_;
    row_ = warp % side_ * 16 + (lane >> 2);
    next_ = steps * rank_ / a.cluster + share;
    last_ = share < stride_ ? steps * (rank_ + 1) / a.cluster : 0;
    barrier_ = parked_at + a.parked_bytes;
  }

  // Where the parts arrive.
  __device__ __forceinline__ uint32_t parts() const { return barrier_ + kSmallMPartsOffset; }

  // What needs no earlier kernel's end.
  __device__ __forceinline__ void start() const {
    if (warp_ == 0 && lane_ == 0) {
      barrier_init(barrier(), 1);
      barrier_init_fence();
      barrier_arrive_expect(barrier(), a_.cluster * part_bytes());
    }
    __syncwarp();
    cluster_arrive_relaxed();
#pragma unroll 1
    for (int step = next_; step < last_; step += stride_) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (row_ + 8 * h >= a_.low_rank.rank) continue;
        const int64_t at = (row_ + 8 * h) * a_.K + step * 64 + column();
        prefetch_l2(static_cast<const char*>(a_.low_rank.A) + at * (a_.A_float32 ? 4 : 2));
      }
    }
  }

  // All barriers are there.
  __device__ __forceinline__ void begin() const {
    cluster_wait();
    if (!a_.low_rank.settled) wait_for_earlier_kernels();
  }

  __device__ __forceinline__ bool more() const { return next_ < last_; }

  __device__ __forceinline__ void load_A() {
    if (a_.A_float32) {
      load_rows(static_cast<const float*>(a_.low_rank.A));
    } else {
      load_rows(static_cast<const T*>(a_.low_rank.A));
    }
  }

  __device__ __forceinline__ void load_x() {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) {
        const int token = 8 * j + (lane_ >> 2);
        const int64_t at = token * a_.K + (next_ + i * stride_) * 64 + column();
        load_pairs<T>(tokens_[i][j], static_cast<const T*>(a_.x) + at, token < a_.M && has(i));
      }
    }
  }

  // What is loaded; turns to the next steps.
  __device__ __forceinline__ void multiply() {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
#pragma unroll
      for (int p = 0; p < 8; p += 2) {
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          mma<T>(sum_[j], rows_[i][0][p], rows_[i][1][p], rows_[i][0][p + 1], rows_[i][1][p + 1], tokens_[i][j][p],
                 tokens_[i][j][p + 1]);
        }
      }
    }
    next_ += kTogether * stride_;
  }

  // Leaves the warp's sums in shared memory, a float a lane and register each.
  __device__ __forceinline__ void leave(uint32_t sums) const {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) store_shared(sums + (warp_ * kCells + (4 * j + i) * 32 + lane_) * 4, sum_[j][i]);
    }
  }

  // Adds up what the warps left and sends it.
  __device__ __forceinline__ void send(uint32_t sums) const {
    const int padded = a_.low_rank.padded, tokens = static_cast<int>(a_.M);
    const uint32_t part = parts() + rank_ * part_bytes();
#pragma unroll 1
    for (int i = warp_ * 32 + lane_; i < side_ * kCells; i += warps_ * 32) {
      const int tile = i / kCells, index = i % kCells >> 5;
      const int token = (index >> 2) * 8 + (lane_ & 3) * 2 + (index & 1);
      const int row = tile * 16 + (lane_ >> 2) + (index >> 1 & 1) * 8;
      if (token >= tokens) continue;
      float value = 0.0f;
#pragma unroll 1
      for (int share = 0; share < stride_; ++share) value += load_shared(sums + (share * side_ * kCells + i) * 4);
      const uint32_t to = part + (token * padded + row) * 4;
#pragma unroll 1
      for (int peer = 0; peer < a_.cluster; ++peer) {
        cluster_send(cluster_address(to, peer), cluster_address(barrier_, peer), value);
      }
    }
  }

  // Until all parts have arrived here.
  __device__ __forceinline__ void wait() const { barrier_wait(barrier(), 0); }

 private:
  __device__ __forceinline__ uint64_t* barrier() const {
    return static_cast<uint64_t*>(__cvta_shared_to_generic(barrier_));
  }
  __device__ __forceinline__ uint32_t part_bytes() const {
    return static_cast<uint32_t>(a_.M) * a_.low_rank.padded * 4;
  }
  __device__ __forceinline__ int column() const { return (lane_ & 3) * 16; }
  __device__ __forceinline__ bool has(int i) const { return next_ + i * stride_ < last_; }

  template <typename From>
  __device__ __forceinline__ void load_rows(const From* A) {
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t at = (row_ + 8 * h) * a_.K + (next_ + i * stride_) * 64 + column();
        load_pairs<T>(rows_[i][h], A + at, row_ + 8 * h < a_.low_rank.rank && has(i));
      }
    }
  }

  const SmallMLoraArguments& a_;
  int rank_, warp_, warps_, lane_, side_, stride_, row_, next_, last_;
  uint32_t barrier_;
  uint32_t rows_[kTogether][2][8], tokens_[kTogether][kTokenTiles][8];
  float sum_[kTokenTiles][4] = {};
};

// Four neighbouring elements of a row of B, as RawFour; of what SmallMLoraArguments may hold.
struct SmallMFour {
  uint4 v;

  __device__ __forceinline__ void load(const SmallMLoraArguments& a, int64_t row, int column, bool valid) {
    const NF4LowRank& l = a.low_rank;
    const int64_t at = row * l.rank + column;
    v = {};
    if (!valid || column >= l.rank) return;
    if (a.B_float32) {
      v = *reinterpret_cast<const uint4*>(static_cast<const uint32_t*>(l.B) + at);
    } else {
      const uint2 pairs = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(l.B) + at);
      v.x = pairs.x, v.y = pairs.y;
    }
  }

  template <typename T>
  __device__ __forceinline__ uint2 convert(const SmallMLoraArguments& a) const {
    const uint32_t low = pack_pair<T>(__uint_as_float(v.x), __uint_as_float(v.y));
    const uint32_t high = pack_pair<T>(__uint_as_float(v.z), __uint_as_float(v.w));
    return a.B_float32 ? make_uint2(low, high) : make_uint2(v.x, v.y);
  }
};

struct SmallMAnyFour : RawFour {
  __device__ __forceinline__ void load(const SmallMLowRankArguments& a, int64_t row, int column, bool valid) {
    RawFour::load(a.low_rank, row, column, valid);
  }
  template <typename T>
  __device__ __forceinline__ uint2 convert(const SmallMLowRankArguments& a) const {
    return RawFour::convert<T>(a.low_rank);
  }
};

// The term of a tile, or some steps of it, by one warp: d as mma leaves it. Warps share a tile where there are more of
// them.
template <typename T, class Arguments, int kTokenTiles>
class SmallMTerm {
  static constexpr bool kOwn = std::is_same<Arguments, SmallMLoraArguments>::value;
  using Four = std::conditional_t<kOwn, SmallMFour, SmallMAnyFour>;

 public:
  // parts: in shared memory, if S is made here.
  __device__ __forceinline__ SmallMTerm(const Arguments& a, uint32_t parts, int warp, int warps, int lane)
      : a_(a), parts_(parts), g_(lane >> 2), t_(lane & 3) {
    side_ = min(a.tiles, warps);
    own_ = warp % side_;
    stride_ = warps / side_;
    first_ = warp / side_ < stride_ ? warp / side_ : a.low_rank.padded / 16;
  }

  // The tile whose term this warp has, and whether it is time to make the next one.
  __device__ __forceinline__ int tile() const { return tile_; }
  __device__ __forceinline__ bool due(int tile) const { return tile == due_; }

  __device__ __forceinline__ void make(int row_begin, int row_end) {
    const NF4LowRank& l = a_.low_rank;
    tile_ = due_ + own_;
    due_ += side_;
    const int row = row_begin + tile_ * 16;
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d_[j][i] = 0.0f;
    }
#pragma unroll 1
    for (int step = first_; step * 16 < l.padded; step += stride_) {
      const int column = step * 16 + t_ * 4;
      Four top, bottom;
      top.load(a_, row + g_, column, row + g_ < row_end);
      bottom.load(a_, row + g_ + 8, column, row + g_ + 8 < row_end);
      uint2 tokens[kTokenTiles];
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) tokens[j] = 8 * j + g_ < a_.M ? S(8 * j + g_, column) : uint2{};
      const uint2 low = top.template convert<T>(a_), high = bottom.template convert<T>(a_);
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) mma<T>(d_[j], low.x, high.x, low.y, high.y, tokens[j].x, tokens[j].y);
    }
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d_[j][i] *= l.factor;
    }
  }

  // To the sums of tile().
  __device__ __forceinline__ void add_to(float (&sum)[kTokenTiles][4]) const {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[j][i] += d_[j][i];
    }
  }

  // Writes S, by one warp.
  __device__ __forceinline__ void write(int lane) const {
    const NF4LowRank& l = a_.low_rank;
    const int fours = static_cast<int>(a_.M) * l.padded / 4;
    for (int i = lane; i < fours; i += 32) {
      const int token = i * 4 / l.padded, column = i * 4 % l.padded;
      const uint2 pairs = S(token, column);
      uint16_t* const to = static_cast<uint16_t*>(l.S) + token * l.rank + column;
      const uint32_t bits[4] = {pairs.x & 0xffff, pairs.x >> 16, pairs.y & 0xffff, pairs.y >> 16};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        if (column + c < l.rank) to[c] = static_cast<uint16_t>(bits[c]);
      }
    }
  }

 private:
  // Four columns of a token's S: the parts, added up in their order.
  __device__ __forceinline__ uint2 S(int token, int column) const {
    const NF4LowRank& l = a_.low_rank;
    const int at = token * l.padded + column, part = static_cast<int>(a_.M) * l.padded;
    float4 sum = {};
    if constexpr (kOwn) {
#pragma unroll 4
      for (int p = 0; p < a_.cluster; ++p) add(sum, load_shared_four(parts_ + (p * part + at) * 4));
    } else {
#pragma unroll 8
      for (int p = 0; p < l.part_count; ++p) add(sum, *reinterpret_cast<const float4*>(l.parts + p * part + at));
    }
    return {pack_pair<T>(sum.x, sum.y), pack_pair<T>(sum.z, sum.w)};
  }

  static __device__ __forceinline__ void add(float4& sum, const float4& v) {
    sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
  }

  const Arguments& a_;
  uint32_t parts_;
  int g_, t_, side_, stride_, own_, first_, tile_ = -1, due_ = 0;
  float d_[kTokenTiles][4];
};

// Without one.
template <typename T, int kTokenTiles>
class SmallMTerm<T, SmallMArguments, kTokenTiles> {
 public:
  __device__ __forceinline__ SmallMTerm(const SmallMArguments&, uint32_t, int, int, int) {}
};

}  // namespace peftkern
