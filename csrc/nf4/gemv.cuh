// nf4_gemv: y[M, N] = x[M, K] @ dequant(weight[N, K]).T + bias without tensor cores, for whatever small_m does not
// take: rows that end inside a block or a byte, blocks of 32, fp32 activations. Weights get the values dequantize gives
// them (code * scale rounded in fp32, then to x's dtype); products and sums are fp32.
//
// A warp owns one row of the weight and up to kTokens tokens, and walks the row in steps of 32 words of 8 weights: a
// lane decodes its word once for all tokens, with one scale (a word of 8 never straddles blocks of 32 or more). Words
// follow the flattened weight, so they load whole whatever K is, byte by byte only where the weight's address is not
// aligned; weights of a word that belong to neighbour rows count as zero. Lanes' sums meet in a fixed order of
// shuffles.
#pragma once

#include <cstdint>

#include "common/nf4_code.h"
#include "nf4/decode.cuh"

namespace peftkern {

inline constexpr int kGemvWarps = 8;
inline constexpr int kGemvTokens = 8;

struct NF4GemvArguments {
  const void* x;
  NF4DeviceWeight weight;
  const void* bias;
  void* y;
  int64_t M, N, K;
  bool words;  // the packed bytes are aligned on 4
};

// kVector: K % 8 == 0 and x aligned on 16 bytes, so that words begin with the row and x loads whole.
template <typename T, bool kNested, int kTokens, bool kVector>
__global__ void __launch_bounds__(kGemvWarps * 32) nf4_gemv_kernel(NF4GemvArguments a) {
  __shared__ float codes[16];
  if (threadIdx.x < 16) codes[threadIdx.x] = kNF4CodeDevice[threadIdx.x];
  __syncthreads();

  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kGemvWarps + threadIdx.x / 32;
  if (row >= a.N) return;
  const int64_t token0 = static_cast<int64_t>(blockIdx.y) * kTokens;
  const int64_t begin = row * a.K, end = begin + a.K, bytes = (a.N * a.K + 1) / 2;
  const float offset = kNested ? __ldg(a.weight.nested_offset) : 0.0f;
  const T* const x = static_cast<const T*>(a.x);

  float sum[kTokens] = {};
  for (int64_t first = begin / 8 * 8 + lane * 8; first < end; first += 32 * 8) {
    uint32_t word = 0;
    if (a.words && first / 2 + 4 <= bytes) {
      word = __ldg(reinterpret_cast<const uint32_t*>(a.weight.packed + first / 2));
    } else {
      for (int64_t i = first / 2; i < bytes && i < first / 2 + 4; ++i) {
        word |= static_cast<uint32_t>(a.weight.packed[i]) << (8 * (i - first / 2));
      }
    }
    const float scale = block_scale<kNested>(a.weight, first >> a.weight.log2_blocksize, offset);
    float value[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t nibble = word >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15;
      value[i] = to_float(round_to<T>(__fmul_rn(codes[nibble], scale)));
    }
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      if (token0 + m >= a.M) break;
      const int64_t k = first - begin;
      const T* const from = x + (token0 + m) * a.K + k;
      if constexpr (kVector) {
        alignas(16) T values[8];
#pragma unroll
        for (int part = 0; part < static_cast<int>(sizeof values / 16); ++part) {
          reinterpret_cast<uint4*>(values)[part] = __ldg(reinterpret_cast<const uint4*>(from) + part);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[m] = fmaf(value[i], to_float(values[i]), sum[m]);
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (k + i >= 0 && k + i < a.K) sum[m] = fmaf(value[i], to_float(from[i]), sum[m]);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kTokens; ++m) {
#pragma unroll
    for (int stride = 16; stride > 0; stride /= 2) sum[m] += __shfl_xor_sync(0xffffffffu, sum[m], stride);
    if (lane == 0 && token0 + m < a.M) {
      const float bias = a.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(a.bias)[row]);
      static_cast<T*>(a.y)[(token0 + m) * a.N + row] = round_to<T>(sum[m] + bias);
    }
  }
}

}  // namespace peftkern
