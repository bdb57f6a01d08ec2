// What each gemm_r*.cu compiles for its rank.
#pragma once

#include "gemm/gemm_launch.cuh"
#include "gemm/gemm_ranks.h"

namespace peftkern {

template <int kR>
cudaError_t lora_forward(const LoraForward& problem, const GemmDevice& device, cudaStream_t stream) {
  return problem.type == FloatType::kFloat16
             ? launch_forward<__half, kR>(problem, device.multiprocessors, device.index, stream)
             : launch_forward<__nv_bfloat16, kR>(problem, device.multiprocessors, device.index, stream);
}

template <int kR>
cudaError_t lora_backward(const LoraBackward& problem, const GemmDevice& device, cudaStream_t stream) {
  return problem.type == FloatType::kFloat16
             ? launch_backward<__half, kR>(problem, device.multiprocessors, device.index, stream)
             : launch_backward<__nv_bfloat16, kR>(problem, device.multiprocessors, device.index, stream);
}

}  // namespace peftkern
