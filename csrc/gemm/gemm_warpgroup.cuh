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

  __device__ __forceinline__ GemmJob next() {
    barrier_wait(&s.full[at.stage], at.parity);
    int4 job{};
    if (lane == 0)
      job = load_job(&s.jobs[at.stage]);  // the lane that releases the stage, as compute-sanitizer wants it
    const auto all = [](int word) { return __shfl_sync(0xffffffffu, word, 0); };
    return {static_cast<GemmJobKind>(all(job.x)), all(job.y), all(job.z), all(job.w)};
  }

  static __device__ __forceinline__ int4 load_job(const int4* from) {
    int4 job;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(job.x), "=r"(job.y), "=r"(job.z), "=r"(job.w)
                 : "r"(shared_address(from))
                 : "memory");
    return job;
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
