// lora_prepare: the skinny operands of lora_gemm in its 16-bit type, transposed and multiplied where it needs that,
// and its counter and flags set to 0.
#pragma once

#include <cstdint>

#include "common/dependent_launch.cuh"
#include "common/numbers.cuh"
#include "gemm/gemm_shared.cuh"

namespace peftkern {

// to[i][j] = factor * from[i][j], or from[j][i], rows of `to` `stride` elements apart. from: [rows, columns].
// In fragment order to[i] has gemm_ceil(columns, 64) * 64 columns, those of from[i] where gemm_fragment_column says and
// 0 elsewhere.
struct PrepareMatrix {
  const void* from;
  FloatType type;
  void* to;
  int64_t rows, columns;
  float factor;
  int64_t stride = 0;  // 0: contiguous
  bool transposed = false, fragments = false;
  int end = 0;  // of its blocks of 32 x 32 elements
};

struct PrepareProblem {
  PrepareMatrix matrices[2 * kGemmMaxLayers]{};
  int count = 0, blocks = 0;
  int* zeros;
  int zero_count;

  PrepareProblem(int* memory, int64_t bytes) : zeros(memory), zero_count(static_cast<int>(bytes / 4)) {}

  void add(PrepareMatrix m, bool transposed = false, bool fragments = false) {
    m.transposed = transposed;
    m.fragments = fragments;
    const int64_t width = fragments ? gemm_ceil(m.columns, 64) * 64 : m.columns;
    if (m.stride == 0) m.stride = transposed ? m.rows : width;
    blocks += static_cast<int>(gemm_ceil(m.rows, 32) * gemm_ceil(width, 32));
    m.end = blocks;
    matrices[count++] = m;
  }
};

__device__ __forceinline__ float prepare_load(const void* from, FloatType type, int64_t at) {
  if (type == FloatType::kFloat32) return static_cast<const float*>(from)[at];
  if (type == FloatType::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(from)[at]);
  return to_float(static_cast<const __half*>(from)[at]);
}

template <typename T>
__global__ void __launch_bounds__(256) lora_prepare_kernel(const __grid_constant__ PrepareProblem p) {
  __shared__ float tile[32][33];
  // The GEMM starts with what this kernel does not touch. It may start when this kernel's blocks have: then everything
  // before them is done.
  wait_for_earlier_kernels();
  allow_next_kernel();
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < p.zero_count; i += 256) p.zeros[i] = 0;
  }
  int which = 0, first = 0;
  while (which < p.count && static_cast<int>(blockIdx.x) >= p.matrices[which].end) first = p.matrices[which++].end;
  if (which == p.count) return;
  const PrepareMatrix& m = p.matrices[which];
  const int block = blockIdx.x - first, rows = static_cast<int>(m.rows), columns = static_cast<int>(m.columns);
  const int width = m.fragments ? (columns + 63) / 64 * 64 : columns;
  const int across = (width + 31) / 32, row0 = block / across * 32, column0 = block % across * 32;
  const int x = threadIdx.x % 32, y = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + y + 8 * i, column = column0 + x;
    if (row < rows && column < width) {
      const bool inside = column < columns;
      const float v = inside ? m.factor * prepare_load(m.from, m.type, int64_t{row} * columns + column) : 0.0f;
      if (m.transposed) {
        tile[y + 8 * i][x] = v;
      } else {
        const int place = m.fragments ? gemm_fragment_column(column) : column;
        static_cast<T*>(m.to)[row * m.stride + place] = round_to<T>(v);
      }
    }
  }
  if (!m.transposed) return;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = row0 + x, column = column0 + y + 8 * i;
    if (row < rows && column < columns) {
      static_cast<T*>(m.to)[column * m.stride + row] = round_to<T>(tile[x][y + 8 * i]);
    }
  }
}

}  // namespace peftkern
