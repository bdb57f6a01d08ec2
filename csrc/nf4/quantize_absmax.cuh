// nf4_quantize_absmax: the scales minus their mean as 8-bit codes, nearest entry of a code book of 256, in nested
// blocks: 1/64 of the work of nf4_quantize. A warp takes a nested block; the code is found by binary search over the
// 255 midpoints laid out as a complete tree, level by level, so that the first five levels are free of bank conflicts.
#pragma once

#include <cstdint>

#include "nf4/convert_config.h"
#include "nf4/quantize.cuh"

namespace peftkern {

inline constexpr int kTreeDepth = 8;

// The number of midpoints below v: every one for NaN, as torch.bucketize counts.
__device__ __forceinline__ uint32_t search_tree(const float (&tree)[1 << kTreeDepth], float v) {
  uint32_t node = 1;
#pragma unroll
  for (int level = 0; level < kTreeDepth; ++level) node = 2 * node + !(tree[node] >= v);
  return node - (1 << kTreeDepth);
}

template <int kStep>
__device__ __forceinline__ void encode_scales(const float (&tree)[1 << kTreeDepth], const float (&shifted)[kStep],
                                              float scale, bool tail, uint32_t (&codes)[kStep]) {
  const float safe = scale < 1e-38f ? 1e-38f : scale;
  const float reciprocal = __frcp_rn(safe);
#pragma unroll
  for (int i = 0; i < kStep; ++i) {
    float v = tail ? __fdiv_rn(shifted[i], safe) : __fmul_rn(shifted[i], reciprocal);
    v = v < -1.0f ? -1.0f : v;
    v = v > 1.0f ? 1.0f : v;
    codes[i] = search_tree(tree, v);
  }
}

__device__ __forceinline__ float warp_max_or_nan(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v = max_or_nan(v, __shfl_xor_sync(0xffffffffu, v, step));
  return v;
}

static __global__ void __launch_bounds__(kQuantizeAbsmaxThreads)
    nf4_quantize_absmax_kernel(const float* __restrict__ absmax, const float* __restrict__ offset,
                               const float* __restrict__ code, uint8_t* __restrict__ codes,
                               float* __restrict__ nested_absmax, int64_t numel, int64_t blocksize, bool aligned) {
  constexpr int kStep = 8;  // scales per lane, kept in registers
  __shared__ float tree[1 << kTreeDepth];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float shift = __ldg(offset);
  for (int node = threadIdx.x; node < 1 << kTreeDepth; node += kQuantizeAbsmaxThreads) {
    if (node == 0) continue;
    const int level = 31 - __clz(node), position = node - (1 << level);
    const int i = ((2 * position + 1) << (kTreeDepth - 1 - level)) - 1;
    tree[node] = __fmul_rn(__fadd_rn(code[i], code[i + 1]), 0.5f);
  }
  __syncthreads();

  constexpr int kWarps = kQuantizeAbsmaxThreads / 32;
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
  for (int64_t block = static_cast<int64_t>(blockIdx.x) * kWarps + warp; block < blocks;
       block += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t begin = block * blocksize;
    const int64_t count = min(blocksize, numel - begin);
    const bool tail = count < blocksize;
    float scale = 0.0f;
    if (aligned && blocksize == 32 * kStep && !tail) {
      const auto* source = reinterpret_cast<const float4*>(absmax + begin) + lane * (kStep / 4);
      float shifted[kStep];
      uint32_t found[kStep];
#pragma unroll
      for (int part = 0; part < kStep / 4; ++part) reinterpret_cast<float4*>(shifted)[part] = __ldg(source + part);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        shifted[i] = __fsub_rn(shifted[i], shift);
        scale = max_or_nan(scale, fabsf(shifted[i]));
      }
      scale = warp_max_or_nan(scale);
      encode_scales(tree, shifted, scale, false, found);
      uint2 bytes{0, 0};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bytes.x |= found[i] << (8 * i);
        bytes.y |= found[i + 4] << (8 * i);
      }
      reinterpret_cast<uint2*>(codes + begin)[lane] = bytes;
    } else {
      for (int64_t i = lane; i < count; i += 32) {
        scale = max_or_nan(scale, fabsf(__fsub_rn(absmax[begin + i], shift)));
      }
      scale = warp_max_or_nan(scale);
      for (int64_t i = lane; i < count; i += 32) {
        const float shifted[1] = {__fsub_rn(absmax[begin + i], shift)};
        uint32_t found[1];
        encode_scales(tree, shifted, scale, tail, found);
        codes[begin + i] = static_cast<uint8_t>(found[0]);
      }
    }
    if (lane == 0) nested_absmax[block] = (tail && scale < 1e-38f) ? 1e-38f : scale;
  }
}

}  // namespace peftkern
