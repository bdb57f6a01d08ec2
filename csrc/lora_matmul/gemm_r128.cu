// lora_gemm for ranks up to 128.
#include "lora_matmul/gemm_rank.cuh"

namespace peftkern {

template cudaError_t lora_forward<128>(const LoraForward&, const GemmDevice&, cudaStream_t);
template cudaError_t lora_backward<128>(const LoraBackward&, const GemmDevice&, cudaStream_t);

}  // namespace peftkern
