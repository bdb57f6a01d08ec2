// S = x A^T for few tokens, in parts that the matmul adds up.
#include "lora_matmul/project_launch.cuh"

namespace peftkern {

cudaError_t launch_lora_project_parts(const LoraProject& problem, const ProjectConfig& config, int compute_capability,
                                      cudaStream_t stream) {
  return launch_lora_project<false>(problem, config, compute_capability, stream);
}

}  // namespace peftkern
