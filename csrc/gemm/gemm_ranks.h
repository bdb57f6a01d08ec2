// lora_gemm's launchers, compiled by rank: gemm_r*.cu and gemm_group_r*.cu hold each, gemm.cu chooses. Free of torch.
#pragma once

#include "gemm/gemm.h"

namespace peftkern {

struct GemmDevice {
  int index, multiprocessors;
};

// For kR columns at most: 16, 32, 64, 128 or 256 of one layer, 64 or 128 of kGemmMaxLayers.
template <int kR, int kLayers, typename Problem>
cudaError_t lora_launch(const Problem& problem, const GemmDevice& device, cudaStream_t stream);

// For what lora_gemm_covers.
cudaError_t launch_lora(const LoraForward& problem, const GemmDevice& device, cudaStream_t stream);
cudaError_t launch_lora(const LoraBackward& problem, const GemmDevice& device, cudaStream_t stream);

}  // namespace peftkern
