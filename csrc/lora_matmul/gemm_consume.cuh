// lora_gemm's consumers: two warpgroups that multiply what the producer loads, and write the results.
#pragma once

#include <type_traits>

#include "common/numbers.cuh"
#include "common/wgmma.cuh"
#include "lora_matmul/gemm_shared.cuh"

namespace peftkern {

template <typename T, int kR, bool kDx, int kCluster>
class GemmConsumer {
  using Skinny = GemmSkinny<kR>;
  static constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;

 public:
  __device__ __forceinline__ GemmConsumer(GemmShared& s, const GemmProblem& p, const GemmMaps& maps)
      : s_(s),
        p_(p),
        maps_(maps),
        group_(threadIdx.x / 128 - 1),
        warp_(threadIdx.x / 32 % 4),
        lane_(threadIdx.x % 32),
        leader_(threadIdx.x % 128 == 0) {}

  __device__ __forceinline__ void run() {
#ifdef PEFTKERN_LORA_PROFILE
    const bool profiled = leader_ && group_ == 0 && p_.profile != nullptr;
    long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (profiled) p_.profile[blockIdx.x * 15] = now;
#endif
    while (true) {
      barrier_wait(&s_.full[at_.stage], at_.parity);
      const int* words = reinterpret_cast<const int*>(&s_.jobs[at_.stage]);
      const int kind = *const_cast<volatile const int*>(words), tile = *const_cast<volatile const int*>(words + 1);
      const int out_tile = *const_cast<volatile const int*>(words + 2);
      if (kind == kGemmFinish) break;
#ifdef PEFTKERN_LORA_PROFILE
      start_ = written_ = clock64();
#endif
      if (kind == kGemmMain) {
        main_tile(tile, out_tile);
      } else if (kind == kGemmProject) {
        project(tile);
      } else {
        gradient(p_.gradients[kind == kGemmGradientA], kind == kGemmGradientA, tile);
      }
#ifdef PEFTKERN_LORA_PROFILE
      if (profiled) {
        long long* at = p_.profile + (blockIdx.x * 5 + kind) * 3;
        const long long end = clock64();
        at[0] += 1;
        at[1] += end - start_;
        at[2] += end - written_;
      }
#endif
    }
    if (leader_) tensor_store_finish();
#ifdef PEFTKERN_LORA_PROFILE
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (profiled) p_.profile[blockIdx.x * 15 + 1] = now;
#endif
  }

 private:
  __device__ __forceinline__ void mark_written() {
#ifdef PEFTKERN_LORA_PROFILE
    written_ = clock64();
#endif
  }

  // One arrival per warp at each block whose loads fill the stage.
  __device__ __forceinline__ void release(int stage) {
    if (stage < 0) return;
    if constexpr (kCluster == 1) {
      if (lane_ == 0) barrier_arrive(&s_.empty[stage]);
    } else {
      if (lane_ < kCluster) cluster_barrier_arrive(&s_.empty[stage], lane_);
    }
  }

  __device__ __forceinline__ uint32_t open() {
    barrier_wait(&s_.full[at_.stage], at_.parity);
    return shared_address(s_.stages[at_.stage]);
  }

  // Ends a step: the step before it is done, and its stage free.
  __device__ __forceinline__ void close(int& previous) {
    wgmma_commit();
    wgmma_wait<1>();
    release(previous);
    previous = at_.stage;
    at_.advance();
  }

