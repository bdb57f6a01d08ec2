// adamw8bit: one AdamW step of all tensors of a list in one launch.
#pragma once

#include <cooperative_groups.h>

#include "adamw8bit/look.cuh"
#include "adamw8bit/step_call.h"
#include "adamw8bit/step_math.cuh"
#include "adamw8bit/tile.cuh"
#include "common/philox.h"

namespace peftkern {

// How a CTA is made. kReplicated: a copy of the decode tables for every bank, in rows of 256 bytes (32 copies of the
// first moment's value, 32 of the second's), so that a byte of codes is moved to its address by one permutation and
// lookups never conflict.
template <int kWarpCount, int kCtaCount, bool kReplicatedTables>
struct AdamWShape {
  static constexpr int kWarps = kWarpCount, kThreads = kWarps * 32;
  static constexpr int kCtas = kCtaCount;
  static constexpr bool kReplicated = kReplicatedTables;
  static constexpr int kDecodeBytes = kReplicated ? 65536 : 0;
  static constexpr int kTableBytes = kDecodeBytes + kTableWords * 4;
};

__device__ __forceinline__ double number(const AdamWNumber& n) {
  switch (n.type) {
    case AdamWNumber::kFloat:
      return *static_cast<const float*>(n.pointer);
    case AdamWNumber::kDouble:
      return *static_cast<const double*>(n.pointer);
    case AdamWNumber::kLong:
      return static_cast<double>(*static_cast<const int64_t*>(n.pointer));
    default:
      return n.value;
  }
}

// A CTA's view of the call: shared by its threads.
struct AdamWShared {
  AdamWScalars scalars;
  uint32_t step;  // for the random numbers
  bool skip;
};

// Chunks [begin, end) of a CTA.
struct ChunkRange {
  uint32_t begin, end;
};

__device__ __forceinline__ ChunkRange chunk_range(const AdamWTensors& tensors) {
  const uint64_t chunks = tensors.first_chunk[tensors.count];
  return {static_cast<uint32_t>(chunks * blockIdx.x / gridDim.x),
          static_cast<uint32_t>(chunks * (blockIdx.x + 1) / gridDim.x)};
}

// The tensor that holds a chunk.
__device__ __forceinline__ int find_tensor(const AdamWTensors& tensors, uint32_t chunk) {
  int low = 0, high = tensors.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (tensors.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Looks at all gradients of the CTA's range. Returns the bits of the largest magnitude that the warp has seen.
template <typename Format, typename Shape, bool kNorm>
__device__ __forceinline__ uint32_t look(const AdamWTensors& tensors, const AdamWCall& call, const ChunkRange& range,
                                         char* kept, float scale) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint64_t passing = l2_evict_first(), staying = call.hints & 1 ? l2_evict_last() : l2_evict_normal();
  Seen halfs, others;
  uint32_t chunk = range.begin + warp / kAdamWPieces;
  const int piece = warp % kAdamWPieces;
  if (chunk < range.end) {
    int t = find_tensor(tensors, chunk);
    for (; chunk < range.end; chunk += Shape::kWarps / kAdamWPieces) {
      while (chunk >= tensors.first_chunk[t + 1]) ++t;
      const uint32_t offset = (chunk - tensors.first_chunk[t]) * kAdamWChunk + piece * kAdamWPiece;
      const int n = min(kAdamWPiece, static_cast<int>(tensors.numel[t] - offset));
      const int type = Format::kMixed ? tensors.grad_type[t] & 3 : Format::kType;
      const char* grad =
          type == kAdamWFloat ? address<4>(tensors.grad[t], offset) : address<2>(tensors.grad[t], offset);
      const uint64_t policy = range.end - chunk <= call.l2_chunks ? staying : passing;
      const bool whole = n == kAdamWPiece && tensors.grad_type[t] < kAdamWUnaligned;
      const uint32_t place = chunk - range.begin;
      char* keep = !Format::kMixed && place < call.kept_chunks
                       ? kept + (place * kAdamWPieces + piece) * (Format::kChunkBytes / kAdamWPieces)
                       : nullptr;
      float sum = 0.0f;
      if (!whole) {
        sum = look_ragged<kNorm>(grad, n, type, scale, lane, others);
      } else if (type == kAdamWFloat) {
        sum = look_floats<kNorm>(grad, keep, scale, lane, policy, others);
      } else if (type == kAdamWHalf) {
        sum = look_pairs<kNorm>(grad, keep, kAdamWHalf, scale, lane, policy, halfs);
      } else {
        sum = look_pairs<kNorm>(grad, keep, kAdamWBFloat16, scale, lane, policy, others);
      }
      if (kNorm && lane == 0) call.piece_sums[chunk * kAdamWPieces + piece] = sum;
    }
  }
  return max(largest_bits(halfs, kAdamWHalf), largest_bits(others, kAdamWBFloat16));
}

// The sum of all pieces' sums, as look.cuh defines it, in every thread.
template <typename Shape>
__device__ __forceinline__ double total_square(const float* sums, int64_t pieces, double* shared) {
  if (threadIdx.x < kNormSums) {
    double total = 0.0;
    for (int64_t i = threadIdx.x; i < pieces; i += kNormSums) total = __dadd_rn(total, __ldcg(sums + i));
    for (int lane = 1; lane < 32; lane *= 2) total = __dadd_rn(total, __shfl_xor_sync(kAllLanes, total, lane));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = total;
  }
  __syncthreads();
  double all = shared[threadIdx.x % 16];
  for (int i = 1; i < 16; i *= 2) all = __dadd_rn(all, __shfl_xor_sync(kAllLanes, all, i));
  return all;
}

// Largest magnitudes of a block: over the lanes that share it, and where it is longer than a tile over its warps.
template <int kWarps>
__device__ __forceinline__ void reduce_block(float& first, float& second, int log2_blocksize, float* exchange,
                                             int parity) {
  if (log2_blocksize >= 8) {
    first = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(first)));
    second = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(second)));
  } else {
    for (int lane = 1; lane < 1 << (log2_blocksize - 3); lane *= 2) {
      first = max_nan(first, __shfl_xor_sync(kAllLanes, first, lane));
      second = max_nan(second, __shfl_xor_sync(kAllLanes, second, lane));
    }
  }
  if (log2_blocksize <= 8) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = 1 << (log2_blocksize - 8);
  float* slots = exchange + parity * 2 * kWarps;
  if (lane == 0) {
    slots[warp] = first;
    slots[kWarps + warp] = second;
  }
  asm volatile("bar.sync %0, %1;" ::"r"(warp / warps), "r"(warps * 32) : "memory");
  const int other = (warp & -warps) + (lane & (warps - 1));
  first = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(slots[other])));
  second = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(slots[kWarps + other])));
}

