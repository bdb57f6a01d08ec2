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
      : s_(s), p_(p), warp_(warp), lane_(threadIdx.x % 32), groups_(p.config.groups) {}

  // What the sums are not needed for is done before they are waited for.
  __device__ __forceinline__ void run() {
    if (s_.rank >= 8) return;
    if constexpr (kBackward) clear();
    const float biases = own_bias();
    const uint64_t seed = p_.seed != nullptr ? static_cast<uint64_t>(*p_.seed) : 0;
    Task task = first();
    uint4 argument = load_argument(task);
#pragma unroll 1
    while (task.tile < p_.config.tiles) {
      const Task next = after(task);
      const uint4 next_argument = load_argument(next);
      const uint32_t bits = kept(task, seed);
      if constexpr (kBackward) {
        float slope[8], sum[8] = {};
        leave_activations(task, argument, bits, slope);
        add_up(task, sum);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] = (bits >> i & 1 ? sum[i] * p_.factor : 0.0f) * slope[i];
        const uint4 dh = pack(sum);
        send(task, dh);
        store(p_.dh, task, dh);
        if (is_there(task)) {
#pragma unroll
          for (int i = 0; i < 8; ++i) dh_sums(task.group)[i * 32] += sum[i];
        }
      } else {
        float sum[8], h[8], a[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[i] = __shfl_sync(0xffffffffu, biases, task.group / 2 * 8 + i);
        add_up(task, sum);
        const uint4 rounded = pack(sum);
        unpack(rounded, h);
        with_activation(p_.activation, [&](auto kind) {
#pragma unroll
          for (int i = 0; i < 8; ++i) a[i] = bits >> i & 1 ? activate(kind, h[i]).value : 0.0f;
        });
        send(task, pack(a));
        store(p_.h, task, rounded);
      }
      task = next;
      argument = next_argument;
    }
    if constexpr (kBackward) finish();
  }

 private:
  // A group of a tile. `group` counts those of the block.
  struct Task {
    int tile, group, stage;
    uint32_t parity;
  };

  __device__ __forceinline__ Task first() const {
    if (groups_ > 1) return {s_.first_tile, warp_, 0, 0};
    return {s_.first_tile + warp_ * p_.config.clusters, 0, warp_, 0};
  }
  __device__ __forceinline__ Task after(Task task) const {
    task.group += 2;
    if (task.group < groups_) return task;
    const int tiles = groups_ > 1 ? 1 : 2;
    task.group = groups_ > 1 ? warp_ : 0;
    task.tile += tiles * p_.config.clusters;
    task.stage += tiles;
    if (task.stage >= p_.config.stages) {
      task.stage -= p_.config.stages;
      task.parity ^= 1;
    }
    return task;
  }

  // Of the bottleneck, not of the block.
  __device__ __forceinline__ int columns(int group) const { return (s_.rank * groups_ + group) * 8; }
  __device__ __forceinline__ int token(const Task& task) const { return task.tile * p_.config.tile + lane_; }
  __device__ __forceinline__ bool is_there(const Task& task) const {
    return task.tile < p_.config.tiles && lane_ < p_.config.tile && token(task) < p_.tokens &&
           columns(task.group) < p_.width;
  }
  __device__ __forceinline__ int64_t place(const Task& task) const {
    return int64_t{token(task)} * p_.width + columns(task.group);
  }
  __device__ __forceinline__ void store(void* matrix, const Task& task, const uint4& v) const {
    if (is_there(task)) *reinterpret_cast<uint4*>(static_cast<T*>(matrix) + place(task)) = v;
  }
  __device__ __forceinline__ uint4 load_argument(const Task& task) const {
    if (!kBackward || !is_there(task)) return {0, 0, 0, 0};
    return *reinterpret_cast<const uint4*>(static_cast<const T*>(p_.h) + place(task));
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
  __device__ __forceinline__ uint32_t kept(const Task& task, uint64_t seed) const {
    if (p_.seed == nullptr) return 255;
    const int call = columns(task.group) / 16, half = columns(task.group) / 8 % 2;
    const PhiloxWords words = dropout_numbers(seed, token(task), static_cast<uint32_t>(call));
    const uint32_t pair[2] = {half ? words.w2 : words.w0, half ? words.w3 : words.w1};
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

  // Waits for all blocks' sums of a group and adds them to `sum`.
  __device__ __forceinline__ void add_up(const Task& task, float (&sum)[8]) const {
    barrier_wait(s_.received + task.stage, task.parity);
    if (task.group == 0 && lane_ == 0) s_.expect_sums(task.stage);
#pragma unroll 4
    for (int source = 0; source < p_.config.cluster; ++source) {
      const float* sums = s_.sums(task.stage, source, task.group);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += sums[adapter_place(i, lane_)];
    }
  }

  __device__ __forceinline__ void leave_activations(const Task& task, const uint4& argument, uint32_t bits,
                                                    float (&slope)[8]) const {
    float h[8], a[8];
    unpack(argument, h);
    with_activation(p_.activation, [&](auto kind) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const Activated v = activate(kind, h[i]);
        a[i] = bits >> i & 1 ? v.value : 0.0f;
        slope[i] = v.slope;
      }
    });
    store(p_.a, task, pack(a));
  }

  // A lane's token of a group to all blocks, swizzled.
  __device__ __forceinline__ void send(const Task& task, const uint4& v) const {
    const uint32_t to =
        shared_address(s_.activations(task.stage)) + lane_ * 128 + ((columns(task.group) / 8 ^ lane_ % 8) << 4);
    const uint32_t barrier = shared_address(s_.activated + task.stage);
#pragma unroll 4
    for (int block = 0; block < p_.config.cluster; ++block) {
      cluster_send(cluster_address(to, block), cluster_address(barrier, block), __uint_as_float(v.x),
                   __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
    }
  }

  // Of column lane % 8 of the lane / 8-th of the warp's groups.
  __device__ __forceinline__ float own_bias() const {
    const int group = groups_ > 1 ? warp_ + lane_ / 8 * 2 : 0, column = columns(group) + lane_ % 8;
    const bool has = !kBackward && p_.down_bias != nullptr && group < groups_ && column < p_.width;
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
        if (lane_ == 0) p_.dh_sums[row * kAdapterWidth + columns(group) + i] = sum;
      }
    }
  }

  const AdapterShared& s_;
  const AdapterProblem& p_;
  const int warp_, lane_, groups_;
};

}  // namespace peftkern
