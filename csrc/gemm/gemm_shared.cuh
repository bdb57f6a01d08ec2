// What the roles of lora_gemm share: the problem, the shared memory, and how flags travel.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/float_type.h"
#include "common/hopper.cuh"
#include "gemm/gemm_config.h"

namespace peftkern {

struct GemmGradient {
  FloatType type;
  int features;
  float* sums;    // of each part: [part][feature tile][rank / 8][thread] of four sums
  int* arrivals;  // parts done of each feature tile
};

// One layer's share of a launch.
struct GemmLayer {
  // main tiles: in a forward pass the layer's own, in a backward pass its steps of those of all
  int outs, steps;
  const void* bias;  // [outs] or null
  // project and gradient jobs
  int project_steps;
  int rank, column;  // P's columns of this layer
  void *dA, *dB;     // [rank, features of A], [features of B, rank], or null
  float factor;      // of both
  GemmGradient b;
};

template <int kLayers>
struct GemmProblem {
  GemmSchedule schedule;
  int tokens, columns;  // of P
  int steps;            // of kGemmDepth along the main contraction
  int gradient_steps;   // of a part
  int project_bytes;    // of a project job's step
  int projects;         // done for a token tile before its main tiles end: arrivals at its flag
  int extension;        // main tiles end with P P2^T: products of depth 16 along the rank, 0: they do not
  bool add;             // outs are added to what is there
  void* product;        // P [tokens, columns], written by project jobs
  GemmLayer layers[kLayers];
  GemmGradient a;       // of all layers' A, one below the other
  const int64_t* seed;  // of dropout
  uint32_t threshold;   // twice: of a pair of numbers
  int* counters;        // jobs taken of each queue
  int* done;            // for each part, arrivals of all its token tiles
  int* flags;           // arrivals of warpgroups that have written rows of P, for each token tile
  int* summed;          // fused project jobs that have left their sums
  bool project_waits;   // P1 is of this stream's kernel before
};

template <int kLayers>
struct GemmMaps {
  // x: [0] in a forward pass, each layer's dy in a backward pass; y: each layer's, or [0]
  CUtensorMap x[kLayers], w[kLayers], y[kLayers];
  CUtensorMap p1[kLayers];                           // of project jobs
  CUtensorMap p[kLayers], p2[kLayers];               // of main tiles' extension: each layer's, or [0]
  CUtensorMap z_b[kLayers], q_b[kLayers], z_a, q_a;  // of gradient jobs: features and product
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
