// lora_gemm's producer: one thread that takes jobs and loads their operands.
#pragma once

#include "common/dependent_launch.cuh"
#include "lora_matmul/gemm_shared.cuh"

namespace peftkern {

template <int kR, bool kDx, int kCluster>
class GemmProducer {
  using Skinny = GemmSkinny<kR>;

 public:
  __device__ __forceinline__ GemmProducer(GemmShared& s, const GemmProblem& p, const GemmMaps& maps)
      : s_(s), p_(p), maps_(maps), rank_(kCluster > 1 ? static_cast<int>(cluster_rank()) : 0) {}

  __device__ __forceinline__ void run() {
    const int cluster = blockIdx.x / kCluster, number = cluster - p_.schedule.dynamic_clusters;
    if (number >= 0 && number < p_.schedule.static_mains) {
      job_ = gemm_main(p_.schedule, number);
    } else {
      draw();
      take();
    }
    while (job_.kind != kGemmFinish) {
      first_ = true;
      drawn_ = false;
      const int tile = job_.unit * kCluster + rank_;
      if (job_.kind == kGemmMain) {
        main_tile(tile);
      } else if (job_.kind == kGemmProject) {
        project(tile);
      } else {
        gradient(job_.kind == kGemmGradientA, tile);
      }
      draw();
      take();
    }
    barrier_wait(&s_.empty[at_.stage], at_.parity ^ 1);
    s_.jobs[at_.stage] = make_int4(kGemmFinish, 0, 0, 0);
    barrier_arrive(&s_.full[at_.stage]);
  }

 private:
  // The counter, the flags and the skinny operands are there.
  __device__ __forceinline__ void prepared() {
    if (prepared_) return;
    prepared_ = true;
    wait_for_earlier_kernels();
    async_proxy_fence();
  }

  // Draws the next job, once per job: early, so that its number is there at the job's end, but not before this job
  // waits for a flag: the job behind that flag might be one that another waiting block has drawn.
  __device__ __forceinline__ void draw() {
    if (drawn_) return;
    drawn_ = true;
    prepared();
    if (rank_ == 0) number_ = atomicAdd(p_.counter, 1);
  }

  __device__ __forceinline__ void take() {
    if constexpr (kCluster > 1) {
      const int slot = taken_ % GemmShared::kSlots;
      if (rank_ == 0) {
        cluster_send(&s_.next[slot], number_, &s_.next_full[slot], 1);
      } else {
        barrier_arrive_expect(&s_.next_full[slot], sizeof(int));
        cluster_barrier_wait(&s_.next_full[slot], (taken_ / GemmShared::kSlots) & 1);
        number_ = *const_cast<volatile int*>(&s_.next[slot]);
      }
      ++taken_;
    }
    job_ = gemm_job(p_.schedule, number_);
  }

  // Waits for a free stage, in which `bytes` will arrive.
  __device__ __forceinline__ void open(int bytes, int tile) {
    barrier_wait(&s_.empty[at_.stage], at_.parity ^ 1);
    if (first_) s_.jobs[at_.stage] = make_int4(job_.kind, tile, job_.out_tile, 0);
    first_ = false;
    barrier_arrive_expect(&s_.full[at_.stage], bytes);
  }

  __device__ __forceinline__ void load(int place, const CUtensorMap& map, int inner, int outer) {
    tensor_load(s_.stages[at_.stage] + place, &map, inner, outer, &s_.full[at_.stage]);
  }

  // Box `box` of an operand that a cluster's blocks have in common: each loads every other one, for both.
  __device__ __forceinline__ void load_common(int box, int place, const CUtensorMap& map, int inner, int outer) {
    if constexpr (kCluster == 1) {
      load(place, map, inner, outer);
    } else if (box % kCluster == rank_) {
      tensor_load_multicast(s_.stages[at_.stage] + place, &map, inner, outer, &s_.full[at_.stage], (1 << kCluster) - 1);
    }
  }

  __device__ __forceinline__ void main_tile(int tile) {
    constexpr int kW = kGemmTokens * kGemmDepth * 2;  // where W begins in a stage
    const int token0 = tile * kGemmTokens, out0 = job_.out_tile * kGemmOuts;
#pragma unroll 1
    for (int step = 0; step < p_.steps; ++step) {
      const int depth = step * kGemmDepth;
      open(kGemmStageBytes, tile);
      load(0, maps_.x, depth, token0);
      if constexpr (kDx) {
#pragma unroll
        for (int box = 0; box < 4; ++box) load_common(box, kW + box * 8192, maps_.w, out0 + box * 64, depth);
      } else {
#pragma unroll
        for (int box = 0; box < 2; ++box) load_common(box, kW + box * 16384, maps_.w, depth, out0 + box * 128);
      }
      at_.advance();
      if (step == kGemmStages - 1 && !p_.extend) draw();
    }
    if (!p_.extend) return;
    prepared();
    flag_wait(p_.flags + tile, 2);
    draw();
#pragma unroll 1
    for (int step = 0; step < Skinny::kExtensionSteps; ++step) {
      open(kGemmStageBytes, tile);
      load(0, maps_.p, step * 64, token0);
#pragma unroll
      for (int box = 0; box < 2; ++box) load_common(box, kW + box * 16384, maps_.p2, step * 64, out0 + box * 128);
      at_.advance();
    }
  }

  __device__ __forceinline__ void project(int tile) {
#pragma unroll 1
    for (int step = 0; step < p_.project_steps; ++step) {
      const int depth = step * Skinny::kProjectColumns * 64;
      open(Skinny::kProjectBytes, tile);
#pragma unroll
      for (int i = 0; i < Skinny::kProjectColumns; ++i) {
        load(i * kGemmTokens * 128, maps_.x, depth + i * 64, tile * kGemmTokens);
      }
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        const bool columns = Skinny::kProjectColumns == 2;
        load_common(box, Skinny::kProjectX + box * Skinny::kProjectRows * 128, maps_.p1,
                    depth + (columns ? box * 64 : 0), columns ? 0 : box * Skinny::kProjectRows);
      }
      at_.advance();
      if (step == kGemmStages - 1) draw();
    }
  }

  __device__ __forceinline__ void gradient(int which, int tile) {
    if (which == 1) {
      prepared();
      flag_wait(p_.done, 2 * kCluster * p_.schedule.token_units);
    }
#pragma unroll 1
    for (int step = 0; step < p_.gradient_steps; ++step) {
      open(Skinny::kGradientBytes, tile);
#pragma unroll
      for (int unit = 0; unit < Skinny::kUnits; ++unit) {
        const int token0 = (step * Skinny::kUnits + unit) * 64;
        load(unit * 8192, maps_.z[which], tile * kGemmFeatures, token0);
#pragma unroll
        for (int i = 0; i < Skinny::kBoxes; ++i) {
          const int box = unit * Skinny::kBoxes + i;
          load_common(box, Skinny::kGradientZ + box * Skinny::kBoxBytes, maps_.q[which], i * Skinny::kWidth, token0);
        }
      }
      at_.advance();
      if (step == kGemmStages - 1) draw();
    }
  }

  GemmShared& s_;
  const GemmProblem& p_;
  const GemmMaps& maps_;
  const int rank_;
  RingPosition<kGemmStages> at_;
  GemmJob job_{};
  bool first_ = true, drawn_ = false, prepared_ = false;
  int number_ = 0, taken_ = 0;
};

}  // namespace peftkern
