// The update of a warp's tile.
#pragma once

#include "adamw8bit/stage.cuh"
#include "adamw8bit/step_call.h"
#include "adamw8bit/step_math.cuh"
#include "common/philox.h"

namespace peftkern {

// What a kernel is compiled for beside its format. kScaled: gradients are multiplied before use. kStochastic: bfloat16
// parameters are rounded stochastically. kStaged: for devices with as much shared memory as Hopper's.
template <bool kScaledGradients, bool kStochasticRounding, bool kStagedTiles>
struct AdamWTraits {
  static constexpr bool kScaled = kScaledGradients;
  static constexpr bool kStochastic = kStochasticRounding;
  static constexpr bool kStaged = kStagedTiles;
  static constexpr int kWarps = 32, kThreads = kWarps * 32;
};
static_assert(kAdamWChunk == 32 * kAdamWTile, "a tile of a chunk for each warp");
static_assert(sizeof(AdamWScalars) <=
                  AdamWLayout<DecodeTables::kOnce>::kPositive - AdamWLayout<DecodeTables::kOnce>::kScalars,
              "room");

// A CTA's view of the call: shared by its threads, who keep their registers for the elements.
struct AdamWShared {
  uint32_t step;  // for the random numbers
  bool skip;
  bool crowded;  // a code book's points are too close for bins
};

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

// What byte k of a word of codes stands for. column: the lane's, of decode_column.
template <typename Layout, uint32_t kTable>
__device__ __forceinline__ float decode(uint32_t word, int k, uint32_t column) {
  if constexpr (!Layout::kStaged) return __uint_as_float(shared_word<kTable>((word >> 8 * k & 0xff) * 4));
  const uint32_t row = __byte_perm(word, column, 0x5504 | k << 4);  // of 256 bytes: 256 code + column
  return __uint_as_float(shared_word<kTable>(Layout::kTables == DecodeTables::kEight ? row >> 3 : row));
}
// Where a lane's copy lies in a row of 256 bytes.
template <typename Layout>
__device__ __forceinline__ uint32_t decode_column(uint32_t lane) {
  return Layout::kTables == DecodeTables::kEight ? lane % 8 * 32 : lane * 4;
}

// The codes of a lane's new moments, relative to their blocks' largest, and what is stored of those.
template <typename Layout>
__device__ __forceinline__ void encode_moments(const float (&m)[8], const float (&v)[8], float& m_largest,
                                               float& v_largest, const AdamWShared& common, const char* shared,
                                               uint32_t (&m_codes)[2], uint32_t (&v_codes)[2]) {
  const float limit = shared_float<Layout::kScalars + offsetof(AdamWScalars, encode_limit)>();
  if (fminf(m_largest, v_largest) >= kSmall && max_nan(m_largest, v_largest) < limit) {
    encode_first<Layout, true>(m, __fmul_rn(reciprocal_short(m_largest), kCodeScale), m_codes);
    encode_second<Layout, true>(v, __fmul_rn(reciprocal_short(v_largest), kCodeScale), v_codes);
    return;
  }
  m_largest = m_largest > 0.0f ? fmaxf(m_largest, kAdamWMinAbsmax) : m_largest;
  v_largest = v_largest > 0.0f ? fmaxf(v_largest, kAdamWMinAbsmax) : v_largest;
  const float m_inverse = __frcp_rn(fmaxf(m_largest, kAdamWMinAbsmax));
  const float v_inverse = __frcp_rn(fmaxf(v_largest, kAdamWMinAbsmax));
  if (common.crowded) {
    const float* points = reinterpret_cast<const float*>(shared + Layout::kPoints);
    encode_search(m, m_inverse, points, m_codes);
    encode_search(v, v_inverse, points + 256, v_codes);
  } else {
    encode_first<Layout, false>(m, m_inverse, m_codes);
    encode_second<Layout, false>(v, v_inverse, v_codes);
  }
}

// What a block's codes are multiplied with: its scales, decayed.
__device__ __forceinline__ float2 decayed(float2 absmax, const AdamWCall& call) {
  return {__fmul_rn(absmax.x, call.beta1_rounded), __fmul_rn(absmax.y, call.beta2_rounded)};
}

// Updates turn `done`'s tile in the stage. after_read: called when the stage is free. kPlain: the tile is whole and a
// block, and its scales are in the stage, too.
template <typename Format, typename Traits, bool kPlain, typename Stage, typename AfterRead>
__device__ __forceinline__ void step_tile(const AdamWTile& tile, const Stage& stage, const AdamWTensors& tensors,
                                          const AdamWCall& call, const AdamWShared& common, const char* shared,
                                          float* exchange, uint32_t done, const AfterRead& after_read) {
  using Layout = typename Stage::Layout;
  const int lane = threadIdx.x % 32, n = kPlain ? kAdamWTile : tile.n;
  const int log2_blocksize = kPlain ? kLog2Tile : call.log2_blocksize;
  const uint32_t offset = tile.offset;
  const AdamWEntry& entry = tensors.entries[tile.t];
  const bool whole = kPlain || tile.whole;
  // Results go from here on, from the tensors' first elements or from the load's.
  uint32_t place = offset;
  if constexpr (kPlain) place = stage.place();

  float2 scale = {0.0f, 0.0f};
  const uint32_t first = offset + Format::position(lane, 0), block = first >> log2_blocksize;
  if constexpr (kPlain) {
    scale = decayed(stage.scales(), call);
  } else if (Format::position(lane, 0) < n) {
    scale = decayed({entry.absmax[0][block], entry.absmax[1][block]}, call);
  }
  float m[8], v[8];
  {
    float gradient_scale;
    if constexpr (Traits::kScaled) {
      gradient_scale = shared_float<Layout::kScalars + offsetof(AdamWScalars, gradient_scale)>();
    }
    uint32_t grad[Format::kWords], m_codes[2], v_codes[2];
    stage.grads(grad);
    stage.codes(m_codes, v_codes);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float g = element<Format::kType>(grad, i);
      if constexpr (Traits::kScaled) g = __fmul_rn(g, gradient_scale);
      const float m_book = decode<Layout, Layout::kDecode>(m_codes[i >> 2], i & 3, decode_column<Layout>(lane));
      const float v_book = decode<Layout, Layout::kDecodeSecond>(v_codes[i >> 2], i & 3, decode_column<Layout>(lane));
      m[i] = __fadd_rn(__fmul_rn(m_book, scale.x), __fmul_rn(g, call.one_minus_beta1));
      v[i] = __fadd_rn(__fmul_rn(v_book, scale.y), __fmul_rn(__fmul_rn(g, g), call.one_minus_beta2));
    }
  }
  if (!whole) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (Format::position(lane, i) >= n) m[i] = v[i] = 0.0f;
    }
  }
  float m_largest = fabsf(m[0]);
