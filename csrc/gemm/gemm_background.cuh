// lora_gemm's projections by the warps that the producer leaves idle, beside the main tiles: P = (m x) P1^T.
//
// 16 tokens a job, whose contraction the warps share in turns of 64 columns; x and P1 come from memory straight into
// mma.sync's fragments. A thread holds 16 neighbouring columns of two rows, one call of dropout each: which column is
// which along the contraction does not matter as long as x and P1 agree. Nothing is waited for, so that every other job
// may wait for these.
#pragma once

#include <type_traits>

#include "common/dependent_launch.cuh"
#include "common/numbers.cuh"
#include "gemm/gemm_dropout.cuh"
#include "gemm/gemm_shared.cuh"

namespace peftkern {

template <typename T, int kR, bool kMasked, int kWarps>
class GemmBackground {
  static constexpr int kTiles = kR / 8;  // of 8 columns of P
  static constexpr int kBarrier = 8;

 public:
  // warp: 0 to kWarps - 1.
  __device__ __forceinline__ GemmBackground(GemmShared& s, const GemmProblem& p, int warp)
      : s_(s), p_(p), warp_(warp), lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    const int jobs = p_.schedule.background_jobs;
    if (jobs == 0) return;
    wait_for_earlier_kernels();
    const bool draws = warp_ == 0 && lane_ == 0;
    int next = draws ? atomicAdd(p_.counters + kBackground, 1) : 0;
    while (true) {
      if (draws) s_.background_job = next;
      synchronize();
      const int job = *const_cast<const volatile int*>(&s_.background_job);
      if (job >= jobs) return;
      if (draws) next = atomicAdd(p_.counters + kBackground, 1);
      project(job);
    }
  }

 private:
  __device__ __forceinline__ void synchronize() const { named_barrier(kBarrier, kWarps * 32); }

  static __device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    if constexpr (std::is_same<T, __nv_bfloat16>::value) {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
      asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
          "{%0, %1, %2, %3};"
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
  }

  // 16 columns of a row, zero where there are none. Issued where it stands: the masks are made meanwhile.
  static __device__ __forceinline__ void load(uint32_t (&v)[8], const T* row, int columns) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      asm volatile(
          "{\n"
          ".reg .pred inside;\n"
          "setp.ne.u32 inside, %5, 0;\n"
          "mov.b32 %0, 0;\n"
          "mov.b32 %1, 0;\n"
          "mov.b32 %2, 0;\n"
          "mov.b32 %3, 0;\n"
          "@inside ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];\n"
          "}"
          : "=&r"(v[4 * i]), "=&r"(v[4 * i + 1]), "=&r"(v[4 * i + 2]), "=&r"(v[4 * i + 3])
          : "l"(row + 8 * i), "r"(static_cast<uint32_t>(columns > 8 * i)));
    }
  }

  // Of two tiles' columns of P.
  __device__ __forceinline__ void load_pair(uint32_t (&b)[2][8], const T* p1, int tile, int columns) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load(b[i], p1 + int64_t{min(8 * (tile + i) + lane_ / 4, p_.rank - 1)} * p_.depth, columns);
    }
  }

  __device__ __forceinline__ void project(int job) {
    const int token = job * kGemmBackgroundTokens + lane_ / 4, depth = p_.depth;
    float d[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) d[i / 4][i % 4] = 0.0f;
    const int first = warp_ * 64 + lane_ % 4 * 16;
    const T* x0 = static_cast<const T*>(p_.x) + int64_t{min(token, p_.tokens - 1)} * depth + first;
    const T* x1 = static_cast<const T*>(p_.x) + int64_t{min(token + 8, p_.tokens - 1)} * depth + first;
    const T* p1 = static_cast<const T*>(p_.p1) + first;
    const DropoutCalls calls(kMasked ? p_.seed : nullptr);
    DropoutRow rows[2];
    if constexpr (kMasked) {
      rows[0] = calls.row(token);
      rows[1] = calls.row(token + 8);
    }
#pragma unroll 1
    for (int column = first; column < depth + lane_ % 4 * 16; column += kWarps * 64) {
      const int columns = depth - column;
      uint32_t a[2][8], b[2][8];
      load(a[0], x0, columns);
      load(a[1], x1, columns);
      load_pair(b, p1, 0, columns);
      if constexpr (kMasked) {
        const DropoutColumn call = calls.column(column / kDropoutColumns);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          uint32_t kept[8];
          calls.kept(rows[row], call, p_.threshold, kept);
#pragma unroll
          for (int i = 0; i < 8; ++i) a[row][i] &= kept[i];
        }
      }
#pragma unroll
      for (int pair = 0; pair < kTiles; pair += 2) {
        if (pair > 0) load_pair(b, p1, pair, columns);
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            mma(d[pair + i], a[0][k], a[1][k], a[0][k + 1], a[1][k + 1], b[i][k], b[i][k + 1]);
          }
        }
      }
      x0 += kWarps * 64;
      x1 += kWarps * 64;
      p1 += kWarps * 64;
    }
    finish(token, d);
  }

  // The first warp adds the others' sums, in their order, and writes.
  __device__ __forceinline__ void finish(int token, float (&d)[kTiles][4]) {
    T* product = static_cast<T*>(p_.product) + int64_t{token} * p_.rank;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      float4(&sums)[kGemmBackgroundWarps - 1][32] = s_.background_sums[i % 2];
      if (warp_ > 0) sums[warp_ - 1][lane_] = make_float4(d[i][0], d[i][1], d[i][2], d[i][3]);
      synchronize();
      if (warp_ > 0) continue;
#pragma unroll
      for (int other = 0; other < kWarps - 1; ++other) {
        const float4 v = sums[other][lane_];
        d[i][0] += v.x;
        d[i][1] += v.y;
        d[i][2] += v.z;
        d[i][3] += v.w;
      }
      const int column = 8 * i + 2 * (lane_ % 4);
      if (column >= p_.rank) continue;
      if (token < p_.tokens) *reinterpret_cast<uint32_t*>(product + column) = pack_pair<T>(d[i][0], d[i][1]);
      if (token + 8 < p_.tokens) {
        *reinterpret_cast<uint32_t*>(product + 8 * p_.rank + column) = pack_pair<T>(d[i][2], d[i][3]);
      }
    }
    if (warp_ > 0) return;
    __threadfence();
    async_proxy_fence();  // other blocks read it through the copy engine
    __syncwarp();
    if (lane_ == 0) {
      const int tile = token / kGemmTokens;
      flag_release_add(p_.flags + tile);
      flag_release_add(p_.done + tile / p_.schedule.part_tiles);
    }
  }

  GemmShared& s_;
  const GemmProblem& p_;
  const int warp_, lane_;
};

}  // namespace peftkern