  template <int kCount>
  __device__ __forceinline__ void finish(float (&d)[kCount], int previous) {
    wgmma_wait<0>();
    // What follows may not be moved up to where it would read sums in flight.
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i]));
    release(previous);
    mark_written();
  }

  __device__ __forceinline__ void main_tile(int tile, int out_tile) {
    constexpr int kX = 64 * 128, kW = kGemmTokens * 128;
    float d[kGemmOuts / 2];
    int previous = -1, accumulate = 0;
#pragma unroll 1
    for (int step = 0; step < p_.steps; ++step) {
      const uint32_t stage = open();
      const uint64_t x = wgmma_descriptor(stage + group_ * kX);
      const uint64_t w = kDx ? wgmma_descriptor_mn<64>(stage + kW, 8192) : wgmma_descriptor(stage + kW);
      wgmma_fence();
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        WgmmaSS<kGemmOuts>::template mma<kBFloat16, false, kDx>(d, x + 2 * q, w + (kDx ? 128 : 2) * q, accumulate);
        accumulate = 1;
      }
      close(previous);
    }
    if (p_.extend) {
#pragma unroll 1
      for (int step = 0; step < Skinny::kExtensionSteps; ++step) {
        const uint32_t stage = open();
        const uint64_t x = wgmma_descriptor(stage + group_ * kX), w = wgmma_descriptor(stage + kW);
        wgmma_fence();
#pragma unroll
        for (int q = 0; q < Skinny::kExtensionProducts; ++q) {
          WgmmaSS<kGemmOuts>::template mma<kBFloat16, false, false>(d, x + 2 * q, w + 2 * q, 1);
        }
        close(previous);
      }
    }
    finish(d, previous);
    write(d, tile * kGemmTokens + group_ * 64, out_tile * kGemmOuts);
  }

  // Sums to rows of Y, 64 outs at a time, through shared memory under the 128-byte swizzle.
  __device__ __forceinline__ void write(const float (&d)[kGemmOuts / 2], int token0, int out0) {
    const T* bias = static_cast<const T*>(p_.bias);
    // stmatrix: lane l addresses row l % 8 of an 8x8 block: rows 0-7 and 8-15 of the warp, then the next 8 columns.
    const uint32_t base = shared_address(s_.out[group_]) + (warp_ * 16 + lane_ % 16) * 128;
#pragma unroll
    for (int part = 0; part < kGemmOuts / 64; ++part) {
      const int out = out0 + part * 64;
      if (out >= p_.outs || token0 >= p_.tokens) break;
      if (leader_) tensor_store_wait<1>();
      named_barrier(1 + group_, 128);  // the buffer is free
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float low = 0.0f, high = 0.0f;
          const int column = out + 8 * (j + i) + 2 * (lane_ % 4);
          if (bias != nullptr && column < p_.outs) {
            low = to_float(bias[column]);
            high = to_float(bias[column + 1]);
          }
          const float* sums = d + part * 32 + 4 * (j + i);
          words[2 * i] = pack_pair<T>(sums[0] + low, sums[1] + high);
          words[2 * i + 1] = pack_pair<T>(sums[2] + low, sums[3] + high);
        }
        const uint32_t place = base + (part % 2) * GemmShared::kOutBytes + ((j + lane_ / 16) ^ (lane_ % 8)) * 16;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(words[0]),
                     "r"(words[1]), "r"(words[2]), "r"(words[3])
                     : "memory");
      }
      shared_writes_fence();
      named_barrier(1 + group_, 128);
      if (leader_) tensor_store(&maps_.y, s_.out[group_][part % 2], out, token0);
    }
  }

  __device__ __forceinline__ void project(int tile) {
    float d[kR / 2];
    int previous = -1, accumulate = 0;
#pragma unroll 1
    for (int step = 0; step < p_.project_steps; ++step) {
      const uint32_t stage = open();
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < Skinny::kProjectColumns; ++i) {
        const uint64_t x = wgmma_descriptor(stage + i * kGemmTokens * 128 + group_ * 64 * 128);
        const uint64_t p1 = wgmma_descriptor(stage + Skinny::kProjectX + i * Skinny::kProjectRows * 128);
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          WgmmaSS<kR>::template mma<kBFloat16, false, false>(d, x + 2 * q, p1 + 2 * q, accumulate);
          accumulate = 1;
        }
      }
      close(previous);
    }
    finish(d, previous);
    const int token = tile * kGemmTokens + group_ * 64 + warp_ * 16 + lane_ / 4;
    T* product = static_cast<T*>(p_.product) + int64_t{token} * p_.rank;
