// How a layer over an NF4 weight comes to its dense weight.
#pragma once

#include "common/cuda.h"
#include "gemm/gemm.h"
#include "lora_matmul/covers.h"
#include "nf4/convert.h"
#include "nf4/device_weight.h"

namespace peftkern {

// The layer's launch decodes the weight into `weight`, or this launches what does. The layer must be the problem's only
// one.
inline void decode_weight(const NF4Pointers& packed, const Tensor& weight, LoraLayer& layer, cudaStream_t stream) {
  layer.weight = weight.const_data_ptr();
  if (lora_gemm_decodes(weight.size(0), weight.size(1), is_aligned(packed.packed, 4))) {
    layer.packed = device_weight(packed);
  } else {
    nf4_dequantize(packed, weight, stream);
  }
}

}  // namespace peftkern
