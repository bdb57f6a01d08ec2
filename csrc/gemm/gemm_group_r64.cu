// lora_gemm of several layers on one x, for ranks up to 64 together.
#include "gemm/gemm_rank.cuh"

namespace peftkern {

template cudaError_t lora_launch<64, kGemmMaxLayers>(const LoraForward&, const GemmDevice&, cudaStream_t);
template cudaError_t lora_launch<64, kGemmMaxLayers>(const LoraBackward&, const GemmDevice&, cudaStream_t);

}  // namespace peftkern