#pragma unroll
    for (int j = 0; j < kR / 8; ++j) {
      const int column = 8 * j + 2 * (lane_ % 4);
      if (column >= p_.rank) break;
      if (token < p_.tokens) *reinterpret_cast<uint32_t*>(product + column) = pack_pair<T>(d[4 * j], d[4 * j + 1]);
      if (token + 8 < p_.tokens) {
        *reinterpret_cast<uint32_t*>(product + 8 * p_.rank + column) = pack_pair<T>(d[4 * j + 2], d[4 * j + 3]);
      }
    }
    __threadfence();
    async_proxy_fence();  // other blocks read it through the copy engine
    named_barrier(1 + group_, 128);
    if (leader_) {
      flag_release_add(p_.flags + tile);
      flag_release_add(p_.done);
    }
  }

  // Each warpgroup takes 32 of every 64 tokens; the second's sums are added to the first's at the end.
  __device__ __forceinline__ void gradient(const GemmGradient& g, int which, int tile) {
    float d[kR / 2];
#pragma unroll
    for (int i = 0; i < kR / 2; ++i) d[i] = 0.0f;
    int previous = -1;
#pragma unroll 1
    for (int step = 0; step < p_.gradient_steps; ++step) {
      const uint32_t stage = open();
      wgmma_fence();
#pragma unroll
      for (int unit = 0; unit < Skinny::kUnits; ++unit) {
        const uint64_t z = wgmma_descriptor_mn<64>(stage + unit * 8192 + group_ * 32 * 128, 8192);
        const uint64_t q = wgmma_descriptor_mn<Skinny::kWidth>(
            stage + Skinny::kGradientZ + unit * Skinny::kBoxes * Skinny::kBoxBytes + group_ * 32 * Skinny::kWidth * 2,
            Skinny::kBoxBytes);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          WgmmaSS<kR>::template mma<kBFloat16, true, true>(d, z + 128 * k, q + 2 * Skinny::kWidth * k, 1);
        }
      }
      close(previous);
    }
    finish(d, previous);
    constexpr int kPart = kR < 128 ? kR / 2 : 64;  // sums of a thread at a time
    float* place = reinterpret_cast<float*>(s_.out) + threadIdx.x % 128;
    if (leader_) tensor_store_wait<0>();  // a main tile may still be on its way out
#pragma unroll
    for (int part = 0; part < kR / 2; part += kPart) {
      named_barrier(3, 256);
      if (group_ == 1) {
#pragma unroll
        for (int i = 0; i < kPart; ++i) place[i * 128] = d[part + i];
      }
      named_barrier(3, 256);
      if (group_ == 0) {
#pragma unroll
        for (int i = 0; i < kPart; ++i) d[part + i] += place[i * 128];
      }
    }
    named_barrier(3, 256);
    if (group_ == 1) return;
    const int feature = tile * kGemmFeatures + warp_ * 16 + lane_ / 4;
    if (g.type == FloatType::kFloat32) {
      store<float>(g, which, feature, d);
    } else if (g.type == FloatType::kBFloat16) {
      store<__nv_bfloat16>(g, which, feature, d);
    } else {
      store<__half>(g, which, feature, d);
    }
  }

  template <typename G>
  __device__ __forceinline__ void store(const GemmGradient& g, int which, int feature, const float (&d)[kR / 2]) {
    const int64_t feature_stride = which == 0 ? p_.rank : 1, column_stride = which == 0 ? 1 : g.features;
    G* out = static_cast<G*>(g.out);
#pragma unroll
    for (int i = 0; i < kR / 2; ++i) {
      const int column = 8 * (i / 4) + 2 * (lane_ % 4) + i % 2, row = feature + 8 * (i / 2 % 2);
      if (column < p_.rank && row < g.features) {
        out[row * feature_stride + column * column_stride] = round_to<G>(d[i] * p_.factor);
      }
    }
  }

  GemmShared& s_;
  const GemmProblem& p_;
  const GemmMaps& maps_;
  const int group_, warp_, lane_;
  const bool leader_;
  RingPosition<kGemmStages> at_;
#ifdef PEFTKERN_LORA_PROFILE
  long long start_ = 0, written_ = 0;
#endif
};

}  // namespace peftkern
