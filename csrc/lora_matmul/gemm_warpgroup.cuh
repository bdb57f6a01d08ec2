// What the jobs of a consumer warpgroup share: its place in the ring of stages, and how sums in flight are settled.
#pragma once

#include "common/wgmma.cuh"
#include "lora_matmul/gemm_shared.cuh"

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
    const volatile int* words = reinterpret_cast<const volatile int*>(&s.jobs[at.stage]);
    profile_job_start();
    return {static_cast<GemmJobKind>(words[0]), words[1], words[2]};
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
    profile_products_done();
  }

  // All threads of the warpgroup.
  __device__ __forceinline__ void synchronize() const { named_barrier(1 + group, 128); }

  // ---- cycles of the jobs, in benchmarks' builds
#ifdef PEFTKERN_LORA_PROFILE
  __device__ __forceinline__ bool profiled(const GemmProblem& p) const {
    return leader && group == 0 && p.profile != nullptr;
  }
  __device__ __forceinline__ void profile_time(const GemmProblem& p, int place) const {
    long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (profiled(p)) p.profile[blockIdx.x * 15 + place] = now;
  }
  __device__ __forceinline__ void profile_start(const GemmProblem& p) const { profile_time(p, 0); }
  __device__ __forceinline__ void profile_end(const GemmProblem& p) const { profile_time(p, 1); }
  __device__ __forceinline__ void profile_job_start() { job_start = products_done = clock64(); }
  __device__ __forceinline__ void profile_products_done() { products_done = clock64(); }
  __device__ __forceinline__ void profile_job_end(const GemmProblem& p, int kind) const {
    if (!profiled(p)) return;
    long long* to = p.profile + (blockIdx.x * 5 + kind) * 3;
    const long long end = clock64();
    to[0] += 1;
    to[1] += end - job_start;
    to[2] += end - products_done;
  }
  long long job_start = 0, products_done = 0;
#else
  __device__ __forceinline__ void profile_start(const GemmProblem&) const {}
  __device__ __forceinline__ void profile_end(const GemmProblem&) const {}
  __device__ __forceinline__ void profile_job_start() {}
  __device__ __forceinline__ void profile_products_done() {}
  __device__ __forceinline__ void profile_job_end(const GemmProblem&, int) const {}
#endif

  GemmShared& s;
  const int group, warp, lane;
  const bool leader;
  RingPosition<kGemmStages> at;
};

}  // namespace peftkern
