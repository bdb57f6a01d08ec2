// Launches of the small-M NF4 matmul that makes S itself, by clusters: config -> launch. Hopper alone.
#include "nf4/small_m_launch.cuh"

namespace peftkern {
namespace {

template <typename T, bool kNested>
cudaError_t launch(const NF4Matmul& problem, const NF4LowRank& low_rank, const SmallMConfig& config,
                   const SmallMDevice& device, cudaStream_t stream) {
#define PEFTKERN_LAUNCH(S)                                                                                       \
  launch_small_m_kernel<T, kNested, SmallMLoraArguments, S.token_tiles, S.quads, S.warps, S.warp_rows, S.stages, \
                        S.min_ctas>(problem, &low_rank, config, device, stream)
  return config.shape == kSmallM8 ? PEFTKERN_LAUNCH(kSmallM8) : PEFTKERN_LAUNCH(kSmallM16);
#undef PEFTKERN_LAUNCH
}

template <typename T>
cudaError_t launch(const NF4Matmul& problem, const NF4LowRank& low_rank, const SmallMConfig& config,
                   const SmallMDevice& device, cudaStream_t stream) {
  return problem.weight.absmax_codes != nullptr ? launch<T, true>(problem, low_rank, config, device, stream)
                                                : launch<T, false>(problem, low_rank, config, device, stream);
}

}  // namespace

cudaError_t launch_nf4_small_m_lora(const NF4Matmul& problem, const NF4LowRank& low_rank, int cluster,
                                    int multiprocessors, cudaStream_t stream) {
  SmallMDevice device;
  if (const cudaError_t error = small_m_device(device); error != cudaSuccess) return error;
  const SmallMConfig config = nf4_small_m_config(problem.M, problem.N, problem.K, multiprocessors, device.smem_limit,
                                                 cluster, 4 * problem.M * low_rank.padded);
  if (cluster <= 0 || low_rank.padded > kSmallMLoraMaxRank || !low_rank.fours || config.smem > device.smem_limit ||
      problem.K % 64 != 0 || !(config.shape == kSmallM8 || config.shape == kSmallM16)) {
    return cudaErrorInvalidValue;
  }
  return problem.dtype == ActivationDtype::kBFloat16 ? launch<__nv_bfloat16>(problem, low_rank, config, device, stream)
                                                     : launch<__half>(problem, low_rank, config, device, stream);
}

}  // namespace peftkern
