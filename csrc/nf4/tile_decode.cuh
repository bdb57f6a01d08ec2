// nf4_tile's decoding: packed bytes and scales in shared memory to wgmma's A fragments in registers.
#pragma once

#include <cstdint>

#include "common/hopper.cuh"
#include "nf4/tile_shared.cuh"

namespace peftkern {

__device__ __forceinline__ __nv_bfloat162 as_pair(uint32_t v, __nv_bfloat16) {
  return *reinterpret_cast<const __nv_bfloat162*>(&v);
}
__device__ __forceinline__ __half2 as_pair(uint32_t v, __half) {
  return *reinterpret_cast<const __half2*>(&v);
}

// A scale as the sum of two numbers of T, each twice over.
template <typename T>
__device__ __forceinline__ uint2 split_scale(float scale) {
  const float high = to_float(round_to<T>(scale));
  return {pack_pair<T>(high, high), pack_pair<T>(scale - high, scale - high)};
}

// The pair of weights in byte `selector` of `word`, rounded once. `table`: this lane's column of the table.
template <typename T>
__device__ __forceinline__ uint32_t decode_pair(uint32_t table, uint32_t word, uint32_t selector, uint2 scale) {
  uint32_t codes;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(codes) : "r"(table + __byte_perm(word, 0, selector) * 128));
  const auto pair = as_pair(codes, T());
  const auto weights = __hfma2(pair, as_pair(scale.x, T()), __hmul2(pair, as_pair(scale.y, T())));
  return *reinterpret_cast<const uint32_t*>(&weights);
}

__device__ __forceinline__ uint32_t transpose_8x8(uint32_t v) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(v));
  return out;
}

// What a lane decodes in one step, as it lies in shared memory: the packed words and scales of rows lane / 4 and
// lane / 4 + 8 of the warp's 16 outs, in dX those of weight rows 8 i + lane / 4.
template <bool kDx>
struct RawStep {
  uint4 words[2][2];  // [half of the 64 columns][row, row + 8]
  uint2 scales[2];
};
template <>
struct RawStep<true> {
  uint2 words[8];
  uint2 scales[8];
};

template <bool kDx, int kTokens>
__device__ __forceinline__ void load_step(RawStep<kDx>& raw, const TileShared<kTokens>& s, int stage, int sub,
                                          int group, int warp, int lane) {
  const int row = lane / 4;
  const uint8_t* codes = s.codes[stage];
  const uint2* scales = s.scales[stage][sub] + group * 64;
  if constexpr (!kDx) {
    // Codes [128 rows][128 bytes]. The 128-byte swizzle permutes a row's 16-byte chunks by row % 8.
    const uint8_t* base = codes + (group * 64 + warp * 16 + row) * 128;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int chunk = ((2 * sub + half) ^ row) * 16;
      raw.words[half][0] = *reinterpret_cast<const uint4*>(base + chunk);
      raw.words[half][1] = *reinterpret_cast<const uint4*>(base + 8 * 128 + chunk);
    }
    raw.scales[0] = scales[warp * 16 + row];
    raw.scales[1] = scales[warp * 16 + row + 8];
  } else {
    // Codes [256 weight rows][64 bytes = 128 outs]. The 64-byte swizzle permutes a row's 16-byte chunks by row / 2.
    const int chunk = group * 2 + warp / 2, within = (warp % 2) * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int n = 8 * i + row;
      const uint8_t* from = codes + (sub * 64 + n) * 64 + ((chunk ^ ((n >> 1) & 3)) * 16) + within;
      raw.words[i] = *reinterpret_cast<const uint2*>(from);
      raw.scales[i] = scales[n];
    }
  }
}

// A fragments of a step for this warp's 16 outs: a[q] multiplies contraction columns 16 q to 16 q + 15.
template <typename T, bool kDx>
__device__ __forceinline__ void decode_step(uint32_t (&a)[4][4], const RawStep<kDx>& raw, uint32_t table, int lane) {
  const uint32_t selector = 0x4440 | (lane % 4);
  if constexpr (!kDx) {
    // Word j of a row's 32 bytes holds contraction columns 8 j to 8 j + 7, this lane's pair in byte lane % 4.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint4 w = raw.words[half][r];
        a[2 * half][r] = decode_pair<T>(table, w.x, selector, raw.scales[r]);
        a[2 * half][2 + r] = decode_pair<T>(table, w.y, selector, raw.scales[r]);
        a[2 * half + 1][r] = decode_pair<T>(table, w.z, selector, raw.scales[r]);
        a[2 * half + 1][2 + r] = decode_pair<T>(table, w.w, selector, raw.scales[r]);
      }
    }
  } else {
    // Pairs lie along the outs, so each 8x8 block is transposed.
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint2 w = raw.words[i];
      a[i / 2][2 * (i % 2)] = transpose_8x8(decode_pair<T>(table, w.x, selector, raw.scales[i]));
      a[i / 2][2 * (i % 2) + 1] = transpose_8x8(decode_pair<T>(table, w.y, selector, raw.scales[i]));
    }
  }
}

}  // namespace peftkern
