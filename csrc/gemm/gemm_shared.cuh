// What the roles of lora_gemm share: the problem, the shared memory, and how flags travel.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/float_type.h"
#include "common/hopper.cuh"
#include "gemm/gemm_config.h"

namespace peftkern {

struct GemmGradient {
  void* out;  // [features, rank], of A [rank, features]
  FloatType type;
  int features;
  float* sums;    // of each part: [part][feature tile][rank / 8][thread] of four sums
  int* arrivals;  // parts done of each feature tile
};

struct GemmProblem {
  GemmSchedule schedule;
  int tokens, outs, rank;
  int steps;           // of kGemmDepth along the main contraction
  int project_steps;   // along the same contraction
  int gradient_steps;  // of a part
  bool extend;         // main tiles end with P P2^T
  bool add;            // outs are added to what is there
  const void* bias;    // [outs] or null
  void* product;       // P [tokens, rank], written by project jobs
  GemmGradient gradients[2];
  float factor;         // of the gradients
  const int64_t* seed;  // of dropout
  uint32_t threshold;   // twice: of a pair of numbers
  int* counters;        // jobs taken of each queue
  int* done;            // for each part, warpgroups that have written their rows of P
  int* flags;           // the same for each token tile
  int* summed;          // fused project jobs that have left their sums
  bool project_waits;   // P1 is of this stream's kernel before
};

struct GemmMaps {
  CUtensorMap x, w, y;
  CUtensorMap p1;          // of project jobs
  CUtensorMap p, p2;       // of main tiles' extension
  CUtensorMap z[2], q[2];  // of gradient jobs: features and product
};

struct GemmShared {
  static constexpr int kOutBytes = 64 * 64 * 2;  // 64 tokens x 64 outs on their way out

  alignas(1024) uint8_t stages[kGemmStages][kGemmStageBytes];
  alignas(1024) uint8_t out[2][2][kOutBytes];  // of each warpgroup
  int4 jobs[kGemmStages];                      // kind, tile, other of the job that starts with this stage
  uint64_t full[kGemmStages], empty[kGemmStages];
  int arrived;  // parts done before this one
};

// ---- flags between blocks
__device__ __forceinline__ void flag_release_add(int* flag, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ void flag_wait(const int* flag, int value) {
  int seen = 0;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  } while (seen < value);
  async_proxy_fence();  // what comes after reads through the copy engine
}

}  // namespace peftkern