// Decoded moments: codes are bytes of two words.
template <bool kReplicated>
__device__ __forceinline__ float decode(const char* tables, int offset, uint32_t word, int k, uint32_t lane_bytes) {
  if constexpr (kReplicated) {
    const uint32_t at = __byte_perm(word, lane_bytes, 0x5504 | k << 4);
    return *reinterpret_cast<const float*>(tables + at + (offset == kDecodeFirst ? 0 : 128));
  } else {
    return reinterpret_cast<const float*>(tables)[offset + (word >> 8 * k & 0xff)];
  }
}

// One tile: n elements of entry t from `offset` on, 0 where a block's other warps hold all of it. kept: where the
// chunk's gradients are in shared memory, or null.
template <typename Format, typename Shape, bool kStochastic>
__device__ __forceinline__ void step_tile(const AdamWTensors& tensors, const AdamWCall& call, const AdamWScalars& s,
                                          const char* decode_tables, const uint32_t* tables, bool crowded, int t,
                                          uint32_t offset, int n, const char* kept, uint32_t step, uint64_t load_policy,
                                          uint64_t store_policy, float* exchange, int parity) {
  constexpr int kWords = Format::kWords;
  const int lane = threadIdx.x % 32;
  const int param_type = Format::kMixed ? tensors.param_type[t] : Format::kType;
  const int grad_type = Format::kMixed ? tensors.grad_type[t] & 3 : Format::kType;
  const bool whole = n == kAdamWTile && tensors.grad_type[t] < kAdamWUnaligned;
  const uint32_t block = (offset + Format::position(lane, 0)) >> call.log2_blocksize;
  const bool has_block = Format::position(lane, 0) < n;
  uint32_t param[kWords], grad[kWords], m_codes[2], v_codes[2];
  float m_absmax = 0.0f, v_absmax = 0.0f;
  if (has_block) {
    m_absmax = *reinterpret_cast<const float*>(address<4>(tensors.m_absmax[t], block));
    v_absmax = *reinterpret_cast<const float*>(address<4>(tensors.v_absmax[t], block));
  }
  if (whole) {
    if (kept != nullptr) {
      load_values<Format, false>(grad, kept, offset % kAdamWChunk, n, true, grad_type, lane, load_policy);
    } else {
      load_values<Format, true>(grad, tensors.grad[t], offset, n, true, grad_type, lane, load_policy);
    }
    load_codes<Format>(m_codes, tensors.m_code[t], offset, n, true, lane, load_policy);
    load_codes<Format>(v_codes, tensors.v_code[t], offset, n, true, lane, load_policy);
    load_values<Format, true>(param, tensors.param[t], offset, n, true, param_type, lane, load_policy);
  } else {
    load_values<Format, true>(grad, tensors.grad[t], offset, n, false, grad_type, lane, load_policy);
    load_codes<Format>(m_codes, tensors.m_code[t], offset, n, false, lane, load_policy);
    load_codes<Format>(v_codes, tensors.v_code[t], offset, n, false, lane, load_policy);
    load_values<Format, true>(param, tensors.param[t], offset, n, false, param_type, lane, load_policy);
  }

  float m[8], v[8];
  const float m_scale = __fmul_rn(m_absmax, call.beta1_rounded), v_scale = __fmul_rn(v_absmax, call.beta2_rounded);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float g = __fmul_rn(element<Format::kType>(grad, i), s.gradient_scale);
    const float m_book = decode<Shape::kReplicated>(decode_tables, kDecodeFirst, m_codes[i >> 2], i & 3, lane * 4);
    const float v_book = decode<Shape::kReplicated>(decode_tables, kDecodeSecond, v_codes[i >> 2], i & 3, lane * 4);
    m[i] = __fadd_rn(__fmul_rn(m_book, m_scale), __fmul_rn(g, call.one_minus_beta1));
    v[i] = __fadd_rn(__fmul_rn(v_book, v_scale), __fmul_rn(__fmul_rn(g, g), call.one_minus_beta2));
  }
  if (!whole) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (Format::position(lane, i) >= n) m[i] = v[i] = 0.0f;
    }
  }
  float m_largest = 0.0f, v_largest = 0.0f, lowest = kSmall;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    m_largest = max_nan(m_largest, fabsf(m[i]));
    v_largest = max_nan(v_largest, v[i]);
    lowest = fminf(lowest, fminf(fabsf(m[i]), v[i]));
  }

  float p[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) p[i] = element<Format::kType>(param, i);
  bool in_range = m_largest < s.first_limit && v_largest < kLarge;
  if (lowest < kSmall) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      in_range = in_range && (fabsf(m[i]) >= kSmall || __float_as_uint(m[i]) == 0) && (v[i] >= kSmall || v[i] == 0.0f);
    }
  }
  if (in_range) {
    step_params<true>(p, m, v, s, call.eps);
  } else {
    step_params<false>(p, m, v, s, call.eps);
  }
  uint32_t random[4];
  if constexpr (kStochastic) {
    const PhiloxWords words =
        philox4x32({offset / 8 + lane, tensors.tensor[t] >> 24, tensors.tensor[t] & 0xffffff, step},
                   static_cast<uint32_t>(call.seed), static_cast<uint32_t>(call.seed >> 32));
    random[0] = words.w0;
    random[1] = words.w1;
    random[2] = words.w2;
    random[3] = words.w3;
  }
  store_params<Format, kStochastic>(p, random, tensors.param[t], offset, n, whole, param_type, lane, store_policy);

  reduce_block<Shape::kWarps>(m_largest, v_largest, call.log2_blocksize, exchange, parity);
  const float least = fminf(m_largest, v_largest), most = max_nan(m_largest, v_largest);
  if (!crowded && least >= kSmall && most < kLarge) {
    const float m_factor = __fmul_rn(reciprocal_short(m_largest), kEncodeScale);
    const float v_factor = __fmul_rn(reciprocal_short(v_largest), kEncodeScale);
    encode_first<true>(m, m_factor, tables, m_codes);
    encode_second<true>(v, v_factor, tables, v_codes);
    if (__fmul_rn(lowest, v_factor) == 0.0f) lift_second<true>(v, v_factor, tables, v_codes);
  } else {
    m_largest = m_largest > 0.0f ? fmaxf(m_largest, kAdamWMinAbsmax) : m_largest;
    v_largest = v_largest > 0.0f ? fmaxf(v_largest, kAdamWMinAbsmax) : v_largest;
    const float m_inverse = __frcp_rn(fmaxf(m_largest, kAdamWMinAbsmax));
    const float v_inverse = __frcp_rn(fmaxf(v_largest, kAdamWMinAbsmax));
    if (crowded) {
      encode_search(m, m_inverse, reinterpret_cast<const float*>(tables + kPointsFirst), m_codes);
      encode_search(v, v_inverse, reinterpret_cast<const float*>(tables + kPointsSecond), v_codes);
    } else {
      encode_first<false>(m, m_inverse, tables, m_codes);
      encode_second<false>(v, v_inverse, tables, v_codes);
      lift_second<false>(v, v_inverse, tables, v_codes);
    }
  }
  if (whole) {
    store_codes<Format>(m_codes, tensors.m_code[t], offset, n, true, lane, store_policy);
    store_codes<Format>(v_codes, tensors.v_code[t], offset, n, true, lane, store_policy);
  } else {
    store_codes<Format>(m_codes, tensors.m_code[t], offset, n, false, lane, store_policy);
    store_codes<Format>(v_codes, tensors.v_code[t], offset, n, false, lane, store_policy);
  }
  // The first lane of each block that starts in this tile.
  const uint32_t mask = (1u << call.log2_blocksize) - 1;
  if (has_block && ((offset + Format::position(lane, 0)) & mask) == 0) {
    *reinterpret_cast<float*>(address<4>(tensors.m_absmax[t], block)) = m_largest;
    *reinterpret_cast<float*>(address<4>(tensors.v_absmax[t], block)) = v_largest;
  }
}

