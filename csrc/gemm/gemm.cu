// Chooses lora_gemm's rank: the smallest compiled one that holds the problem's.
#include "common/tensor_map.h"
#include "gemm/gemm_ranks.h"

namespace peftkern {

cudaError_t launch_lora_forward(const LoraForward& problem, const GemmDevice& device, cudaStream_t stream) {
  const cudaError_t error = prepare_thread(device.index);
  if (error != cudaSuccess) return error;
  if (problem.rank <= 16) return lora_forward<16>(problem, device, stream);
  if (problem.rank <= 32) return lora_forward<32>(problem, device, stream);
  if (problem.rank <= 64) return lora_forward<64>(problem, device, stream);
  if (problem.rank <= 128) return lora_forward<128>(problem, device, stream);
  return lora_forward<256>(problem, device, stream);
}

cudaError_t launch_lora_backward(const LoraBackward& problem, const GemmDevice& device, cudaStream_t stream) {
  const cudaError_t error = prepare_thread(device.index);
  if (error != cudaSuccess) return error;
  if (problem.rank <= 16) return lora_backward<16>(problem, device, stream);
  if (problem.rank <= 32) return lora_backward<32>(problem, device, stream);
  if (problem.rank <= 64) return lora_backward<64>(problem, device, stream);
  if (problem.rank <= 128) return lora_backward<128>(problem, device, stream);
  return lora_backward<256>(problem, device, stream);
}

}  // namespace peftkern
