// The adapter's consumers: two warpgroups that multiply.
//
// A tile of 128 tokens is shared by its tokens, 64 for each warpgroup. Of one of 64 tokens that a team of two has, a
// warpgroup takes every other chunk of features; it waits for the others too and then passes them: who looks at every
// other phase of a barrier only takes an old one for the new.
#pragma once

#include <type_traits>

#include "bottleneck/adapter_exchange.cuh"
#include "common/dependent_launch.cuh"
#include "common/wgmma.cuh"

namespace peftkern {

template <typename T, int kTokens, int kTeams, int kWidth, bool kBackward>
class AdapterConsumer {
  using Shared = AdapterShared<kTokens, kTeams, kWidth>;
  static constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;
  static constexpr int kSteps = kWidth / 16;  // of the second product

 public:
  __device__ __forceinline__ AdapterConsumer(const Shared& s, const AdapterProblem& p, const AdapterMaps& maps)
      : s_(s),
        p_(p),
        maps_(maps),
        thread_((threadIdx.x - 128) % Shared::kThreads),
        group_(thread_ / 128),
        warp_(thread_ / 32 % 4),
        lane_(thread_ % 32),
        leader_(thread_ % 128 == 0),
        releases_early_(!p.writes || !p.config.keeps_x),
        x_at_(p.config.x_slots),
        w_at_(p.config.w_slots) {}

  __device__ __forceinline__ void run() {
    wait_for_earlier_kernels();
    if (blockIdx.x == 0) {
      for (int i = threadIdx.x - 128; i < p_.zero_count; i += 256) p_.zeros[i] = 0;
    }
    load_up_bias();
    AdapterExchange<T, kTokens, kTeams, kWidth, kBackward> exchange(s_, p_, thread_);
    uint32_t parity = 0;
#pragma unroll 1
    for (int tile = s_.first_tile; tile < p_.config.tiles; tile += s_.tile_stride) {
      if (thread_ == 0) exchange.expect();
      const SlotRing start = x_at_;
      {
        float d[kWidth / 2];
        down(d);
        exchange.send(d, group_);
      }
      exchange.activate_own(tile, parity);
      uint32_t a[kSteps][4];
      exchange.take(a, group_, parity);
      if (p_.writes) {
        if (p_.config.keeps_x) x_at_ = start;
        up(a, tile);
      }
      parity ^= 1;
    }
    if constexpr (kBackward) exchange.finish();
    if (leader_) tensor_store_finish();
  }

 private:
  __device__ __forceinline__ bool mine(int chunk) const { return kTokens == 128 || kTeams == 2 || chunk % 2 == group_; }

  __device__ __forceinline__ void load_up_bias() {
    float* bias = reinterpret_cast<float*>(s_.up_bias);
    for (int i = threadIdx.x - 128; i < p_.config.chunks * kAdapterChunk; i += 256) {
      const int feature = s_.first_feature + i;
      const bool has = p_.up_bias != nullptr && feature < p_.features;
      bias[i] = has ? p_.bias_factor * load_float(p_.up_bias, p_.up_bias_type, feature) : 0.0f;
    }
    named_barrier(3, 256);
  }

  __device__ __forceinline__ void release(uint64_t* empty, int slot) const {  // one arrival per warp
    if (slot >= 0 && lane_ == 0) barrier_arrive(empty + slot);
  }

  // What follows may not be moved up to where it would read sums in flight.
  template <int kCount>
  __device__ __forceinline__ void settle(float (&d)[kCount]) const {
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i]));
  }

  // d = this block's share of x W1^T.
  __device__ __forceinline__ void down(float (&d)[kWidth / 2]) {
    constexpr int kDepth = kBackward ? 128 : 2;  // 16 further along the contraction, in a descriptor of W1
    const int rows = kTokens == 128 ? group_ * 8192 : 0;
    int x_before = -1, w_before = -1;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) d[i] = 0.0f;