// gradient_scale holds 1 / grad_scale; the norm, where gradients are clipped, comes later.
__device__ inline void prepare(const AdamWCall& call, AdamWShared& shared) {
  const double lr = number(call.lr), step = number(call.step) + (call.step_out != nullptr ? 1.0 : 0.0);
  const float inverse = call.grad_scale != nullptr ? __fdiv_rn(1.0f, *call.grad_scale) : 1.0f;
  AdamWScalars& s = shared.scalars;
  s.gradient_scale = call.maximize ? -inverse : inverse;
  s.decay = static_cast<float>(__dsub_rn(1.0, __dmul_rn(lr, call.weight_decay)));
  s.step_size = static_cast<float>(lr / (1.0 - pow(call.beta1, step)));
  s.inverse_bias2 = static_cast<float>(1.0 / sqrt(1.0 - pow(call.beta2, step)));
  // The short division needs a denominator from 2^-100 to 2^100 and a ratio that is finite.
  const bool usual = call.eps >= 0x1p-90f && call.eps <= 0x1p60f && s.inverse_bias2 <= 0x1p24f;
  s.first_limit = usual ? kLarge : 0.0f;
  shared.step = static_cast<uint32_t>(static_cast<int64_t>(step));
}

template <typename Format, typename Shape, bool kStochastic>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kCtas)
    adamw8bit_kernel(const __grid_constant__ AdamWTensors tensors, const __grid_constant__ AdamWCall call) {
  extern __shared__ __align__(16) char memory[];
  __shared__ AdamWShared shared;
  __shared__ float exchange[4 * Shape::kWarps];
  __shared__ double sums[kNormSums / 32];
  const uint32_t* tables = reinterpret_cast<const uint32_t*>(memory + Shape::kDecodeBytes);
  const char* decode_tables = Shape::kReplicated ? memory : memory + Shape::kDecodeBytes;
  char* kept = memory + Shape::kTableBytes;
  const ChunkRange range = chunk_range(tensors);
  if (call.update) {
    uint4* to = reinterpret_cast<uint4*>(memory + Shape::kDecodeBytes);
    for (int i = threadIdx.x; i < kTableWords / 4; i += Shape::kThreads) {
      to[i] = __ldg(reinterpret_cast<const uint4*>(call.code_tables) + i);
    }
    if constexpr (Shape::kReplicated) {
      for (int i = threadIdx.x; i < 4096; i += Shape::kThreads) {
        const uint32_t v = __ldg(call.code_tables + (i & 8 ? kDecodeSecond : kDecodeFirst) + i / 16);
        reinterpret_cast<uint4*>(memory)[i] = make_uint4(v, v, v, v);
      }
    }
  }
  if (threadIdx.x == Shape::kThreads - 1) prepare(call, shared);
  bool skip = call.found_inf != nullptr && *call.found_inf != 0.0f;
  if (call.look) {
    const float inverse = call.grad_scale != nullptr ? __fdiv_rn(1.0f, *call.grad_scale) : 1.0f;
    const bool sum = call.clip && call.norm == nullptr;
    const uint32_t largest = sum ? look<Format, Shape, true>(tensors, call, range, kept, inverse)
                                 : look<Format, Shape, false>(tensors, call, range, kept, inverse);
    const bool bad = !(__fmul_rn(__uint_as_float(largest), fabsf(inverse)) < kGradientLimit);
    const int found = __syncthreads_or(bad);
    if (threadIdx.x == 0) call.found[blockIdx.x] = found;
    if (call.update) cooperative_groups::this_grid().sync();
    bool any = false;
    for (int i = threadIdx.x; i < gridDim.x; i += Shape::kThreads) any = any || __ldcg(call.found + i) != 0;
    skip = __syncthreads_or(any) != 0 || skip;
  } else {
    __syncthreads();
  }
  if (!call.update) return;
  if (call.clip) {
    double norm = call.norm != nullptr ? *call.norm : 0.0;
    if (call.norm == nullptr) {
      norm = static_cast<float>(
          sqrt(total_square<Shape>(call.piece_sums, int64_t{tensors.first_chunk[tensors.count]} * kAdamWPieces, sums)));
    }
    if (!(norm < INFINITY)) skip = true;
    if (threadIdx.x == 0) {
      const float clip = static_cast<float>(fmin(1.0, call.max_norm / (norm + 1e-6)));
      shared.scalars.gradient_scale = __fmul_rn(shared.scalars.gradient_scale, clip);
      if (blockIdx.x == 0 && call.norm_out != nullptr) *call.norm_out = static_cast<float>(norm);
    }
    __syncthreads();
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    if (call.skipped != nullptr && skip) *call.skipped += 1;
    if (call.step_out != nullptr && !skip) *call.step_out += 1.0f;
  }
  if (skip || range.begin == range.end) return;

  const AdamWScalars s = shared.scalars;
  const uint32_t step = shared.step;
  const bool crowded = __ldg(call.code_tables + kTableFlags) != 0;
  const uint64_t load_policy = call.hints & 2 ? l2_evict_first() : l2_evict_normal();
  const uint64_t store_policy = call.hints & 4 ? l2_evict_first() : l2_evict_normal();
  const int warp = threadIdx.x / 32;
  const bool alone = call.log2_blocksize <= 8;
  int t = find_tensor(tensors, range.end - 1), parity = 0;
  // Backwards: what was looked at last is found in the L2 cache.
  for (uint32_t chunk = range.end; chunk-- > range.begin;) {
    while (chunk < tensors.first_chunk[t]) --t;
    const uint32_t order = chunk - range.begin;
#pragma unroll 1
    for (int round = 0; round < kAdamWChunk / kAdamWTile / Shape::kWarps; ++round) {
      const uint32_t in_chunk = (round * Shape::kWarps + warp) * kAdamWTile;
      const uint32_t offset = (chunk - tensors.first_chunk[t]) * kAdamWChunk + in_chunk;
      const int left = static_cast<int>(tensors.numel[t] - offset), n = max(0, min(kAdamWTile, left));
      if (alone && n == 0) continue;
      // Whole pieces were kept.
      const bool is_kept = !Format::kMixed && call.look && order < call.kept_chunks &&
                           left + static_cast<int>(in_chunk % kAdamWPiece) >= kAdamWPiece;
      const char* from = is_kept ? kept + order * Format::kChunkBytes : nullptr;
      step_tile<Format, Shape, kStochastic>(tensors, call, s, decode_tables, tables, crowded, t, offset, n, from, step,
                                            load_policy, store_policy, exchange, parity);
      parity ^= 1;
    }
  }
}

}  // namespace peftkern
