// nf4_dequantize: out[numel] = code[nibble] * absmax[block], nested scales decoded on the way: one launch, one pass.
// Bytes per weight at block 64, double quantized, bf16: 0.5 codes + 1/64 absmax + 2 out = 2.516.
// 8192x28672: 591 MB, floor 138 us at 4.28 TB/s. Products and sums are rounded apart, so values are bitwise
// bitsandbytes'.
//
// A warp owns a contiguous region of kUnits * 512 dense bytes. Unit u of a lane is codes whose values fill 16 bytes, so
// that a warp stores whole 128-byte lines in every dtype. All codes of a region are loaded before anything waits; its
// scales (32 at block 64 and 8 units) are decoded one per lane and handed round by shuffle, so that the dependent chain
// 8-bit code -> nested code -> scale is walked once per region. The 16 codes live in lanes too: a shuffle over 16 lanes
// looks only at the low four bits of its index, so a nibble needs a shift and no mask.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/nf4_code.h"
#include "nf4/convert_config.h"
#include "nf4/decode.cuh"

namespace peftkern {

template <typename T>
struct DenseUnit {
  static constexpr int kWeights = kDenseUnitBytes / sizeof(T);
  using Packed = std::conditional_t<kWeights == 8, uint32_t, std::conditional_t<kWeights == 4, uint16_t, uint8_t>>;
};

template <typename P>
__device__ __forceinline__ uint32_t load_packed(const uint8_t* source) {
  if constexpr (sizeof(P) == 4) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.b32 %0, [%1];" : "=r"(v) : "l"(source));
    return v;
  } else {
    return __ldg(reinterpret_cast<const P*>(source));
  }
}

// Two values rounded to T and laid out as in memory, 2 * sizeof(T) bytes.
template <typename T>
__device__ __forceinline__ void round_pair(float even, float odd, uint32_t* words) {
  if constexpr (sizeof(T) == 2) {
    using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    Pair pair;
    if constexpr (std::is_same_v<T, __half>) {
      pair = __floats2half2_rn(even, odd);
    } else {
      pair = __floats2bfloat162_rn(even, odd);
    }
    words[0] = *reinterpret_cast<const uint32_t*>(&pair);
  } else if constexpr (sizeof(T) == 4) {
    words[0] = __float_as_uint(even);
    words[1] = __float_as_uint(odd);
  } else {
    const double pair[2] = {even, odd};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      words[2 * i] = __double2loint(pair[i]);
      words[2 * i + 1] = __double2hiint(pair[i]);
    }
  }
}

// Some rows and columns of a weight whose rows are `stride` elements apart, from element `first` on.
struct NF4Slice {
  int64_t first, stride, columns;
};

template <typename T, bool kNested>
struct Dequantizer {
  static constexpr int kUnits = kDequantizeUnits;
  static constexpr int kWeights = DenseUnit<T>::kWeights;
  static constexpr int kRegion = kUnits * 32 * kWeights;  // weights per warp
  static constexpr int kScales = kRegion > 1024 ? 2 : 1;  // per lane, at block 32
  static_assert(kRegion <= 2048, "two scales a lane cover a region of blocks of 32");
  using Packed = typename DenseUnit<T>::Packed;

  // What a region needs from memory, on its way.
  struct Pending {
    uint32_t units[kUnits];
    float scales[kScales];    // not nested: final. Nested: nested_absmax
    uint32_t codes[kScales];  // nested
  };

  NF4DeviceWeight w;
  T* out;
  int64_t numel;
  int lane;
  float offset;
  float code;  // of index lane % 16

  __device__ __forceinline__ int64_t begin_of(int64_t region, int u) const {
    return region * kRegion + (u * 32 + lane) * kWeights;
  }