#pragma unroll 1
    for (int chunk = 0; chunk < p_.config.chunks; ++chunk) {
      barrier_wait(s_.x_full + x_at_.slot, x_at_.parity);
      barrier_wait(s_.w_full + w_at_.slot, w_at_.parity);
      if (mine(chunk)) {
        const uint64_t x = wgmma_descriptor(shared_address(s_.x(x_at_.slot)) + rows);
        const uint32_t weights = shared_address(s_.w(w_at_.slot));
        const uint64_t w = kBackward ? wgmma_descriptor_mn<64>(weights, 8192) : wgmma_descriptor(weights);
        wgmma_fence();
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          WgmmaSS<kWidth>::template mma<kBFloat16, false, kBackward>(d, x + 2 * q, w + kDepth * q, 1);
        }
        wgmma_commit();
        wgmma_wait<1>();
        release(s_.w_empty, w_before);
        if (releases_early_) release(s_.x_empty, x_before);
        x_before = x_at_.slot;
        w_before = w_at_.slot;
      } else {
        release(s_.w_empty, w_at_.slot);
        if (releases_early_) release(s_.x_empty, x_at_.slot);
      }
      x_at_.advance();
      w_at_.advance();
    }
    settle(d);
    release(s_.w_empty, w_before);
    if (releases_early_) release(s_.x_empty, x_before);
  }

  // out = skip + factor * a W2^T + bias, chunk by chunk where the skip lies.
  __device__ __forceinline__ void up(const uint32_t (&a)[kSteps][4], int tile) {
    const int rows = kTokens == 128 ? group_ * 8192 : 0;
    const int token = tile * p_.config.tile + rows / 128;
    int before = -1;
#pragma unroll 1
    for (int chunk = 0; chunk < p_.config.chunks; ++chunk) {
      barrier_wait(s_.w_full + w_at_.slot, w_at_.parity);
      if (mine(chunk)) {
        const uint32_t weights = shared_address(s_.w(w_at_.slot));
        float d[32];
        wgmma_fence();
#pragma unroll
        for (int q = 0; q < kSteps; ++q) {
          const uint64_t w = kBackward ? wgmma_descriptor_mn<64>(weights, 8192) + 128 * q
                                       : wgmma_descriptor(weights + q / 4 * 8192) + 2 * (q % 4);
          WgmmaRS<64>::template mma<kBFloat16, kBackward>(d, a[q], w, q > 0);
        }
        wgmma_commit();
        barrier_wait(s_.x_full + x_at_.slot, x_at_.parity);
        settle(d);
        release(s_.w_empty, w_at_.slot);
        add(d, s_.x(x_at_.slot) + rows, chunk);
        shared_writes_fence();
        named_barrier(threadIdx.x / 128, 128);
        if (leader_) {
          tensor_store(&maps_.out, s_.x(x_at_.slot) + rows, s_.first_feature + chunk * kAdapterChunk, token);
          tensor_store_wait<1>();
          release_stored(before);
        }
        before = x_at_.slot;
      } else {
        barrier_wait(s_.x_full + x_at_.slot, x_at_.parity);
        release(s_.w_empty, w_at_.slot);
        release(s_.x_empty, x_at_.slot);
      }
      x_at_.advance();
      w_at_.advance();
    }
    if (leader_) {
      tensor_store_wait<0>();
      release_stored(before);
    }
  }

  // For the four warps.
  __device__ __forceinline__ void release_stored(int slot) const {
    if (slot < 0) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) barrier_arrive(s_.x_empty + slot);
  }

  __device__ __forceinline__ void add(const float (&d)[32], uint8_t* tile, int chunk) const {
    const float2* bias = reinterpret_cast<const float2*>(s_.up_bias) + chunk * (kAdapterChunk / 2);
    const float factor = kBackward ? 1.0f : p_.factor;
    uint8_t* row = tile + (16 * warp_ + lane_ / 4) * 128 + lane_ % 4 * 4;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 b = kBackward ? float2{0.0f, 0.0f} : bias[4 * j + lane_ % 4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t* word = reinterpret_cast<uint32_t*>(row + i * 1024 + ((j ^ lane_ / 4) << 4));  // swizzled
        const float2 skip = p_.adds_skip ? unpack_pair<T>(*word) : float2{0.0f, 0.0f};
        *word =
            pack_pair<T>(skip.x + (factor * d[4 * j + 2 * i] + b.x), skip.y + (factor * d[4 * j + 2 * i + 1] + b.y));
      }
    }
  }

  const Shared& s_;
  const AdapterProblem& p_;
  const AdapterMaps& maps_;
  const int thread_, group_, warp_, lane_;
  const bool leader_, releases_early_;
  SlotRing x_at_, w_at_;
};

}  // namespace peftkern
