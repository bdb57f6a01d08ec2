// Launches of the kernels in launch.cu, which holds no torch.
#pragma once

#include <cuda_runtime.h>

#include "adamw8bit/step_call.h"
#include "adamw8bit/step_config.h"

namespace peftkern {

inline constexpr int kMaxSteps = 64;  // counts of a verdict

// What there is to do between the look and the update, by one CTA: the flag, the norm, and the counts.
struct AdamWVerdict {
  const uint32_t* flags;  // [flag_count], of the look
  int64_t flag_count;
  const float* piece_sums;  // [piece_count], of the look
  int64_t piece_count;
  const float* known;       // or null; not zero: as if a flag were set. May be found_inf
  float* found_inf;         // set to 1 where a flag is set, else to 0
  float* norm;              // or null
  int64_t* skipped;         // or null: one more where found_inf is set
  float* steps[kMaxSteps];  // one more each where it is not
  int step_count;
};

// The tables of code_tables.h from two code books of 256 ascending values.
cudaError_t launch_code_tables(const float* first, const float* second, uint32_t* tables, cudaStream_t stream);

// `type`: AdamWType of all parameters and gradients, -1 where they differ. `stochastic`: for bfloat16 parameters.
cudaError_t launch_adamw_step(const AdamWTensors& tensors, const AdamWCall& call, const AdamWConfig& config, int type,
                              bool stochastic, cudaStream_t stream);

// flags [ctas]; piece_sums [kAdamWPieces * chunks], or null where nobody asks for the norm.
cudaError_t launch_adamw_look(const AdamWGradients& gradients, int ctas, const float* grad_scale, uint32_t* flags,
                              float* piece_sums, cudaStream_t stream);

// early: beside the end of the kernel before it, from Hopper on.
cudaError_t launch_adamw_verdict(const AdamWVerdict& verdict, bool early, cudaStream_t stream);

}  // namespace peftkern