  __device__ __forceinline__ Pending load(int64_t region) const {
    Pending p;
    const uint8_t* source = w.packed + begin_of(region, 0) / 2;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      p.units[u] = load_packed<Packed>(source + u * 32 * sizeof(Packed));
    }
    const int64_t first = (region * kRegion) >> w.log2_blocksize;
    const int blocks = max(kRegion >> w.log2_blocksize, 1);
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      if (i > 0 && blocks <= 32) continue;
      const int64_t block = first + min(32 * i + lane, blocks - 1);
      if constexpr (kNested) {
        p.codes[i] = __ldg(w.absmax_codes + block);
        p.scales[i] = __ldg(w.nested_absmax + (block >> w.log2_nested_blocksize));
      } else {
        p.scales[i] = __ldg(w.absmax + block);
      }
    }
    return p;
  }

  __device__ __forceinline__ float value(uint32_t unit, int shift) const {
    return __shfl_sync(0xffffffffu, code, unit >> shift, 16);
  }

  __device__ __forceinline__ void decode(uint32_t unit, float scale, uint32_t (&words)[4]) const {
#pragma unroll
    for (int j = 0; j < kWeights; j += 2) {  // the even weight sits in the high nibble
      round_pair<T>(__fmul_rn(value(unit, 4 * j + 4), scale), __fmul_rn(value(unit, 4 * j), scale),
                    words + j * sizeof(T) / 4);
    }
  }

  __device__ __forceinline__ void finish(int64_t region, Pending p) const {
    const bool two_scales = kScales == 2 && w.log2_blocksize == 5;
    if constexpr (kNested) {
#pragma unroll
      for (int i = 0; i < kScales; ++i) {
        if (i > 0 && !two_scales) continue;
        p.scales[i] = __fadd_rn(__fmul_rn(__ldg(w.nested_code + p.codes[i]), p.scales[i]), offset);
      }
    }
    uint4* target = reinterpret_cast<uint4*>(out + begin_of(region, 0));
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int block = ((u * 32 + lane) * kWeights) >> w.log2_blocksize;
      const float source = (kScales == 2 && two_scales && u >= kUnits / 2) ? p.scales[kScales - 1] : p.scales[0];
      uint32_t words[4];
      decode(p.units[u], __shfl_sync(0xffffffffu, source, block), words);
      // As assembly: the compiler would split some of them to save registers.
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(target + u * 32), "r"(words[0]), "r"(words[1]),
                   "r"(words[2]), "r"(words[3])
                   : "memory");
    }
  }

  // A region of a slice whose rows are whole units, each of one block.
  __device__ __forceinline__ void slice(int64_t region, const NF4Slice& s) const {
    uint32_t units[kUnits], codes[kUnits];
    float scales[kUnits];  // as Pending's
    int64_t row = begin_of(region, 0) / s.columns, column = begin_of(region, 0) - row * s.columns;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int64_t source = begin_of(region, u) < numel ? s.first + row * s.stride + column : s.first;
      const int64_t block = source >> w.log2_blocksize;
      units[u] = load_packed<Packed>(w.packed + source / 2);
      if constexpr (kNested) {
        codes[u] = __ldg(w.absmax_codes + block);
        scales[u] = __ldg(w.nested_absmax + (block >> w.log2_nested_blocksize));
      } else {
        scales[u] = __ldg(w.absmax + block);
      }
      for (column += 32 * kWeights; column >= s.columns; column -= s.columns) ++row;
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if constexpr (kNested) {
        scales[u] = __fadd_rn(__fmul_rn(__ldg(w.nested_code + codes[u]), scales[u]), offset);
      }
      uint32_t words[4];
      decode(units[u], scales[u], words);
      if (begin_of(region, u) < numel) {
        *reinterpret_cast<uint4*>(out + begin_of(region, u)) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }

  // A region of any slice, element by element.
  __device__ __forceinline__ void slice_piecemeal(int64_t region, const NF4Slice& s) const {
    const int64_t end = min(numel, (region + 1) * kRegion);
#pragma unroll 1
    for (int64_t i = region * kRegion + lane; i < end; i += 32) {
      const int64_t row = i / s.columns, source = s.first + row * s.stride + (i - row * s.columns);
      const int nibble = w.packed[source / 2] >> (source % 2 ? 0 : 4) & 15;
      const float scale = block_scale<kNested>(w, source >> w.log2_blocksize, offset);
      out[i] = round_to<T>(__fmul_rn(kNF4CodeDevice[nibble], scale));
    }
  }

  // A region that is partial or not aligned, element by element. Every lane takes part in every shuffle, beyond numel
  // too.
  __device__ __forceinline__ void piecemeal(int64_t region) const {
#pragma unroll 1
    for (int u = 0; u < kUnits; ++u) {
      const int64_t begin = begin_of(region, u);
      uint32_t unit = 0;
#pragma unroll
      for (int byte = 0; byte < static_cast<int>(sizeof(Packed)); ++byte) {
        if (begin + 2 * byte < numel) unit |= static_cast<uint32_t>(w.packed[begin / 2 + byte]) << (8 * byte);
      }
      const float scale = begin < numel ? block_scale<kNested>(w, begin >> w.log2_blocksize, offset) : 0.0f;
      alignas(16) uint32_t words[4];
      decode(unit, scale, words);
#pragma unroll
      for (int j = 0; j < kWeights; ++j) {
        if (begin + j < numel) out[begin + j] = reinterpret_cast<const T*>(words)[j];
      }
    }
  }
};

// kAligned: packed on 4 bytes and out on 16, so that units load and store whole; only the last region may be partial.
template <typename T, bool kNested, bool kAligned>
__global__ void __launch_bounds__(kDequantizeThreads)
    nf4_dequantize_kernel(NF4DeviceWeight w, T* __restrict__ out, int64_t numel) {
  using D = Dequantizer<T, kNested>;
  constexpr int kWarps = kDequantizeThreads / 32;
  constexpr int64_t kTile = int64_t{kWarps} * D::kRegion;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t whole = kAligned ? numel / kTile : 0;
  const int64_t tile = gridDim.x - 1 - blockIdx.x;  // the partial tile takes longest: it starts first
  const int64_t region = tile * kWarps + warp;
  D d{w, out, numel, lane, 0.0f, 0.0f};
  typename D::Pending pending;
  if (tile < whole) pending = d.load(region);
  // Behind the loads, so that these wait together with them.
  if constexpr (kNested) d.offset = __ldg(w.nested_offset);
  d.code = kNF4CodeDevice[lane % 16];
  if (tile < whole) {
    d.finish(region, pending);
  } else {
    d.piecemeal(region);
  }
}

// out gets a slice, dense. kAligned: packed on 4 bytes, out on 16; first, stride and columns multiples of a unit.
template <typename T, bool kNested, bool kAligned>
__global__ void __launch_bounds__(kDequantizeThreads)
    nf4_dequantize_slice_kernel(NF4DeviceWeight w, NF4Slice slice, T* __restrict__ out, int64_t numel) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t region = int64_t{blockIdx.x} * (kDequantizeThreads / 32) + warp;
  Dequantizer<T, kNested> d{w, out, numel, lane, 0.0f, kNF4CodeDevice[lane % 16]};
  if constexpr (kNested) d.offset = __ldg(w.nested_offset);
  if constexpr (kAligned) {
    d.slice(region, slice);
  } else {
    d.slice_piecemeal(region, slice);
  }
}

}  // namespace peftkern
