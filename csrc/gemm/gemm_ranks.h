// lora_gemm's launchers, compiled by rank: gemm_r*.cu holds each, gemm.cu chooses. Free of torch.
#pragma once

#include "gemm/gemm.h"

namespace peftkern {

struct GemmDevice {
  int index, multiprocessors;
};

// For ranks up to kR: 16, 32, 64, 128 or 256.
template <int kR>
cudaError_t lora_forward(const LoraForward& problem, const GemmDevice& device, cudaStream_t stream);
template <int kR>
cudaError_t lora_backward(const LoraBackward& problem, const GemmDevice& device, cudaStream_t stream);

// For what lora_gemm_covers.
cudaError_t launch_lora_forward(const LoraForward& problem, const GemmDevice& device, cudaStream_t stream);
cudaError_t launch_lora_backward(const LoraBackward& problem, const GemmDevice& device, cudaStream_t stream);

}  // namespace peftkern
