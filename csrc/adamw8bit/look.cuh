// The look at the gradients before anything is written: the largest magnitude, and with clipping the sum of squares.
//
// The sum is defined, so that every backend has the same bits. Squares of unscaled gradients are added in float32
// within a piece of 2048 elements of one tensor: 256 sums of every 256th element in order, then neighbours in pairs,
// eight times. Sums of pieces are added in float64: 512 sums of every 512th piece of the list in order, then neighbours
// in pairs, nine times. A tensor has four pieces for every 8192 elements begun; those past its end are zero.
#pragma once

#include "adamw8bit/launch.h"
#include "adamw8bit/step_math.cuh"
#include "adamw8bit/tile.cuh"
#include "common/dependent_launch.cuh"

namespace peftkern {

inline constexpr int kNormSums = 512;
inline constexpr int kLookThreads = 512;

// The larger magnitude of packed pairs, NaN above all.
__device__ __forceinline__ uint32_t max_pair(uint32_t largest, uint32_t words, int type) {
  if (type == kAdamWHalf) {
    const __half2 v =
        __hmax2_nan(*reinterpret_cast<const __half2*>(&largest), __habs2(*reinterpret_cast<const __half2*>(&words)));
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  const __nv_bfloat162 v = __hmax2_nan(*reinterpret_cast<const __nv_bfloat162*>(&largest),
                                       __habs2(*reinterpret_cast<const __nv_bfloat162*>(&words)));
  return *reinterpret_cast<const uint32_t*>(&v);
}

__device__ __forceinline__ void add_square(float& sum, float gradient, float scale) {
  const float g = __fmul_rn(gradient, scale);
  sum = __fadd_rn(sum, __fmul_rn(g, g));
}

// Neighbours in pairs over 256 sums, which lie in the lanes as kSplit says; every lane gets the total.
template <bool kSplit>
__device__ __forceinline__ float fold(const float (&sum)[8]) {
  const float low = __fadd_rn(__fadd_rn(sum[0], sum[1]), __fadd_rn(sum[2], sum[3]));
  const float high = __fadd_rn(__fadd_rn(sum[4], sum[5]), __fadd_rn(sum[6], sum[7]));
  float a = kSplit ? low : __fadd_rn(low, high), b = high;
#pragma unroll
  for (int lane = 1; lane < 32; lane *= 2) {
    a = __fadd_rn(a, __shfl_xor_sync(kAllLanes, a, lane));
    if (kSplit) b = __fadd_rn(b, __shfl_xor_sync(kAllLanes, b, lane));
  }
  return kSplit ? __fadd_rn(a, b) : a;
}

// What a warp has seen: magnitudes of packed pairs and of floats.
struct Seen {
  uint32_t pair = 0;
  float single = 0.0f;
};

// A whole, aligned piece of 16-bit gradients.
template <bool kNorm>
__device__ __forceinline__ float look_pairs(const char* from, int type, float scale, int lane, Seen& seen) {
  float sum[8] = {};
#pragma unroll
  for (int tile = 0; tile < kAdamWPiece / kAdamWTile; ++tile) {
    const int at = (tile * 32 + lane) * 16;
    uint32_t words[4];
    put(words, 0, load16(from + at));
#pragma unroll
    for (int i = 0; i < 4; ++i) seen.pair = max_pair(seen.pair, words[i], type);
    if constexpr (kNorm) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        add_square(sum[i], type == kAdamWHalf ? element<kAdamWHalf>(words, i) : element<kAdamWBFloat16>(words, i),
                   scale);
      }
    }
  }
  return kNorm ? fold<false>(sum) : 0.0f;
}

template <bool kNorm>
__device__ __forceinline__ float look_floats(const char* from, float scale, int lane, Seen& seen) {
  float sum[8] = {};
#pragma unroll 4
  for (int tile = 0; tile < kAdamWPiece / kAdamWTile; ++tile) {
    const int at = (tile * 64 + lane) * 16;
    uint32_t words[8];
    put(words, 0, load16(from + at));
    put(words, 4, load16(from + at + 512));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float g = __uint_as_float(words[i]);
      seen.single = max_nan(seen.single, fabsf(g));
      if constexpr (kNorm) add_square(sum[i], g, scale);
    }
  }
  return kNorm ? fold<true>(sum) : 0.0f;
}

// Any piece, element by element.
template <bool kNorm>
__device__ __forceinline__ float look_ragged(const void* from, int n, int type, float scale, int lane, Seen& seen) {
  float sum[8] = {};
  for (int tile = 0; tile < n; tile += kAdamWTile) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int e = tile + lane * 8 + i;
      if (e >= n) continue;
      const float g = read_float(from, e, type);
      seen.single = max_nan(seen.single, fabsf(g));
      if constexpr (kNorm) add_square(sum[i], g, scale);
    }
  }
  return kNorm ? fold<false>(sum) : 0.0f;
}

