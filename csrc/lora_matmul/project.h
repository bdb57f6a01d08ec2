// S = x A^T for few tokens as its kernel takes it, and the launcher. Free of torch.
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
  void* whole;             // [token_tiles * 16][padded] in `type`, zeros beyond M and rank
  void* S;                 // [M, rank] in `type`
};

// lora_matmul/project.cu. Hopper alone.
cudaError_t launch_lora_project(const LoraProject& problem, const ProjectConfig& config, cudaStream_t stream);

}  // namespace peftkern
