// lora_gemm's producer: one thread that takes jobs and loads their operands.
#pragma once

#include "common/dependent_launch.cuh"
#include "gemm/gemm_shared.cuh"

namespace peftkern {

template <int kR, bool kDx, int kLayers>
class GemmProducer {
  using Skinny = GemmSkinny<kR>;
  using Fused = GemmSkinny<kGemmMaxFusedRank>;
  using Problem = GemmProblem<kLayers>;
  using Maps = GemmMaps<kLayers>;

 public:
  __device__ __forceinline__ GemmProducer(GemmShared& s, const Problem& p, const Maps& maps)
      : s_(s), p_(p), maps_(maps), skinny_(static_cast<int>(blockIdx.x) < p.schedule.skinny_blocks) {}

  __device__ __forceinline__ void run() {
    const int block = blockIdx.x, number = block - p_.schedule.lead_blocks;
    if (block < p_.schedule.project_blocks) {
      job_ = gemm_project(p_.schedule, block);
      project_ = block;
    } else {
      turn_ = 1;
      if (number >= 0 && number < p_.schedule.static_mains) {
        job_ = gemm_main(p_.schedule, number);
      } else {
        draw();
        take();
      }
    }
    while (job_.kind != kGemmFinish) {
      first_ = true;
      drawn_ = false;
      if (job_.kind == kGemmMain) {
        main_tile();
      } else if (job_.kind == kGemmProject) {
        bool fused = false;
        if constexpr (kDx && gemm_may_fuse(kR, kLayers)) {
          fused = p_.schedule.fused;
          if (fused) fused_project();
        }
        if (!fused) project();
      } else if (job_.kind == kGemmSum) {
        sum();
      } else {
        gradient(job_.kind == kGemmGradientA);
      }
      draw();
      take();
    }
    barrier_wait(&s_.empty[at_.stage], at_.parity ^ 1);
    s_.jobs[at_.stage] = make_int4(kGemmFinish, 0, 0, 0);
    barrier_arrive(&s_.full[at_.stage]);
  }

 private:
  // The counters, the flags and the skinny operands are there.
  __device__ __forceinline__ void prepared() {
    if (prepared_) return;
    prepared_ = true;
    wait_for_earlier_kernels();
    async_proxy_fence();
  }

  // The block's queues in its order.
  __device__ __forceinline__ int queue() const {
    if (turn_ == 0) return kProjects;
    return (turn_ == 1) == skinny_ ? kGradients : kMains;
  }

  // Draws the next job, once per job: early, so that its number is there at the job's end, but not before this job
  // waits for a flag: the job behind that flag might be one that another waiting block has drawn.
  __device__ __forceinline__ void draw() {
    if (drawn_) return;
    drawn_ = true;
    if (turn_ == 0) {
      number_ = project_;
      project_ += p_.schedule.project_blocks;
    } else {
      prepared();
      number_ = atomicAdd(p_.counters + queue(), 1);
    }
  }

  __device__ __forceinline__ void take() {
    while (true) {
      job_ = gemm_job(p_.schedule, queue(), number_);
      if (job_.kind != kGemmFinish || turn_ == 2) break;
      ++turn_;
      prepared();
      number_ = atomicAdd(p_.counters + queue(), 1);
    }
    if constexpr (kDx) {
      const int last = number_ + p_.schedule.static_mains + p_.schedule.blocks - p_.schedule.jobs[kMains];
      ahead_end_ = 0;
      if (job_.kind == kGemmMain && last >= 0) look_ahead(last);
    }
  }

  // The last round: boxes from last on, every blocks-th one, of the gradients that are still to be taken.
  __device__ __forceinline__ void look_ahead(int last) {
    int taken;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(taken) : "l"(p_.counters + kGradients) : "memory");
    const int boxes = 2 * p_.gradient_steps;
    ahead_ = (taken + p_.schedule.skinny_blocks) * boxes + last;
    ahead_end_ = min(ahead_ + kGemmPrefetches * p_.schedule.blocks, p_.schedule.jobs[kGradients] * boxes);
  }

