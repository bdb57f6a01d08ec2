// Launches of the small-M NF4 matmul: config -> launch.
#include "nf4/small_m_launch.cuh"

namespace peftkern {
namespace {

template <typename T, bool kNested, class Arguments>
cudaError_t launch(const NF4Matmul& problem, const NF4LowRank* low_rank, const SmallMConfig& config,
                   const SmallMDevice& device, cudaStream_t stream) {
#define PEFTKERN_LAUNCH(S)                                                                                          \
  launch_small_m_kernel<T, kNested, Arguments, S.token_tiles, S.quads, S.warps, S.warp_rows, S.stages, S.min_ctas>( \
      problem, low_rank, config, device, stream)
  if (config.shape == kSmallM8) return PEFTKERN_LAUNCH(kSmallM8);
  if (config.shape == kSmallM16) return PEFTKERN_LAUNCH(kSmallM16);
  if (config.shape == kSmallM32) return PEFTKERN_LAUNCH(kSmallM32);
  return PEFTKERN_LAUNCH(kSmallM32Compact);
#undef PEFTKERN_LAUNCH
}

template <typename T>
cudaError_t launch(const NF4Matmul& problem, const NF4LowRank* low_rank, const SmallMConfig& config,
                   const SmallMDevice& device, cudaStream_t stream) {
  const bool nested = problem.weight.absmax_codes != nullptr;
  if (low_rank != nullptr) {
    return nested ? launch<T, true, SmallMLowRankArguments>(problem, low_rank, config, device, stream)
                  : launch<T, false, SmallMLowRankArguments>(problem, low_rank, config, device, stream);
  }
  return nested ? launch<T, true, SmallMArguments>(problem, nullptr, config, device, stream)
                : launch<T, false, SmallMArguments>(problem, nullptr, config, device, stream);
}

}  // namespace

cudaError_t launch_nf4_small_m(const NF4Matmul& problem, const NF4LowRank* low_rank, int multiprocessors,
                               cudaStream_t stream) {
  if (problem.M == 0 || problem.N == 0) return cudaSuccess;
  if (problem.M > kSmallMMaxTokens || problem.K == 0 || problem.K % 64 != 0 || problem.weight.log2_blocksize < 6 ||
      problem.dtype == ActivationDtype::kFloat32) {
    return cudaErrorInvalidValue;
  }
  SmallMDevice device;
  if (const cudaError_t error = small_m_device(device); error != cudaSuccess) return error;
  const SmallMConfig config = nf4_small_m_config(problem.M, problem.N, problem.K, multiprocessors, device.smem_limit);
  if (config.smem > device.smem_limit) return cudaErrorInvalidValue;
  return problem.dtype == ActivationDtype::kBFloat16 ? launch<__nv_bfloat16>(problem, low_rank, config, device, stream)
                                                     : launch<__half>(problem, low_rank, config, device, stream);
}

}  // namespace peftkern
