// Launches of the 8-bit AdamW kernels.
#include "adamw8bit/launch.h"
#include "adamw8bit/look.cuh"
#include "adamw8bit/step.cuh"
#include "common/kernel_launch.h"

namespace peftkern {
namespace {

template <typename Format, typename Traits>
cudaError_t launch_step(const AdamWTensors& tensors, const AdamWCall& call, const AdamWConfig& config,
                        cudaStream_t stream) {
  const auto kernel = adamw8bit_step_kernel<Format, Traits>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.shared_bytes);
  if (error != cudaSuccess) return error;
  KernelLaunch launch{dim3(static_cast<unsigned>(config.ctas)), Traits::kThreads, config.shared_bytes};
  launch.early = config.early;
  return launch_kernel(kernel, launch, stream, tensors, call);
}

// Kernels with a scale are right for any gradients; those without save a product an element.
template <typename Format, bool kStochastic>
cudaError_t launch_format(const AdamWTensors& tensors, const AdamWCall& call, const AdamWConfig& config,
                          cudaStream_t stream) {
  if (!config.staged) return launch_step<Format, AdamWTraits<true, kStochastic, false>>(tensors, call, config, stream);
  if constexpr (!Format::kMixed) {
    if (call.grad_scale == nullptr && call.norm == nullptr && !call.maximize) {
      return launch_step<Format, AdamWTraits<false, kStochastic, true>>(tensors, call, config, stream);
    }
  }
  return launch_step<Format, AdamWTraits<true, kStochastic, true>>(tensors, call, config, stream);
}

}  // namespace

cudaError_t launch_code_tables(const float* first, const float* second, uint32_t* tables, cudaStream_t stream) {
  code_tables_kernel<<<1, kTableThreads, 0, stream>>>(first, second, tables);
  return cudaGetLastError();
}

cudaError_t launch_adamw_step(const AdamWTensors& tensors, const AdamWCall& call, const AdamWConfig& config, int type,
                              bool stochastic, cudaStream_t stream) {
  // Split halves hold blocks of a tile or more.
  if (type == kAdamWFloat && call.log2_blocksize < 8) type = -1;
  switch (type) {
    case kAdamWFloat:
      return launch_format<AdamWFloats, false>(tensors, call, config, stream);
    case kAdamWHalf:
      return launch_format<AdamWHalfs, false>(tensors, call, config, stream);
    case kAdamWBFloat16:
      return stochastic ? launch_format<AdamWBFloat16s, true>(tensors, call, config, stream)
                        : launch_format<AdamWBFloat16s, false>(tensors, call, config, stream);
    default:
      return stochastic ? launch_format<AdamWMixed, true>(tensors, call, config, stream)
                        : launch_format<AdamWMixed, false>(tensors, call, config, stream);
  }
}

cudaError_t launch_adamw_look(const AdamWGradients& gradients, int ctas, const float* grad_scale, uint32_t* flags,
                              float* piece_sums, cudaStream_t stream) {
  if (piece_sums != nullptr) {
    adamw8bit_look_kernel<true><<<ctas, kLookThreads, 0, stream>>>(gradients, grad_scale, flags, piece_sums);
  } else {
    adamw8bit_look_kernel<false><<<ctas, kLookThreads, 0, stream>>>(gradients, grad_scale, flags, nullptr);
  }
  return cudaGetLastError();
}

cudaError_t launch_adamw_verdict(const AdamWVerdict& verdict, bool early, cudaStream_t stream) {
  KernelLaunch launch{dim3(1), kNormSums};
  launch.early = early;
  return launch_kernel(adamw8bit_verdict_kernel, launch, stream, verdict);
}

}  // namespace peftkern