  __device__ __forceinline__ void prefetch_gradient(int box) {
    const int boxes = 2 * p_.gradient_steps, within = box % boxes;
    const GemmJob job = gemm_gradient(p_.schedule, box / boxes);
    if (job.kind == kGemmSum) return;
    tensor_prefetch(job.kind == kGemmGradientA ? &maps_.z_a : &maps_.z_b[layer_of(job)],
                    job.tile * kGemmFeatures + within % 2 * 64,
                    job.other * p_.schedule.part_tiles * kGemmTokens + within / 2 * Skinny::kTokens);
  }

  static __device__ __forceinline__ int layer_of(const GemmJob& job) { return kLayers == 1 ? 0 : job.layer; }

  __device__ __forceinline__ int layer() const { return layer_of(job_); }

  // Waits for a free stage, in which `bytes` will arrive.
  __device__ __forceinline__ void open(int bytes) {
    barrier_wait(&s_.empty[at_.stage], at_.parity ^ 1);
    if (first_) s_.jobs[at_.stage] = make_int4(job_.kind, job_.tile, job_.other, job_.layer);
    first_ = false;
    barrier_arrive_expect(&s_.full[at_.stage], bytes);
  }

  __device__ __forceinline__ void load(int place, const CUtensorMap& map, int inner, int outer) {
    tensor_load(s_.stages[at_.stage] + place, &map, inner, outer, &s_.full[at_.stage]);
  }

  __device__ __forceinline__ void main_tile() {
    constexpr int kW = kGemmTokens * kGemmDepth * 2;  // where W begins in a stage
    const int token0 = job_.tile * kGemmTokens, out0 = job_.other * kGemmOuts;
    const int own = kDx ? 0 : layer();          // y's layer
    int ahead = ahead_, from = own, depth = 0;  // layer that is read
#pragma unroll 1
    for (int step = 0; step < p_.steps; ++step) {
      if constexpr (kDx) {
        if (ahead < ahead_end_ && step % 4 == 3) {
          prefetch_gradient(ahead);
          ahead += p_.schedule.blocks;
        }
        if constexpr (kLayers > 1) {
          if (depth == p_.layers[from].steps * kGemmDepth) {
            ++from;
            depth = 0;
          }
        }
      }
      open(kGemmStageBytes);
      load(0, maps_.x[kDx ? from : 0], depth, token0);
      if constexpr (kDx) {
#pragma unroll
        for (int box = 0; box < 4; ++box) load(kW + box * 8192, maps_.w[from], out0 + box * 64, depth);
      } else {
        load(kW, maps_.w[from], depth, out0);
      }
      at_.advance();
      depth += kGemmDepth;
      if (step == kGemmStages - 1 && p_.extension == 0) draw();
    }
    if (p_.extension == 0) return;
    prepared();
    flag_wait(p_.flags + job_.tile, p_.projects);
    draw();
    // Columns beyond a layer's rank are 0.
    int column = kLayers > 1 && !kDx && p_.layers[own].rank == 0 ? kGemmBeyond : 0;
#pragma unroll 1
    for (int products = p_.extension; products > 0; products -= Skinny::kExtensionProducts, column += 64) {
      open(kGemmStageBytes);
      load(0, maps_.p[own], column, token0);
      load(kW, maps_.p2[own], column, out0);
      at_.advance();
    }
  }

