// The middle of the adapter's kernel: a cluster's sums of h become activations.
//
// A block owns groups of 8 columns of the bottleneck, the first eight blocks of a larger cluster one each. A lane has a
// token: it adds up all blocks' sums of a group in rank order, applies the activation and sends 16 bytes to every
// block. Of two warps each has every other tile, or every other group if the block owns several: so each sees every
// phase of its stages' barriers.
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

// Where a token's sum of a column lies among those of a group: a lane of the warpgroup that made it has four tokens of
// 16 side by side, and the lanes follow each other.
__device__ __forceinline__ int adapter_place(int column, int token) {
  return token / 16 * (kAdapterHalf / 4) + (column * 4 + token % 8 / 2) * 4 + token % 16 / 8 * 2 + token % 2;
}

template <typename T, bool kBackward>
class AdapterMiddle {
 public:
  __device__ __forceinline__ AdapterMiddle(const AdapterShared& s, const AdapterProblem& p, int warp)
      : s_(s), p_(p), warp_(warp), lane_(threadIdx.x % 32), groups_(adapter_groups(p.config.cluster)) {}

  __device__ __forceinline__ void run() {
    if (s_.rank >= 8) return;
    if constexpr (kBackward) clear();
    const int first = groups_ == 1 ? 0 : warp_;
    int stage = 0, turn = 0;
    uint32_t parity = 0;
#pragma unroll 1
    for (int tile = s_.first_tile; tile < p_.config.tiles; tile += p_.config.clusters) {
      if (groups_ > 1 || turn == warp_) {
#pragma unroll 1
        for (int group = first; group < groups_; group += 2) {
          const uint4 argument = load_argument(group, tile);
          barrier_wait(s_.received + stage, parity);
          if (group == 0 && lane_ == 0) s_.expect_sums(stage);
          activate_group(group, tile, stage, argument);
        }
      }
      turn ^= 1;
      if (++stage == p_.config.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
    if constexpr (kBackward) finish();
  }

 private:
  __device__ __forceinline__ int global_group(int group) const { return s_.rank * groups_ + group; }
  __device__ __forceinline__ int token(int tile) const { return tile * p_.config.tile + lane_; }
  __device__ __forceinline__ bool is_there(int group, int tile) const {
    return lane_ < p_.config.tile && token(tile) < p_.tokens && global_group(group) * 8 < p_.width;
  }
  __device__ __forceinline__ int64_t place(int group, int tile) const {
    return int64_t{token(tile)} * p_.width + global_group(group) * 8;
  }
  __device__ __forceinline__ void store(void* matrix, int group, int tile, const uint4& v) const {
    if (is_there(group, tile)) *reinterpret_cast<uint4*>(static_cast<T*>(matrix) + place(group, tile)) = v;
  }
  __device__ __forceinline__ uint4 load_argument(int group, int tile) const {
    if (!kBackward || !is_there(group, tile)) return {0, 0, 0, 0};
    return *reinterpret_cast<const uint4*>(static_cast<const T*>(p_.h) + place(group, tile));
  }

  static __device__ __forceinline__ uint4 pack(const float (&v)[8]) {
    return {pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3]), pack_pair<T>(v[4], v[5]), pack_pair<T>(v[6], v[7])};
  }
  static __device__ __forceinline__ void unpack(const uint4& v, float (&to)[8]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack_pair<T>(words[i]);
      to[2 * i] = pair.x;
      to[2 * i + 1] = pair.y;
    }
  }

  // Bit j: the j-th column of a group is kept by the dropout.
  __device__ __forceinline__ uint32_t kept(int group, int tile) const {
    if (p_.seed == nullptr) return 255;
    const int columns = global_group(group);
    const PhiloxWords words = dropout_numbers(static_cast<uint64_t>(__ldg(reinterpret_cast<const long long*>(p_.seed))),
                                              token(tile), static_cast<uint32_t>(columns / 2));
    const uint32_t pair[2] = {columns % 2 ? words.w2 : words.w0, columns % 2 ? words.w3 : words.w1};
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t word = pair[i / 4], low = dropout_mix(word);
      const int shift = i % 4 * 8;
      const uint32_t number = (word >> shift & 0x7f) << 8 | (low >> shift & 0xff);
      if (number >= p_.threshold) bits |= 1u << i;
    }
    return bits;
  }

  __device__ __forceinline__ void activate_group(int group, int tile, int stage, const uint4& argument) {
    float sum[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = bias(group, i);
#pragma unroll 4
    for (int source = 0; source < p_.config.cluster; ++source) {
      const float* sums = s_.sums(stage, source, group);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += sums[adapter_place(i, lane_)];
    }
    const uint32_t bits = kept(group, tile);
    uint4 result;
    if constexpr (kBackward) {
      float h[8], a[8], dh[8];
      unpack(argument, h);
      const bool counts = is_there(group, tile);
      float* kept_sums = dh_sums(group);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const Activated v = activate(p_.activation, h[i]);
        const bool keep = bits >> i & 1;
        a[i] = keep ? v.value : 0.0f;
        dh[i] = (keep ? sum[i] * p_.factor : 0.0f) * v.slope;
        if (counts) kept_sums[i * 32] += dh[i];
      }
      store(p_.a, group, tile, pack(a));
      result = pack(dh);
      store(p_.dh, group, tile, result);
    } else {
      const uint4 rounded = pack(sum);
      store(p_.h, group, tile, rounded);
      float h[8], a[8];
      unpack(rounded, h);
#pragma unroll
      for (int i = 0; i < 8; ++i) a[i] = bits >> i & 1 ? activate(p_.activation, h[i]).value : 0.0f;
      result = pack(a);
    }
    const uint32_t to =
        shared_address(s_.activations(stage)) + lane_ * 128 + ((global_group(group) ^ lane_ % 8) << 4);  // swizzled
    const uint32_t barrier = shared_address(s_.activated + stage);
#pragma unroll 1
    for (int block = 0; block < p_.config.cluster; ++block) {
      cluster_send(cluster_address(to, block), cluster_address(barrier, block), __uint_as_float(result.x),
                   __uint_as_float(result.y), __uint_as_float(result.z), __uint_as_float(result.w));
    }
  }

  __device__ __forceinline__ float bias(int group, int i) const {
    const int column = global_group(group) * 8 + i;
    const bool has = !kBackward && p_.down_bias != nullptr && column < p_.width;
    return has ? load_float(p_.down_bias, p_.down_bias_type, column) : 0.0f;
  }

  // A lane's sums of dh, of each warp where both have tiles of the only group: [column][lane].
  __device__ __forceinline__ float* dh_sums(int group) const {
    return reinterpret_cast<float*>(s_.base + p_.at.dh_sums) + (groups_ == 1 ? warp_ : group) * 256 + lane_;
  }
  __device__ __forceinline__ void clear() const {
    for (int group = groups_ == 1 ? 0 : warp_; group < groups_; group += 2) {
      for (int i = 0; i < 8; ++i) dh_sums(group)[i * 32] = 0.0f;
    }
  }
  __device__ __forceinline__ void finish() const {
    if (p_.dh_sums == nullptr) return;
    const int cluster = static_cast<int>(blockIdx.x) / p_.config.cluster;
    const int row = groups_ == 1 ? 2 * cluster + warp_ : cluster;
    for (int group = groups_ == 1 ? 0 : warp_; group < groups_; group += 2) {
      for (int i = 0; i < 8; ++i) {
        float sum = dh_sums(group)[i * 32];
#pragma unroll
        for (int lanes = 1; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
        if (lane_ == 0) p_.dh_sums[row * 64 + global_group(group) * 8 + i] = sum;
      }
    }
  }

  const AdapterShared& s_;
  const AdapterProblem& p_;
  const int warp_, lane_, groups_;
};

}  // namespace peftkern
