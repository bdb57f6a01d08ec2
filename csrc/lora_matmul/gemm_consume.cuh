// lora_gemm's consumers: two warpgroups that multiply what the producer loads, and write the results.
#pragma once

#include <type_traits>

#include "common/numbers.cuh"
#include "common/philox.h"
#include "common/wgmma.cuh"
#include "lora_matmul/gemm_shared.cuh"

namespace peftkern {

template <typename T, int kR, bool kDx, bool kDropout>
class GemmConsumer {
  using Skinny = GemmSkinny<kR>;
  static constexpr bool kBFloat16 = std::is_same<T, __nv_bfloat16>::value;
  static constexpr int kParts = kGemmOuts / 64;  // that a tile's outs are written in

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
    GemmJob job = next();
    while (job.kind != kGemmFinish) {
      if (job.kind == kGemmMain) {
        Outs outs;
        main_tile<false>(job, outs);
        count(job.kind);
        job = next();
        while (job.kind == kGemmMain) {
          main_tile<true>(job, outs);
          count(job.kind);
          job = next();
        }
#pragma unroll
        for (int part = 0; part < kParts; ++part) write(outs, part);
      } else {
        if (job.kind == kGemmProject) {
          project(job.tile);
        } else {
          const int which = job.kind == kGemmGradientA;
          gradient(p_.gradients[which], which, job.tile, job.other);
        }
        count(job.kind);
        job = next();
      }
    }
    if (leader_) tensor_store_finish();
#ifdef PEFTKERN_LORA_PROFILE
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (profiled) p_.profile[blockIdx.x * 15 + 1] = now;
#endif
  }

 private:
  // Rounded outs that wait to be written.
  struct Outs {
    uint32_t packed[kGemmOuts / 4];
    int token0, out0;
  };

  __device__ __forceinline__ GemmJob next() {
    barrier_wait(&s_.full[at_.stage], at_.parity);
    const volatile int* words = reinterpret_cast<const volatile int*>(&s_.jobs[at_.stage]);
#ifdef PEFTKERN_LORA_PROFILE
    start_ = written_ = clock64();
#endif
    return {static_cast<GemmJobKind>(words[0]), words[1], words[2]};
  }

  __device__ __forceinline__ void count(int kind) {
#ifdef PEFTKERN_LORA_PROFILE
    if (!leader_ || group_ != 0 || p_.profile == nullptr) return;
    long long* at = p_.profile + (blockIdx.x * 5 + kind) * 3;
    const long long end = clock64();
    at[0] += 1;
    at[1] += end - start_;
    at[2] += end - written_;
#endif
  }

  __device__ __forceinline__ void mark_written() {
#ifdef PEFTKERN_LORA_PROFILE
    written_ = clock64();
#endif
  }

