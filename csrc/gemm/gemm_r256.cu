// lora_gemm for ranks up to 256.
#include "gemm/gemm_rank.cuh"

namespace peftkern {

template cudaError_t lora_forward<256>(const LoraForward&, const GemmDevice&, cudaStream_t);
template cudaError_t lora_backward<256>(const LoraBackward&, const GemmDevice&, cudaStream_t);

}  // namespace peftkern
