// Tensor maps of 16-bit matrices.
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

#include "common/tensor_map.h"

namespace peftkern {

// Tensor maps of T's matrices, under the swizzle that is as wide as a box's rows. Keeps the first error.
template <typename T>
class MatrixMapper {
 public:
  // `stride` elements from row to row; 0: contiguous.
  void strided(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int64_t stride, int box_columns,
               int box_rows) {
    const auto type =
        std::is_same<T, __half>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const auto swizzle = box_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                         : box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                             : CU_TENSOR_MAP_SWIZZLE_32B;
    const cudaError_t error =
        make_tensor_map(map, {data, rows, columns, type, 2, stride}, box_columns, box_rows, swizzle);
    if (error_ == cudaSuccess) error_ = error;
  }
  void operator()(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int box_columns, int box_rows) {
    strided(map, data, rows, columns, columns, box_columns, box_rows);
  }
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_ = cudaSuccess;
};

}  // namespace peftkern
