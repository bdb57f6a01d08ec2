// S = x A^T for few tokens, added up by a cluster.
#include "lora_matmul/project_launch.cuh"

namespace peftkern {

cudaError_t launch_lora_project_whole(const LoraProject& problem, const ProjectConfig& config, int compute_capability,
                                      cudaStream_t stream) {
  if (config.parts != kProjectMaxParts) return cudaErrorInvalidValue;
  return launch_lora_project<true>(problem, config, compute_capability, stream);
}

}  // namespace peftkern