  __device__ __forceinline__ void release(int stage) {  // one arrival per warp
    if (stage >= 0 && lane_ == 0) barrier_arrive(&s_.empty[stage]);
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

  // What follows may not be moved up to where it would read sums in flight.
  template <int kCount>
  __device__ __forceinline__ void settle(float (&d)[kCount]) {
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i]));
  }

  template <int kCount>
  __device__ __forceinline__ void finish(float (&d)[kCount], int previous) {
    settle(d);
    release(previous);
    mark_written();
  }

  __device__ __forceinline__ void main_step(float (&d)[kGemmOuts / 2], int& previous, int accumulate) {
    const uint32_t stage = open();
    const uint64_t x = wgmma_descriptor(stage + group_ * kX);
    const uint64_t w = kDx ? wgmma_descriptor_mn<64>(stage + kW, 8192) : wgmma_descriptor(stage + kW);
    wgmma_fence();
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      WgmmaSS<kGemmOuts>::template mma<kBFloat16, false, kDx>(d, x + 2 * q, w + (kDx ? 128 : 2) * q,
                                                              q == 0 ? accumulate : 1);
    }
    close(previous);
  }

  // The outs of the tile before go out beside the first steps, dropout's mask is made beside the ones after.
  // First steps are apart from the others everywhere: that they overwrite the sums must be plain to the compiler, or it
  // keeps registers for sums from job to job.
  template <bool kPending>
  __device__ __forceinline__ void main_tile(const GemmJob& job, Outs& outs) {
    const int token0 = job.tile * kGemmTokens + group_ * 64, out0 = job.other * kGemmOuts;
    float d[kGemmOuts / 2];
    int previous = -1, step = 1;
    if (kPending && p_.steps >= kParts) {
      main_step(d, previous, 0);
      write(outs, 0);
#pragma unroll
      for (; step < kParts; ++step) {
        main_step(d, previous, 1);
        write(outs, step);
      }
    } else {
      if constexpr (kPending) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) write(outs, part);
      }
      main_step(d, previous, 0);
    }
    if constexpr (kMasked) {
      if (leader_) tensor_store_wait<0>();
      named_barrier(1 + group_, 128);
      int call = 0;
#pragma unroll 1
      for (; step < p_.steps; ++step) {
        main_step(d, previous, 1);
        if (call < kMaskCalls) mask_bits(call++, token0, out0);
      }
#pragma unroll 1
      while (call < kMaskCalls) mask_bits(call++, token0, out0);
    } else {
#pragma unroll 1
      for (; step < p_.steps; ++step) main_step(d, previous, 1);
    }
    if constexpr (kMasked) {
      extend_masked(d, previous, outs);
    } else {
      if (p_.extend) extend(d, previous);
      const T* bias = static_cast<const T*>(p_.bias);
      if (kDx || bias == nullptr) {
        finish(d, previous);
        pack(d, outs);
      } else {
        uint32_t pairs[kGemmOuts / 8];
#pragma unroll
        for (int i = 0; i < kGemmOuts / 8; ++i) {
          const int column = out0 + 8 * i + 2 * (lane_ % 4);
          pairs[i] = column < p_.outs ? *reinterpret_cast<const uint32_t*>(bias + column) : 0;
        }
        finish(d, previous);
#pragma unroll
        for (int i = 0; i < kGemmOuts / 4; ++i) {
          const T* pair = reinterpret_cast<const T*>(&pairs[i / 2]);
          outs.packed[i] = pack_pair<T>(d[2 * i] + to_float(pair[0]), d[2 * i + 1] + to_float(pair[1]));
        }
      }
    }
    outs.token0 = token0;
    outs.out0 = out0;
  }

  __device__ __forceinline__ void pack(const float (&d)[kGemmOuts / 2], Outs& outs) {
#pragma unroll
    for (int i = 0; i < kGemmOuts / 4; ++i) outs.packed[i] = pack_pair<T>(d[2 * i], d[2 * i + 1]);
  }

  __device__ __forceinline__ void extend(float (&d)[kGemmOuts / 2], int& previous) {
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

  // The same with sums of its own for 64 outs at a time, of which the kept ones are added.
  __device__ __forceinline__ void extend_masked(float (&d)[kGemmOuts / 2], int previous, Outs& outs) {
    settle(d);
    release(previous);
    mark_written();
    uint32_t stages[Skinny::kExtensionSteps];
    const int first = at_.stage;
#pragma unroll
    for (int step = 0; step < Skinny::kExtensionSteps; ++step) {
      stages[step] = open();
      at_.advance();
    }
    named_barrier(1 + group_, 128);  // the mask is there
    const uint8_t* bits = &s_.out[group_][0][0] + (warp_ * 16 + lane_ / 4) * (kGemmOuts / 8);
    float e[32];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      wgmma_fence();
#pragma unroll
      for (int step = 0; step < Skinny::kExtensionSteps; ++step) {
        const uint64_t x = wgmma_descriptor(stages[step] + group_ * kX);
        const uint64_t w = wgmma_descriptor(stages[step] + kW + part * 64 * 128);
#pragma unroll
        for (int q = 0; q < Skinny::kExtensionProducts; ++q) {
          WgmmaSS<64>::template mma<kBFloat16, false, false>(e, x + 2 * q, w + 2 * q, step + q > 0);
        }
      }
      wgmma_commit();
      uint2 rows[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        rows[i] = *reinterpret_cast<const uint2*>(bits + 8 * i * (kGemmOuts / 8) + 8 * part);
        rows[i].x >>= 2 * (lane_ % 4);
        rows[i].y >>= 2 * (lane_ % 4);
      }
      settle(e);
#pragma unroll
      for (int i = 0; i < 32; i += 2) {
        const uint32_t row = i < 16 ? rows[i / 2 % 2].x : rows[i / 2 % 2].y;
        const uint32_t bit = 1u << (i / 4 % 4 * 8);
        outs.packed[part * 16 + i / 2] = pack_pair<T>(d[part * 32 + i] + ((row & bit) != 0 ? e[i] : 0.0f),
                                                      d[part * 32 + i + 1] + ((row & 2 * bit) != 0 ? e[i + 1] : 0.0f));
      }
    }
#pragma unroll
    for (int step = 0; step < Skinny::kExtensionSteps; ++step) release((first + step) % kGemmStages);
  }

  // ---- dropout
  // Which of eight consecutive numbers are kept: bit i for the i-th.
  __device__ __forceinline__ void mask_bits(int call, int token0, int out0) {
    constexpr int kAcross = kGemmOuts / 8;
    const int at = call * 128 + threadIdx.x % 128;
    const PhiloxWords v = dropout_numbers(seed(), token0 + at / kAcross, out0 / 8 + at % kAcross);
    const uint32_t words[4] = {v.w0, v.w1, v.w2, v.w3};
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      kept |= ((words[i] & 0xffff) >= p_.threshold ? 1u : 0u) << (2 * i);
      kept |= ((words[i] >> 16) >= p_.threshold ? 1u : 0u) << (2 * i + 1);
    }
    s_.out[group_][0][at] = static_cast<uint8_t>(kept);
  }

  // Zeroes what is dropped of this warpgroup's rows of a box of 64 columns in shared memory. A row's eight chunks of 16
  // bytes are the eight numbers of one call each, swizzled by the row.
  template <int kRows>
  __device__ __forceinline__ void mask_box(uint32_t box, int token0, int column0) {
    const int thread = threadIdx.x % 128, chunk = thread % 8;
    const uint64_t key = seed();
#pragma unroll 2
    for (int i = 0; i < kRows / 16; ++i) {
      const int row = thread / 8 + 16 * i;
      const uint32_t place = box + row * 128 + (chunk ^ row % 8) * 16;
      const PhiloxWords v = dropout_numbers(key, token0 + row, column0 / 8 + chunk);
      const uint32_t words[4] = {v.w0, v.w1, v.w2, v.w3};
      uint32_t values[4];
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
                   : "r"(place)
                   : "memory");
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if ((words[j] & 0xffff) < p_.threshold) values[j] &= 0xffff0000u;
        if ((words[j] >> 16) < p_.threshold) values[j] &= 0x0000ffffu;
      }
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(values[0]), "r"(values[1]),
                   "r"(values[2]), "r"(values[3])
                   : "memory");
    }
  }

  __device__ __forceinline__ void masked() {
    shared_writes_fence();
    named_barrier(1 + group_, 128);
  }

  // Loaded anew for each use: the generator's round keys would be kept in registers beside the sums.
  __device__ __forceinline__ uint64_t seed() const {
    uint64_t v;
    asm volatile("ld.global.b64 %0, [%1];" : "=l"(v) : "l"(p_.seed));
    return v;
  }

  // ---- outs
  // 64 of the packed outs to rows of Y, through shared memory under the 128-byte swizzle.
  __device__ __forceinline__ void write(const Outs& outs, int part) {
    const int out = outs.out0 + part * 64;
    if (out >= p_.outs || outs.token0 >= p_.tokens) return;
    // stmatrix: lane l addresses row l % 8 of an 8x8 block: rows 0-7 and 8-15 of the warp, then the next 8 columns.
    const uint32_t base = shared_address(s_.out[group_][part % 2]) + (warp_ * 16 + lane_ % 16) * 128;
    if (leader_) tensor_store_wait<1>();
    named_barrier(1 + group_, 128);  // the buffer is free
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const uint32_t* words = outs.packed + part * 16 + 2 * j;
      const uint32_t place = base + ((j + lane_ / 16) ^ (lane_ % 8)) * 16;
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(place), "r"(words[0]),
                   "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    }
    shared_writes_fence();
    named_barrier(1 + group_, 128);
    if (leader_) tensor_store(&maps_.y, s_.out[group_][part % 2], out, outs.token0);
  }

  __device__ __forceinline__ void project_step(float (&d)[kR / 2], int& previous, int tile, int step, int accumulate) {
    const uint32_t stage = open();
    if constexpr (kDropout && !kDx) {
#pragma unroll
      for (int i = 0; i < Skinny::kProjectColumns; ++i) {
        mask_box<64>(stage + i * kGemmTokens * 128 + group_ * kX, tile * kGemmTokens + group_ * 64,
                     (step * Skinny::kProjectColumns + i) * 64);
      }
      masked();
    }
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Skinny::kProjectColumns; ++i) {
      const uint64_t x = wgmma_descriptor(stage + i * kGemmTokens * 128 + group_ * kX);
      const uint64_t p1 = wgmma_descriptor(stage + Skinny::kProjectX + i * Skinny::kProjectRows * 128);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        WgmmaSS<kR>::template mma<kBFloat16, false, false>(d, x + 2 * q, p1 + 2 * q, i + q > 0 ? 1 : accumulate);
      }
    }
    close(previous);
  }

  __device__ __forceinline__ void project(int tile) {
    float d[kR / 2];
    int previous = -1;
    project_step(d, previous, tile, 0, 0);
#pragma unroll 1
    for (int step = 1; step < p_.project_steps; ++step) project_step(d, previous, tile, step, 1);
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
      flag_release_add(p_.done + tile / p_.schedule.part_tiles);
    }
  }

  __device__ __forceinline__ void gradient_step(float (&d)[kR / 2], int& previous, int which, int tile, int token0,
                                                int accumulate) {
    const uint32_t stage = open(), box = stage + group_ * Skinny::kZBytes;
    if constexpr (kMasked) {
      if (which == 1) {
        mask_box<Skinny::kTokens>(box, token0, tile * kGemmFeatures + group_ * 64);
        masked();
      }
    }
    const uint64_t z = wgmma_descriptor_mn<64>(box, Skinny::kZBytes);
    const uint64_t q = wgmma_descriptor_mn<Skinny::kWidth>(stage + 2 * Skinny::kZBytes, Skinny::kBoxBytes);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Skinny::kTokens / 16; ++k) {
      WgmmaSS<kR>::template mma<kBFloat16, true, true>(d, z + 128 * k, q + 2 * Skinny::kWidth * k,
                                                       k > 0 ? 1 : accumulate);
    }
    close(previous);
  }

  __device__ __forceinline__ void gradient(const GemmGradient& g, int which, int tile, int part) {
    const int token0 = part * p_.schedule.part_tiles * kGemmTokens;
    float d[kR / 2];
    int previous = -1;
    gradient_step(d, previous, which, tile, token0, 0);
#pragma unroll 1
    for (int step = 1; step < p_.gradient_steps; ++step) {
      gradient_step(d, previous, which, tile, token0 + step * Skinny::kTokens, 1);
    }
    finish(d, previous);
    if (p_.schedule.parts > 1 && !sum_parts(g, p_.schedule.feature_tiles[which], tile, part, d)) return;
    const int feature = tile * kGemmFeatures + group_ * 64 + warp_ * 16 + lane_ / 4;
    if (g.type == FloatType::kFloat32) {
      store<float>(g, which, feature, d);
    } else if (g.type == FloatType::kBFloat16) {
      store<__nv_bfloat16>(g, which, feature, d);
    } else {
      store<__half>(g, which, feature, d);
    }
  }

  // Leaves this part's sums; true with all parts' in d, added in their order, if it is the last to be done.
  __device__ __forceinline__ bool sum_parts(const GemmGradient& g, int tiles, int tile, int part, float (&d)[kR / 2]) {
    constexpr int kFours = kR / 8;
    float4* sums = reinterpret_cast<float4*>(g.sums) + int64_t{tile} * kFours * 256 + threadIdx.x - 128;
    const int64_t stride = int64_t{tiles} * kFours * 256;
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      __stcg(sums + part * stride + i * 256, make_float4(d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]));
    }
    __threadfence();
    named_barrier(3, 256);
    if (leader_ && group_ == 0) {
      s_.arrived = atomicAdd(g.arrivals + tile, 1);
      __threadfence();
    }
    named_barrier(3, 256);
    if (s_.arrived + 1 < p_.schedule.parts) return false;
#pragma unroll
    for (int i = 0; i < kR / 2; ++i) d[i] = 0.0f;
#pragma unroll 1
    for (int from = 0; from < p_.schedule.parts; ++from) {
#pragma unroll
      for (int i = 0; i < kFours; ++i) {
        const float4 v = __ldcg(sums + from * stride + i * 256);
        d[4 * i] += v.x;
        d[4 * i + 1] += v.y;
        d[4 * i + 2] += v.z;
        d[4 * i + 3] += v.w;
      }
    }
    return true;
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

  static constexpr int kX = 64 * 128, kW = kGemmTokens * 128;  // a warpgroup's rows of x in a stage; where W begins
  static constexpr bool kMasked = kDropout && kDx;
  static constexpr int kMaskCalls = 64 * kGemmOuts / 8 / 128;  // of a thread for a tile

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
