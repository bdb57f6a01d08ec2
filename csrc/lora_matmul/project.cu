// Launches of lora_project: config -> launch.
#include "common/kernel_launch.h"
#include "lora_matmul/project.cuh"
#include "lora_matmul/project.h"

namespace peftkern {
namespace {

template <typename T, typename From>
cudaError_t launch(const LoraProject& m, const ProjectConfig& config, cudaStream_t stream) {
  const ProjectArguments a{m.x, m.A, m.whole, m.S, m.K, static_cast<int>(m.M), m.rank, config.padded};
  const KernelLaunch launch{
      dim3(kProjectParts, static_cast<unsigned>(config.row_tiles), static_cast<unsigned>(config.token_tiles)),
      kProjectWarps * 32, 0, kProjectParts};
  return launch_kernel(lora_project_kernel<T, From>, launch, stream, a);
}

template <typename T>
cudaError_t launch(const LoraProject& m, const ProjectConfig& config, cudaStream_t stream) {
  if (m.A_type == FloatType::kFloat32) return launch<T, float>(m, config, stream);
  return m.A_type == FloatType::kBFloat16 ? launch<T, __nv_bfloat16>(m, config, stream)
                                          : launch<T, __half>(m, config, stream);
}

}  // namespace

cudaError_t launch_lora_project(const LoraProject& m, const ProjectConfig& config, cudaStream_t stream) {
  if (m.type == FloatType::kFloat32 || m.K % kProjectColumns != 0 || m.M <= 0 || m.M > kProjectMaxTokens ||
      m.rank <= 0 || m.rank > kProjectMaxRank) {
    return cudaErrorInvalidValue;
  }
  return m.type == FloatType::kBFloat16 ? launch<__nv_bfloat16>(m, config, stream) : launch<__half>(m, config, stream);
}

}  // namespace peftkern
