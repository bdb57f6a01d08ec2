// The middle of the adapter: the cluster's sums become a tile's pre-activations, and activations go back to all blocks.
//
// A block owns 8 tokens of each 64: those of half `rank` % 2 of the sums of warp `rank` / 2. It gets all blocks' sums
// of them, adds them in rank order, applies the activation and sends the result to every block. All of it travels as
// the fragments of the matrix products: a cell is the four sums of a thread for one of its rows, at columns 16 q + 2
// (lane % 4) and + 1, + 8, + 9, which become the pairs that the same thread multiplies. The sums that come in wait for
// nobody: a block sends its next ones after it has got this tile's activations from their owners, who have read theirs
// by then.
#pragma once

#include "bottleneck/adapter_shared.cuh"
#include "common/numbers.cuh"
#include "common/philox.h"

namespace peftkern {

template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t v);
template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(uint32_t v) {
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack_pair<__half>(uint32_t v) {
  return __half22float2(*reinterpret_cast<const __half2*>(&v));
}

__device__ __forceinline__ float load_float(const void* from, FloatType type, int at) {
  if (type == FloatType::kFloat32) return static_cast<const float*>(from)[at];
  if (type == FloatType::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(from)[at]);
  return to_float(static_cast<const __half*>(from)[at]);
}

template <typename T, int kTokens, int kTeams, int kWidth, bool kBackward>
class AdapterExchange {
  using Shared = AdapterShared<kTokens, kTeams, kWidth>;
  static constexpr int kGroups = Shared::kGroups, kThreads = Shared::kThreads;
  static constexpr int kCalls = kWidth / 16;            // 16 columns each
  static constexpr int kCells = kGroups * kCalls * 32;  // of a source
  static constexpr int kSources = Shared::kWarpgroups * kAdapterCluster / kGroups;
  static constexpr int kOwn = (kCells + kThreads - 1) / kThreads;  // of a thread

 public:
  __device__ __forceinline__ AdapterExchange(const Shared& s, const AdapterProblem& p, int thread)
      : s_(s), p_(p), thread_(thread) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int column = first_column(i) + j % 2 + j / 2 * 8;
        const bool has = !kBackward && p.down_bias != nullptr && column < p.width;
        bias_[i][j] = has ? load_float(p.down_bias, p.down_bias_type, column) : 0.0f;
      }
    }
  }

  // One thread, before a tile's sums are sent: what will come in.
  __device__ __forceinline__ void expect() const {
    barrier_arrive_expect(s_.received, kWidth * 512 / kTeams);
    barrier_arrive_expect(s_.activated, kTokens * kWidth * 2);
  }

  // The sums of a warpgroup to their owners.
  __device__ __forceinline__ void send(const float (&d)[kWidth / 2], int group) const {
    const int warp = thread_ / 32 % 4, lane = thread_ % 32;
    const uint32_t cell =
        shared_address(s_.base + s_.at.received) + ((s_.rank * Shared::kWarpgroups + group) * kCalls * 32 + lane) * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t to = cluster_address(cell, 2 * warp + i);
      const uint32_t barrier = cluster_address(shared_address(s_.received), 2 * warp + i);
#pragma unroll
      for (int q = 0; q < kCalls; ++q) {
        cluster_send(to + q * 512, barrier, d[8 * q + 2 * i], d[8 * q + 2 * i + 1], d[8 * q + 2 * i + 4],
                     d[8 * q + 2 * i + 5]);
      }
    }
  }

  // The tokens that this block owns.
  __device__ __forceinline__ void activate_own(int tile, uint32_t parity) {
    uint2 argument[kOwn];
    if constexpr (kBackward) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) argument[i] = load_argument(i, tile);
    }
    barrier_wait(s_.received, parity);
    const float4* received = reinterpret_cast<const float4*>(s_.base + s_.at.received);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int cell = thread_ + kThreads * i;
      if (cell >= kCells) break;
      float4 sum = received[cell];
#pragma unroll
      for (int source = 1; source < kSources; ++source) {
        const float4 v = received[source * kCells + cell];
        sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
      }
      const uint2 pairs = kBackward ? backward_cell(i, tile, sum, argument[i]) : forward_cell(i, tile, sum);
      const int group = cell / (kCalls * 32), q = cell / 32 % kCalls;
      const int place = ((group * 4 + s_.rank / 2) * kCalls + q) * 64 + s_.rank % 2 * 32 + cell % 32;
      const uint32_t to = shared_address(s_.base + s_.at.activations) + place * 8;
