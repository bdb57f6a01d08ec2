// What the jobs of a consumer warpgroup share: its place in the ring of stages, and how sums in flight are settled.
#pragma once

#include "common/wgmma.cuh"
#include "gemm/gemm_shared.cuh"

namespace peftkern {

struct GemmWarpgroup {
  __device__ __forceinline__ explicit GemmWarpgroup(GemmShared& shared)
      : s(shared),
        group(threadIdx.x / 128 - 1),
        warp(threadIdx.x / 32 % 4),
        lane(threadIdx.x % 32),
        leader(threadIdx.x % 128 == 0) {}

  // Read by the lane that releases the stage, as compute-sanitizer wants it.
  __device__ __forceinline__ GemmJob next() {
    barrier_wait(&s.full[at.stage], at.parity);
    int words[8]{};
    if (lane == 0) load_job(words, &s.jobs[at.stage]);
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = __shfl_sync(0xffffffffu, words[i], 0);
    return {static_cast<GemmJobKind>(words[0]), words[1], words[2], words[3], words[4], words[5], words[6], words[7]};
  }

  static __device__ __forceinline__ void load_job(int (&words)[8], const GemmJob* from) {
    static_assert(sizeof(GemmJob) == 32);
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]), "=r"(words[i + 3])
                   : "r"(shared_address(from) + 4 * i)
                   : "memory");
    }
  }

  __device__ __forceinline__ void release(int stage) {  // one arrival per warp
    if (stage >= 0 && lane == 0) barrier_arrive(&s.empty[stage]);
  }

  __device__ __forceinline__ uint32_t open() {
    barrier_wait(&s.full[at.stage], at.parity);
    return shared_address(s.stages[at.stage]);
  }

  // Ends a step: the step before it is done, and its stage free.
  __device__ __forceinline__ void close(int& previous) {
    wgmma_commit();
    wgmma_wait<1>();
    release(previous);
    previous = at.stage;
    at.advance();
  }

  // What follows may not be moved up to where it would read sums in flight.
  template <int kPending = 0, int kCount>
  __device__ __forceinline__ void settle(float (&d)[kCount]) {
    wgmma_wait<kPending>();
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i]));
  }

  template <int kCount>
  __device__ __forceinline__ void finish(float (&d)[kCount], int previous) {
    settle(d);
    release(previous);
  }

  // All threads of the warpgroup.
  __device__ __forceinline__ void synchronize() const { named_barrier(1 + group, 128); }

  GemmShared& s;
  const int group, warp, lane;
  const bool leader;
  RingPosition<kGemmStages> at;
};

}  // namespace peftkern
