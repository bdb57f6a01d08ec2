// S = x A^T for few tokens as its kernels take it, and their launchers. Free of torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/float_type.h"
#include "lora_matmul/project_config.h"

namespace peftkern {

// x [M, K] and A [rank, K] row-major and contiguous on 16 bytes, K % 64 == 0.
struct LoraProject {
  const void *x, *A;
  int64_t M, K;
  int rank;
  FloatType type, A_type;  // of x and S, 16-bit; of A
  float* parts;            // [parts][M][padded]: what project.cu writes
  void* whole;             // [token_tiles * 16][padded] in `type`, zeros beyond M and rank; and
  void* S;                 // [M, rank] in `type`: what project_cluster.cu writes
};

// lora_matmul/project.cu: the parts of S. sm_80 and up.
cudaError_t launch_lora_project_parts(const LoraProject& problem, const ProjectConfig& config, int compute_capability,
                                      cudaStream_t stream);

// lora_matmul/project_cluster.cu: S itself. Hopper alone.
cudaError_t launch_lora_project_whole(const LoraProject& problem, const ProjectConfig& config, int compute_capability,
                                      cudaStream_t stream);

}  // namespace peftkern
