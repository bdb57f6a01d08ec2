// The NF4 dequantize kernel for other ops of this library.
#pragma once

#include "common/stable.h"
#include "nf4/device_weight.h"

namespace peftkern {

// out (contiguous, any float dtype) gets the first out.numel() weights. Launches on `stream`, the live stream of the
// current device.
void nf4_dequantize(const NF4Pointers& w, const Tensor& out, cudaStream_t stream);

}  // namespace peftkern
