// nf4_quantize: absmax[block] = max |w|, codes = nearest of the 16 NF4 values to w / absmax, two to a byte: one launch,
// one pass. Bytes per weight at block 64, bf16: 2 in + 0.5 codes + 1/16 scale = 2.5625; 8192x28672 takes 602 MB, floor
// 141 us at 4.28 TB/s.
//
// A unit is 16 bytes of weights in one lane. A CTA owns a tile that every blocksize divides and keeps it in registers
// between the reduction and the encode. Blocks inside a warp's row of units reduce by shuffle, larger ones through
// shared memory. The encode (encode_table.h) is a multiply, a multiply-add, a mask and one 8-byte lookup; the table is
// repeated for every pair of banks, so lookups never conflict.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "nf4/convert_config.h"
#include "nf4/encode_table.h"

namespace peftkern {

static __constant__ EncodeTable kEncodeTableDevice = make_encode_table();

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float v;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
  return v;
}

// A unit's weights as they were loaded.
template <typename T>
struct WeightUnit {
  static constexpr int kWeights = kDenseUnitBytes / sizeof(T);
  using Packed = std::conditional_t<kWeights == 8, uint32_t, uint16_t>;
  uint32_t words[4];

  __device__ __forceinline__ float value(int j) const {
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(words[j]);
    } else if constexpr (std::is_same_v<T, __half>) {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(words[j / 2] >> (16 * (j % 2)))));
    } else {
      return __uint_as_float(j % 2 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16);
    }
  }

  __device__ __forceinline__ void set(int j, T v) {
    if constexpr (std::is_same_v<T, float>) {
      words[j] = __float_as_uint(v);
    } else {
      words[j / 2] |= static_cast<uint32_t>(*reinterpret_cast<const unsigned short*>(&v)) << (16 * (j % 2));
    }
  }

  // The largest magnitude; NaN wins, as in torch.
  __device__ __forceinline__ float largest() const {
    if constexpr (std::is_same_v<T, float>) {
      return max_or_nan(max_or_nan(fabsf(value(0)), fabsf(value(1))), max_or_nan(fabsf(value(2)), fabsf(value(3))));
    } else {
      using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
      Pair pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t magnitudes = words[i] & 0x7fff7fffu;
        pairs[i] = *reinterpret_cast<const Pair*>(&magnitudes);
      }
      const Pair p = __hmax2_nan(__hmax2_nan(pairs[0], pairs[1]), __hmax2_nan(pairs[2], pairs[3]));
      return max_or_nan(static_cast<float>(p.x), static_cast<float>(p.y));
    }
  }
};

using EncodeCopies = EncodeEntry[kEncodeBins][16];  // [bin][pair of banks]

// The number of thresholds below `scaled`, in [-1, 1] or NaN.
// `column`: the lane's copy, as a byte offset.
__device__ __forceinline__ uint32_t encode(const EncodeCopies& table, uint32_t column, float scaled) {
  constexpr float shift = static_cast<float>(1 << (23 - kEncodeFractionBits)) + kEncodeShift;
  constexpr uint32_t mask = (kEncodeBins - 1) << kEncodeFractionBits;
  static_assert(sizeof table[0] == 1 << kEncodeFractionBits, "the fraction's bits are the offset within a bin's row");
  const uint32_t position = __float_as_uint(__fmaf_rn(scaled, kEncodeScale, shift));
  uint32_t at;  // (position & mask) | column, which the compiler would spread over two instructions
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(at) : "r"(position), "n"(mask), "r"(column));
  // The sign of threshold - scaled is exact, and that of NaN is positive.
  const uint2 bits = *reinterpret_cast<const uint2*>(reinterpret_cast<const char*>(table) + at);
  return bits.y + (__float_as_uint(__fsub_rn(__uint_as_float(bits.x), scaled)) >> 31);
}

// kLanes: lanes per block, a power of two up to 32, or 0 where a block is several warps' units.
template <typename T, int kLanes>
struct Quantizer {
  using Unit = WeightUnit<T>;
  using Packed = typename Unit::Packed;
  static constexpr int kWeights = Unit::kWeights;
  static constexpr int kRow = 32 * kWeights;  // weights of a warp's unit
  static constexpr int kRows = kQuantizeTile / kRow;
  static constexpr int kUnits = kQuantizeTile / (kQuantizeThreads * kWeights);
  static_assert(kUnits * kQuantizeThreads * kWeights == kQuantizeTile);

  const T* weight;
  uint8_t* packed;
  float* absmax;
  int64_t numel;
  int log2_blocksize;
  int warp, lane;
  uint32_t column;  // of the encode table

  __device__ __forceinline__ int64_t begin_of(int64_t tile, int u) const {
    return tile * kQuantizeTile + (warp * kUnits + u) * kRow + lane * kWeights;
  }

  __device__ __forceinline__ void load(int64_t tile, Unit (&units)[kUnits]) const {
    const uint4* source = reinterpret_cast<const uint4*>(weight + begin_of(tile, 0));
#pragma unroll
    for (int u = 0; u < kUnits; ++u) *reinterpret_cast<uint4*>(units[u].words) = __ldcs(source + u * 32);
  }