// The bits of the largest magnitude that a warp has seen, NaN above infinity.
__device__ __forceinline__ uint32_t largest_bits(const Seen& seen, int pair_type) {
  float low, high;
  if (pair_type == kAdamWHalf) {
    const __half2 v = *reinterpret_cast<const __half2*>(&seen.pair);
    low = __low2float(v);
    high = __high2float(v);
  } else {
    low = __uint_as_float(seen.pair << 16);
    high = __uint_as_float(seen.pair & 0xffff0000u);
  }
  const float largest = max_nan(max_nan(low, high), seen.single);
  return __reduce_max_sync(kAllLanes, __float_as_uint(largest) & 0x7fffffffu);
}

// The sum of all pieces' sums, as above, in the first thread.
__device__ __forceinline__ double total_square(const float* sums, int64_t pieces, double* shared) {
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < pieces; i += kNormSums) total = __dadd_rn(total, sums[i]);
  for (int lane = 1; lane < 32; lane *= 2) total = __dadd_rn(total, __shfl_xor_sync(kAllLanes, total, lane));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = total;
  __syncthreads();
  double all = shared[threadIdx.x % 16];
  for (int i = 1; i < 16; i *= 2) all = __dadd_rn(all, __shfl_xor_sync(kAllLanes, all, i));
  return all;
}

// Looks at the gradients of a launch. flags[CTA]: whether its part holds one that cannot be used. piece_sums, where
// kNorm: every piece's sum of squares.
template <bool kNorm>
__global__ void __launch_bounds__(kLookThreads, kNorm ? kLookCtas / 2 : kLookCtas)
    adamw8bit_look_kernel(const __grid_constant__ AdamWGradients tensors, const float* grad_scale, uint32_t* flags,
                          float* piece_sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, piece = warp % kAdamWPieces;
  allow_next_kernel();
  const float inverse = grad_scale != nullptr ? __fdiv_rn(1.0f, *grad_scale) : 1.0f;
  const ChunkRange range = chunk_range(tensors.first_chunk[tensors.count]);
  Seen halfs, others;
  uint32_t chunk = range.begin + warp / kAdamWPieces;
  int t = chunk < range.end ? find_tensor(tensors.first_chunk, tensors.count, chunk) : 0;
  for (; chunk < range.end; chunk += kLookThreads / 32 / kAdamWPieces) {
    while (chunk >= tensors.first_chunk[t + 1]) ++t;
    const uint32_t offset = (chunk - tensors.first_chunk[t]) * kAdamWChunk + piece * kAdamWPiece;
    const int n = min(kAdamWPiece, static_cast<int>(tensors.numel[t] - offset));
    const int type = tensors.grad_type[t] & 3;
    const char* grad = type == kAdamWFloat ? address<4>(tensors.grad[t], offset) : address<2>(tensors.grad[t], offset);
    float sum = 0.0f;
    if (n < kAdamWPiece || tensors.grad_type[t] >= kAdamWUnaligned) {
      sum = look_ragged<kNorm>(grad, n, type, inverse, lane, others);
    } else if (type == kAdamWFloat) {
      sum = look_floats<kNorm>(grad, inverse, lane, others);
    } else if (type == kAdamWHalf) {
      sum = look_pairs<kNorm>(grad, kAdamWHalf, inverse, lane, halfs);
    } else {
      sum = look_pairs<kNorm>(grad, kAdamWBFloat16, inverse, lane, others);
    }
    if (kNorm && lane == 0) piece_sums[static_cast<size_t>(chunk) * kAdamWPieces + piece] = sum;
  }
  const uint32_t largest = max(largest_bits(halfs, kAdamWHalf), largest_bits(others, kAdamWBFloat16));
  const bool bad = !(__fmul_rn(__uint_as_float(largest), fabsf(inverse)) < kGradientLimit);
  const int found = __syncthreads_or(bad);
  if (threadIdx.x == 0) flags[blockIdx.x] = found;
}

// One CTA. See AdamWVerdict.
__global__ void __launch_bounds__(kNormSums) adamw8bit_verdict_kernel(const __grid_constant__ AdamWVerdict v) {
  __shared__ double shared[kNormSums / 32];
  allow_next_kernel();
  wait_for_earlier_kernels();
  bool any = threadIdx.x == 0 && v.known != nullptr && *v.known != 0.0f;
  for (int64_t i = threadIdx.x; i < v.flag_count; i += kNormSums) any = any || v.flags[i] != 0;
  if (v.norm != nullptr) {
    const float norm = static_cast<float>(sqrt(total_square(v.piece_sums, v.piece_count, shared)));
    if (threadIdx.x == 0) *v.norm = norm;
    any = any || !(norm < INFINITY);
  }
  const bool skip = __syncthreads_or(any);
  if (threadIdx.x == 0) {
    *v.found_inf = skip ? 1.0f : 0.0f;
    if (skip && v.skipped != nullptr) *v.skipped += 1;
  }
  if (!skip && threadIdx.x < v.step_count) *v.steps[threadIdx.x] += 1.0f;
}

}  // namespace peftkern
