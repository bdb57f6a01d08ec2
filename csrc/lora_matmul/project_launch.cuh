// Launches of lora_project: config -> launch.
#pragma once

#include "common/kernel_launch.h"
#include "lora_matmul/project.cuh"
#include "lora_matmul/project.h"

namespace peftkern {

template <typename T, typename From, bool kWhole>
cudaError_t launch_lora_project(const LoraProject& m, const ProjectConfig& config, int compute_capability,
                                cudaStream_t stream) {
  const ProjectArguments a{m.x, m.A, m.parts, m.whole, m.S, m.K, static_cast<int>(m.M), m.rank, config.padded};
  const bool hopper = compute_capability >= 90;
  KernelLaunch launch{dim3(static_cast<unsigned>(config.parts), static_cast<unsigned>(config.row_tiles),
                           static_cast<unsigned>(config.token_tiles)),
                      kProjectWarps * 32};
  launch.early = hopper;
  launch.cluster = hopper && kWhole ? config.parts : 0;
  return launch_kernel(lora_project_kernel<T, From, kWhole>, launch, stream, a);
}

template <typename T, bool kWhole>
cudaError_t launch_lora_project(const LoraProject& m, const ProjectConfig& config, int compute_capability,
                                cudaStream_t stream) {
  if (m.A_type == FloatType::kFloat32)
    return launch_lora_project<T, float, kWhole>(m, config, compute_capability, stream);
  return m.A_type == FloatType::kBFloat16
             ? launch_lora_project<T, __nv_bfloat16, kWhole>(m, config, compute_capability, stream)
             : launch_lora_project<T, __half, kWhole>(m, config, compute_capability, stream);
}

template <bool kWhole>
cudaError_t launch_lora_project(const LoraProject& m, const ProjectConfig& config, int compute_capability,
                                cudaStream_t stream) {
  if (m.type == FloatType::kFloat32 || m.K % kProjectColumns != 0 || m.M <= 0 || m.M > kProjectMaxTokens ||
      m.rank <= 0 || m.rank > kProjectMaxRank) {
    return cudaErrorInvalidValue;
  }
  return m.type == FloatType::kBFloat16
             ? launch_lora_project<__nv_bfloat16, kWhole>(m, config, compute_capability, stream)
             : launch_lora_project<__half, kWhole>(m, config, compute_capability, stream);
}

}  // namespace peftkern
