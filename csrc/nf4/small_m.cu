// Launches of the small-M NF4 matmul: config -> launch.
#include "nf4/small_m_launch.cuh"

namespace peftkern {
namespace {

template <typename T, bool kNested>
cudaError_t launch(const NF4Matmul& problem, const SmallMConfig& config, const SmallMDevice& device,
                   cudaStream_t stream) {
#define PEFTKERN_LAUNCH(S)                                                                               \
  launch_small_m_kernel<T, kNested, S.token_tiles, S.quads, S.warps, S.warp_rows, S.stages, S.min_ctas>( \
      problem, config, device, stream)
  if (config.shape == kSmallM8) return PEFTKERN_LAUNCH(kSmallM8);
  if (config.shape == kSmallM16) return PEFTKERN_LAUNCH(kSmallM16);
  if (config.shape == kSmallM32) return PEFTKERN_LAUNCH(kSmallM32);
  return PEFTKERN_LAUNCH(kSmallM32Compact);
#undef PEFTKERN_LAUNCH
}

}  // namespace

cudaError_t launch_nf4_small_m(const NF4Matmul& problem, int multiprocessors, cudaStream_t stream) {
  if (problem.M == 0 || problem.N == 0) return cudaSuccess;
  if (problem.M > kSmallMMaxTokens || problem.K == 0 || problem.K % 64 != 0 || problem.weight.log2_blocksize < 6 ||
      problem.dtype == ActivationDtype::kFloat32) {
    return cudaErrorInvalidValue;
  }
  SmallMDevice device;
  if (const cudaError_t error = small_m_device(device); error != cudaSuccess) return error;
  const SmallMConfig config = nf4_small_m_config(problem.M, problem.N, problem.K, multiprocessors, device.smem_limit);
  const bool nested = problem.weight.absmax_codes != nullptr;
  if (problem.dtype == ActivationDtype::kBFloat16) {
    return nested ? launch<__nv_bfloat16, true>(problem, config, device, stream)
                  : launch<__nv_bfloat16, false>(problem, config, device, stream);
  }
  return nested ? launch<__half, true>(problem, config, device, stream)
                : launch<__half, false>(problem, config, device, stream);
}

}  // namespace peftkern