  // The largest magnitude of a unit's block, or of the warp's row where a block is several rows.
  __device__ __forceinline__ static float reduce(const Unit& unit) {
    float largest = unit.largest();
#pragma unroll
    for (int step = (kLanes ? kLanes : 32) / 2; step > 0; step /= 2) {
      largest = max_or_nan(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    return largest;
  }

  __device__ __forceinline__ float reduce_rows(const float (&rows)[kRows], int u) const {
    const int count = (1 << log2_blocksize) / kRow;
    const int first = (warp * kUnits + u) & ~(count - 1);
    float largest = rows[first];
    for (int row = 1; row < count; ++row) largest = max_or_nan(largest, rows[first + row]);
    return largest;
  }

  __device__ __forceinline__ void finish(int64_t tile, const Unit (&units)[kUnits], const EncodeCopies& table,
                                         float (&rows)[kRows]) const {
    float largest[kUnits], reciprocal[kUnits];
    Packed* target = reinterpret_cast<Packed*>(packed + begin_of(tile, 0) / 2);
    [[maybe_unused]] float* scales = absmax + (begin_of(tile, 0) >> log2_blocksize);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) largest[u] = reduce(units[u]);
    if constexpr (kLanes == 0) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (lane == 0) rows[warp * kUnits + u] = largest[u];
      }
      __syncthreads();
#pragma unroll
      for (int u = 0; u < kUnits; ++u) largest[u] = reduce_rows(rows, u);
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) reciprocal[u] = __frcp_rn(at_least_tiny(largest[u]));
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      uint32_t codes = 0;
#pragma unroll
      for (int j = kWeights - 2; j >= 0; j -= 2) {  // the even weight goes into the high nibble
        codes = codes * 16 + encode(table, column, __fmul_rn(units[u].value(j), reciprocal[u]));
        codes = codes * 16 + encode(table, column, __fmul_rn(units[u].value(j + 1), reciprocal[u]));
      }
      target[u * 32] = static_cast<Packed>(codes);
      if constexpr (kLanes > 0) {
        if (lane % kLanes == 0) scales[u * (32 / kLanes)] = largest[u];
      } else {
        if (leads(begin_of(tile, u))) absmax[begin_of(tile, u) >> log2_blocksize] = largest[u];
      }
    }
  }

  // A tile that is partial or not aligned, element by element.
  __device__ __forceinline__ void piecemeal(int64_t tile, const EncodeCopies& table, float (&rows)[kRows]) const {
    if constexpr (kLanes == 0) {
#pragma unroll 1
      for (int u = 0; u < kUnits; ++u) {
        const float largest = reduce(load_piecemeal(begin_of(tile, u)));
        if (lane == 0) rows[warp * kUnits + u] = largest;
      }
      __syncthreads();
    }
#pragma unroll 1
    for (int u = 0; u < kUnits; ++u) {
      const int64_t begin = begin_of(tile, u);
      const Unit unit = load_piecemeal(begin);
      float largest = reduce(unit);
      if constexpr (kLanes == 0) largest = reduce_rows(rows, u);
      const bool tail = is_tail(begin);
      const float safe = at_least_tiny(largest);
      const float reciprocal = __frcp_rn(safe);
#pragma unroll
      for (int j = 0; j < kWeights; j += 2) {
        if (begin + j >= numel) continue;
        uint32_t codes[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // Whole blocks multiply by the reciprocal, a tail divides, as bitsandbytes' default formula does.
          const float v = unit.value(j + i);
          codes[i] = encode(table, column, tail ? __fdiv_rn(v, safe) : __fmul_rn(v, reciprocal));
        }
        if (begin + j + 1 == numel) codes[1] = kNF4Zero;
        packed[(begin + j) / 2] = static_cast<uint8_t>(codes[0] << 4 | codes[1]);
      }
      if (leads(begin) && begin < numel) absmax[begin >> log2_blocksize] = tail ? safe : largest;
    }
  }

  __device__ __forceinline__ Unit load_piecemeal(int64_t begin) const {
    Unit unit{{0, 0, 0, 0}};
#pragma unroll
    for (int j = 0; j < kWeights; ++j) {
      if (begin + j < numel) unit.set(j, weight[begin + j]);
    }
    return unit;
  }

  __device__ __forceinline__ static float at_least_tiny(float v) { return v < 1e-38f ? 1e-38f : v; }  // NaN stays

  __device__ __forceinline__ bool leads(int64_t begin) const {
    return (static_cast<uint32_t>(begin) & ((1u << log2_blocksize) - 1)) == 0;
  }

  __device__ __forceinline__ bool is_tail(int64_t begin) const {
    return (((begin >> log2_blocksize) + 1) << log2_blocksize) > numel;
  }
};

// aligned: weight on 16 bytes and packed on 4; only the last tile may be partial.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kQuantizeThreads)
    nf4_quantize_kernel(const T* __restrict__ weight, uint8_t* __restrict__ packed, float* __restrict__ absmax,
                        int64_t numel, int log2_blocksize, bool aligned) {
  using Q = Quantizer<T, kLanes>;
  alignas(16) __shared__ EncodeCopies table;
  __shared__ float rows[Q::kRows];
  const Q q{weight,
            packed,
            absmax,
            numel,
            log2_blocksize,
            static_cast<int>(threadIdx.x / 32),
            static_cast<int>(threadIdx.x % 32),
            static_cast<uint32_t>(threadIdx.x % 16 * sizeof(EncodeEntry))};
  const int64_t whole = aligned ? numel / kQuantizeTile : 0;
  const int64_t tile = gridDim.x - 1 - blockIdx.x;  // the partial tile takes longest: it starts first
  typename Q::Unit units[Q::kUnits];
  if (tile < whole) q.load(tile, units);
  // Behind the loads, so that it costs no time of its own.
  static_assert(kEncodeBins * 16 % kQuantizeThreads == 0);
#pragma unroll
  for (unsigned i = 0; i < kEncodeBins * 16; i += kQuantizeThreads) {
    table[(i + threadIdx.x) / 16][threadIdx.x % 16] = kEncodeTableDevice.bins[(i + threadIdx.x) / 16];
  }
  __syncthreads();
  if (tile < whole) {
    q.finish(tile, units, table, rows);
  } else {
    q.piecemeal(tile, table, rows);
  }
}

}  // namespace peftkern
