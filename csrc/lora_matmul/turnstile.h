// Counters in device memory that the blocks of one launch share. Free of torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace peftkern {

// lora_matmul/turnstile.cu: kTurnstileWords for the next launch on a stream of the current device: of the stream, or,
// where that is being captured, of this launch alone, since a graph runs on any stream. One instance of a graph never
// runs beside itself; two instances of one capture must not either. Null where none are left.
cudaError_t turnstile_for(cudaStream_t stream, int device, uint32_t** turnstile);

}  // namespace peftkern
