// lora_gemm for ranks up to 256.
#include "gemm/gemm_rank.cuh"

namespace peftkern {

template cudaError_t lora_launch<256, 1>(const LoraForward&, const GemmDevice&, cudaStream_t);
template cudaError_t lora_launch<256, 1>(const LoraBackward&, const GemmDevice&, cudaStream_t);

}  // namespace peftkern
