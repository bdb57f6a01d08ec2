// Chooses lora_gemm's rank: the smallest compiled one that holds the problem's columns.
#include "common/tensor_map.h"
#include "gemm/gemm_ranks.h"

namespace peftkern {
namespace {

template <typename Problem>
cudaError_t choose(const Problem& problem, const GemmDevice& device, cudaStream_t stream) {
  if (problem.threshold > kLoraMaxThreshold) return cudaErrorInvalidValue;
  const cudaError_t error = prepare_thread(device.index);
  if (error != cudaSuccess) return error;
  const bool grouped = lora_grouped(problem);
  const int rank = lora_kernel_rank(problem.columns, grouped);
  if (grouped) {
    if (lora_dropout(problem)) return cudaErrorInvalidValue;
    return rank == 64 ? lora_launch<64, kGemmMaxLayers>(problem, device, stream)
                      : lora_launch<128, kGemmMaxLayers>(problem, device, stream);
  }
  switch (rank) {
    case 16:
      return lora_launch<16, 1>(problem, device, stream);
    case 32:
      return lora_launch<32, 1>(problem, device, stream);
    case 64:
      return lora_launch<64, 1>(problem, device, stream);
    case 128:
      return lora_launch<128, 1>(problem, device, stream);
    default:
      return lora_launch<256, 1>(problem, device, stream);
  }
}

}  // namespace

cudaError_t launch_lora(const LoraForward& problem, const GemmDevice& device, cudaStream_t stream) {
  return choose(problem, device, stream);
}

cudaError_t launch_lora(const LoraBackward& problem, const GemmDevice& device, cudaStream_t stream) {
  return choose(problem, device, stream);
}

}  // namespace peftkern
