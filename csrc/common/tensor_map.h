// Tensor maps of row-major matrices for the copy engine (sm_90).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace peftkern {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's entry point, looked up at run time: libcuda is absent where the library is loaded for its CPU side.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTiled>(entry)
                                                                        : nullptr;
  }();
  return function;
}

// The driver encodes tensor maps in the thread's context. A thread that has launched nothing yet, as autograd's may be,
// has none until it sets its device.
inline cudaError_t prepare_thread(int device) {
  thread_local int prepared = -1;
  if (prepared == device) return cudaSuccess;
  const cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess) prepared = device;
  return error;
}

// Row-major, its rows `stride` elements apart; 0: contiguous.
struct TensorMatrix {
  const void* data;
  int64_t rows, row_elements;
  CUtensorMapDataType type;
  int element_size;
  int64_t stride = 0;
};

// Copies of boxes of box_inner columns x box_outer rows; what lies beyond the matrix reads as 0.
inline cudaError_t make_tensor_map(CUtensorMap* map, const TensorMatrix& m, int box_inner, int box_outer,
                                   CUtensorMapSwizzle swizzle) {
  const EncodeTiled encode = encode_tiled();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(m.row_elements), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t stride = static_cast<cuuint64_t>(m.stride == 0 ? m.row_elements : m.stride);
  const cuuint64_t strides[1] = {stride * m.element_size};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_inner), static_cast<cuuint32_t>(box_outer)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(map, m.type, 2, const_cast<void*>(m.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace peftkern
