// lora_gemm of several layers on one x, for ranks up to 128 together.
#include "gemm/gemm_rank.cuh"

namespace peftkern {

template cudaError_t lora_launch<128, kGemmMaxLayers>(const LoraForward&, const GemmDevice&, cudaStream_t);
template cudaError_t lora_launch<128, kGemmMaxLayers>(const LoraBackward&, const GemmDevice&, cudaStream_t);

}  // namespace peftkern
