// What each gemm_r*.cu and gemm_group_r*.cu compiles for its rank.
#pragma once

#include "gemm/gemm_launch.cuh"
#include "gemm/gemm_ranks.h"

namespace peftkern {

template <typename T, int kR, int kLayers, bool kDropout>
struct GemmLauncher {
  static cudaError_t run(const LoraForward& p, const GemmDevice& device, cudaStream_t stream) {
    return launch_forward<T, kR, kDropout, kLayers>(p, device.multiprocessors, device.index, stream);
  }
  static cudaError_t run(const LoraBackward& p, const GemmDevice& device, cudaStream_t stream) {
    return launch_backward<T, kR, kDropout, kLayers>(p, device.multiprocessors, device.index, stream);
  }
};

template <int kR, int kLayers, typename Problem>
cudaError_t lora_launch(const Problem& p, const GemmDevice& device, cudaStream_t stream) {
  const bool half = p.type == FloatType::kFloat16;
  if constexpr (kLayers == 1) {
    if (lora_dropout(p)) {
      return half ? GemmLauncher<__half, kR, 1, true>::run(p, device, stream)
                  : GemmLauncher<__nv_bfloat16, kR, 1, true>::run(p, device, stream);
    }
  }
  return half ? GemmLauncher<__half, kR, kLayers, false>::run(p, device, stream)
              : GemmLauncher<__nv_bfloat16, kR, kLayers, false>::run(p, device, stream);
}

}  // namespace peftkern