#pragma unroll
      for (int block = 0; block < kAdapterCluster; ++block) {
        cluster_send(cluster_address(to, block), cluster_address(shared_address(s_.activated), block), pairs.x,
                     pairs.y);
      }
    }
  }

  // A warp's operand of the second product, from all owners.
  __device__ __forceinline__ void take(uint32_t (&a)[kCalls][4], int group, uint32_t parity) const {
    barrier_wait(s_.activated, parity);
    const int warp = thread_ / 32 % 4, lane = thread_ % 32;
    const uint2* from =
        reinterpret_cast<const uint2*>(s_.base + s_.at.activations) + (group % kGroups * 4 + warp) * kCalls * 64 + lane;
#pragma unroll
    for (int q = 0; q < kCalls; ++q) {
      const uint2 upper = from[q * 64], lower = from[q * 64 + 32];
      a[q][0] = upper.x;
      a[q][1] = lower.x;
      a[q][2] = upper.y;
      a[q][3] = lower.y;
    }
  }

  // After all tiles.
  __device__ __forceinline__ void finish() const {
    if (p_.dh_sums == nullptr) return;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int cell = thread_ + kThreads * i;
      if (cell >= kCells) break;
      const int row = (static_cast<int>(blockIdx.x) * kTeams + s_.team) * kGroups + cell / (kCalls * 32);
      float* sums = p_.dh_sums + row * kWidth + first_column(i);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float sum = dh_sums_[i][j];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
        if (thread_ % 32 < 4) sums[j % 2 + j / 2 * 8] = sum;
      }
    }
  }

 private:
  __device__ __forceinline__ int call(int i) const { return (thread_ + kThreads * i) / 32 % kCalls; }
  __device__ __forceinline__ int first_column(int i) const { return 16 * call(i) + 2 * (thread_ % 4); }
  __device__ __forceinline__ int token_of_tile(int i) const {
    const int cell = thread_ + kThreads * i;
    return cell / (kCalls * 32) * 64 + 8 * s_.rank + cell % 32 / 4;
  }
  __device__ __forceinline__ int token(int i, int tile) const { return tile * p_.config.tile + token_of_tile(i); }
  __device__ __forceinline__ bool is_token(int i, int tile) const {
    return token_of_tile(i) < p_.config.tile && token(i, tile) < p_.tokens;
  }

  __device__ __forceinline__ int64_t place(int i, int tile) const {
    return int64_t{token(i, tile)} * p_.width + first_column(i);
  }

  // Pairs of a [tokens, width] matrix; the second is 8 columns further, in the matrix if the first one is not or is.
  __device__ __forceinline__ void store_pairs(void* matrix, int i, int tile, uint2 pairs) const {
    if (!is_token(i, tile)) return;
    T* to = static_cast<T*>(matrix) + place(i, tile);
    if (first_column(i) < p_.width) *reinterpret_cast<uint32_t*>(to) = pairs.x;
    if (first_column(i) + 8 < p_.width) *reinterpret_cast<uint32_t*>(to + 8) = pairs.y;
  }

  __device__ __forceinline__ uint2 load_argument(int i, int tile) const {
    uint2 pairs = {0, 0};
    if (thread_ + kThreads * i >= kCells || !is_token(i, tile)) return pairs;
    const T* from = static_cast<const T*>(p_.h) + place(i, tile);
    if (first_column(i) < p_.width) pairs.x = *reinterpret_cast<const uint32_t*>(from);
    if (first_column(i) + 8 < p_.width) pairs.y = *reinterpret_cast<const uint32_t*>(from + 8);
    return pairs;
  }

  // Bit j: element j of a cell is kept by the dropout.
  __device__ __forceinline__ uint32_t kept(int i, int tile) const {
    if (p_.seed == nullptr) return 15;
    const PhiloxWords words = dropout_numbers(static_cast<uint64_t>(__ldg(reinterpret_cast<const long long*>(p_.seed))),
                                              token(i, tile), static_cast<uint32_t>(call(i)));
    const int pair = thread_ % 4;
    uint32_t bits = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = half == 0 ? (pair < 2 ? words.w0 : words.w1) : (pair < 2 ? words.w2 : words.w3);
      const uint32_t low = dropout_mix(word);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int shift = 16 * (pair % 2) + 8 * j;
        const uint32_t number = (word >> shift & 0x7f) << 8 | (low >> shift & 0xff);
        if (number >= p_.threshold) bits |= 1u << (2 * half + j);
      }
    }
    return bits;
  }

  __device__ __forceinline__ uint2 forward_cell(int i, int tile, float4 sum) const {
    const uint2 h = {pack_pair<T>(sum.x + bias_[i][0], sum.y + bias_[i][1]),
                     pack_pair<T>(sum.z + bias_[i][2], sum.w + bias_[i][3])};
    store_pairs(p_.h, i, tile, h);
    const float2 first = unpack_pair<T>(h.x), second = unpack_pair<T>(h.y);
    const float values[4] = {first.x, first.y, second.x, second.y};
    const uint32_t bits = kept(i, tile);
    float a[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) a[j] = bits >> j & 1 ? activate(p_.activation, values[j]).value : 0.0f;
    return {pack_pair<T>(a[0], a[1]), pack_pair<T>(a[2], a[3])};
  }

  __device__ __forceinline__ uint2 backward_cell(int i, int tile, float4 sum, uint2 argument) {
    const float2 first = unpack_pair<T>(argument.x), second = unpack_pair<T>(argument.y);
    const float values[4] = {first.x, first.y, second.x, second.y}, sums[4] = {sum.x, sum.y, sum.z, sum.w};
    const uint32_t bits = kept(i, tile);
    const bool counts = is_token(i, tile);
    float a[4], dh[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Activated v = activate(p_.activation, values[j]);
      const bool keep = bits >> j & 1;
      a[j] = keep ? v.value : 0.0f;
      dh[j] = (keep ? sums[j] * p_.factor : 0.0f) * v.slope;
      if (counts) dh_sums_[i][j] += dh[j];
    }
    store_pairs(p_.a, i, tile, {pack_pair<T>(a[0], a[1]), pack_pair<T>(a[2], a[3])});
    const uint2 pairs = {pack_pair<T>(dh[0], dh[1]), pack_pair<T>(dh[2], dh[3])};
    store_pairs(p_.dh, i, tile, pairs);
    return pairs;
  }

  const Shared& s_;
  const AdapterProblem& p_;
  const int thread_;
  float bias_[kOwn][4];
  float dh_sums_[kOwn][4] = {};
};

}  // namespace peftkern