#pragma unroll
  for (int i = 1; i < 8; ++i) m_largest = max_nan(m_largest, fabsf(m[i]));
  float v_largest = largest_above_zero(v);

  const AdamWScalars s = update_scalars<Layout::kScalars>();
  float p[8];
  uint32_t packed[4];
  const auto update = [&](auto is_short) {
    uint32_t param[Format::kWords];
    stage.params(param);  // again for the long form: kept, they would cost registers
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      p[i] = step_param<decltype(is_short)::value>(element<Format::kType>(param, i), m[i], v[i], s, call.eps);
    }
    if constexpr (Format::kWords == 4) pack<Format>(p, packed);
  };
  update(std::true_type());
  bool near_zero;
  if constexpr (Format::kWords == 4) {
    near_zero = any_below<Format>(
        packed, __float_as_uint(shared_float<Layout::kScalars + offsetof(AdamWScalars, least_pair)>()));
  } else {
    near_zero = any_below(p, shared_float<Layout::kScalars + offsetof(AdamWScalars, least_param)>());
  }
  bool exact = max_nan(m_largest, v_largest) < s.limit;
  if (!exact || near_zero) {
#pragma unroll
    for (int i = 0; i < 8; ++i) exact = exact && (fabsf(m[i]) >= kSmall || m[i] == 0.0f);
    if (!exact) update(std::false_type());
  }
  __syncwarp();
  after_read();
  uint32_t random[4];
  if constexpr (Traits::kStochastic) {
    const uint64_t eight = uint64_t{entry.place} * (kAdamWPlace / 8) + (offset / 8 + lane);
    const PhiloxWords words =
        philox4x32({static_cast<uint32_t>(eight), static_cast<uint32_t>(eight >> 32), 0, common.step},
                   static_cast<uint32_t>(call.seed), static_cast<uint32_t>(call.seed >> 32));
    random[0] = words.w0;
    random[1] = words.w1;
    random[2] = words.w2;
    random[3] = words.w3;
  }
  void* param;
  if constexpr (kPlain) {
    param = stage.target(kToParams);
  } else {
    param = entry.param;
  }
  store_params<Format, Traits::kStochastic>(p, packed, random, param, place, n, whole, param_type<Format>(entry), lane);

  reduce_block<Traits::kWarps>(m_largest, v_largest, log2_blocksize, exchange, done % 2);
  uint32_t codes[2][2];
  encode_moments<Layout>(m, v, m_largest, v_largest, common, shared, codes[0], codes[1]);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    uint8_t* code;
    if constexpr (kPlain) {
      code = reinterpret_cast<uint8_t*>(stage.target(kToCodes + i));
    } else {
      code = entry.code[i];
    }
    if (whole) {
      store_codes<Format>(codes[i], code, place, n, true, lane);
    } else {
      store_codes<Format>(codes[i], code, place, n, false, lane);
    }
  }
  if constexpr (kPlain) {
    if (lane % 16 == 0) {
      char* const absmax = stage.target(kToScales + lane / 16);
      *reinterpret_cast<float*>(address<4>(absmax, place / kAdamWTile)) = lane == 0 ? m_largest : v_largest;
    }
  } else if (Format::position(lane, 0) < n && (first & ((1u << log2_blocksize) - 1)) == 0) {
    // The first lane of each block that starts in this tile.
    entry.absmax[0][block] = m_largest;
    entry.absmax[1][block] = v_largest;
  }
}

}  // namespace peftkern