  __device__ __forceinline__ void project() {
    if (p_.project_waits) prepared();
    const int from = kDx ? layer() : 0, steps = p_.layers[from].project_steps;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int depth = step * Skinny::kProjectColumns * 64;
      open(kLayers == 1 ? Skinny::kProjectBytes : p_.project_bytes);
#pragma unroll
      for (int i = 0; i < Skinny::kProjectColumns; ++i) {
        load(i * kGemmTokens * 128, maps_.x[from], depth + i * 64, job_.tile * kGemmTokens);
      }
      if constexpr (kDx) {
#pragma unroll
        for (int i = 0; i < Skinny::kProjectColumns; ++i) {
          load_p1<Skinny>(Skinny::kProjectX + i * 64 * kR * 2, depth + i * 64);
        }
      } else if constexpr (kLayers > 1) {
        load_all_p1(depth);
      } else {
#pragma unroll
        for (int box = 0; box < 2; ++box) {
          constexpr bool columns = Skinny::kProjectColumns == 2;
          load(Skinny::kProjectX + box * Skinny::kProjectRows * 128, maps_.p1[0], depth + (columns ? box * 64 : 0),
               columns ? 0 : box * Skinny::kProjectRows);
        }
      }
      at_.advance();
    }
  }

  // Every layer's rows of P1 where its columns of P are; behind them lies anything, for columns that nobody keeps.
  __device__ __forceinline__ void load_all_p1(int depth) {
#pragma unroll
    for (int i = 0; i < Skinny::kProjectColumns; ++i) {
#pragma unroll
      for (int j = 0; j < kLayers; ++j) {
        if (p_.layers[j].rank == 0) continue;
        load(Skinny::kProjectX + (i * kR + p_.layers[j].column) * 128, maps_.p1[j], depth + i * 64, 0);
      }
    }
  }

  // 64 rows of P1 as it is stored.
  template <typename Boxes>
  __device__ __forceinline__ void load_p1(int place, int depth) {
#pragma unroll
    for (int box = 0; box < Boxes::kBoxes; ++box) {
      load(place + box * Boxes::kP1Box, maps_.p1[layer()], box * Boxes::kWidth, depth);
    }
  }

  // S stays where outs wait to be written in main tiles.
  __device__ __forceinline__ void fused_project() {
    if (p_.project_waits) prepared();
    const int token0 = job_.tile * kGemmFusedTiles * kGemmTokens, steps = p_.layers[layer()].project_steps;
    // The job before has read its own S.
    if (job_.other + layer() > 0) barrier_wait(&s_.empty[last_.stage], last_.parity);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      open(Fused::kFusedBytes + (step == 0 ? Fused::kFusedProduct : 0));
#pragma unroll
      for (int i = 0; i < kGemmFusedTiles; ++i) {
        load(i * kGemmTokens * 128, maps_.x[layer()], step * 64, token0 + i * kGemmTokens);
      }
      load_p1<Fused>(Fused::kFusedX, step * 64);
      if (step == 0) {
#pragma unroll
        for (int i = 0; i < kGemmFusedTiles; ++i) {
          tensor_load(s_.out[0][0] + i * Fused::kBoxBytes, &maps_.q_b[layer()], 0, token0 + i * kGemmTokens,
                      &s_.full[at_.stage]);
        }
      }
      last_ = at_;
      at_.advance();
    }
  }

  __device__ __forceinline__ void sum() {
    prepared();
    flag_wait(p_.summed, p_.schedule.jobs[kProjects]);
    draw();
    open(0);
    at_.advance();
  }

  __device__ __forceinline__ void gradient(bool of_a) {
    const int first_tile = job_.other * p_.schedule.part_tiles;
    if (of_a) {
      prepared();
      flag_wait(p_.done + job_.other, p_.projects * min(p_.schedule.part_tiles, p_.schedule.token_tiles - first_tile));
    }
    const CUtensorMap& z = of_a ? maps_.z_a : maps_.z_b[layer()];
    const CUtensorMap& q = of_a ? maps_.q_a : maps_.q_b[layer()];
#pragma unroll 1
    for (int step = 0; step < p_.gradient_steps; ++step) {
      const int token0 = first_tile * kGemmTokens + step * Skinny::kTokens;
      open(Skinny::kGradientBytes);
#pragma unroll
      for (int box = 0; box < 2; ++box) {
        load(box * Skinny::kZBytes, z, job_.tile * kGemmFeatures + box * 64, token0);
      }
#pragma unroll
      for (int box = 0; box < Skinny::kBoxes; ++box) {
        load(2 * Skinny::kZBytes + box * Skinny::kBoxBytes, q, box * Skinny::kWidth, token0);
      }
      at_.advance();
      if (step == kGemmStages - 1) draw();
    }
  }

  GemmShared& s_;
  const Problem& p_;
  const Maps& maps_;
  const bool skinny_;
  RingPosition<kGemmStages> at_, last_;  // last_: of the fused project job before
  GemmJob job_{};
  bool first_ = true, drawn_ = false, prepared_ = false;
  int number_ = 0, turn_ = 0;
  int project_ = 0;                // the next project job's number, less the blocks that project
  int ahead_ = 0, ahead_end_ = 0;  // boxes of gradients to prefetch beside a main tile of the last round
};

}  // namespace peftkern
