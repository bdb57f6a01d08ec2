// adamw8bit: one AdamW step of all tensors of a list in one launch.
#pragma once

#include "adamw8bit/stage.cuh"
#include "adamw8bit/step_call.h"
#include "adamw8bit/step_math.cuh"
#include "common/dependent_launch.cuh"
#include "common/philox.h"

namespace peftkern {

// What a kernel is compiled for beside its format. kScaled: gradients are multiplied before use. kStochastic: bfloat16
// parameters are rounded stochastically. kStaged: for devices with Hopper's copy engine and as much shared memory.
template <bool kScaledGradients, bool kStochasticRounding, bool kStagedTiles>
struct AdamWTraits {
  using Layout = AdamWLayout<kStagedTiles>;
  static constexpr bool kScaled = kScaledGradients;
  static constexpr bool kStochastic = kStochasticRounding;
  static constexpr bool kStaged = kStagedTiles;
  static constexpr int kWarps = 32, kThreads = kWarps * 32;
};
static_assert(kAdamWChunk == 32 * kAdamWTile, "a tile of a chunk for each warp");

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

// A CTA's view of the call: shared by its threads, who keep their registers for the elements.
struct AdamWShared {
  AdamWScalars scalars;
  uint32_t step;  // for the random numbers
  bool skip;
  bool crowded;  // a code book's points are too close for bins
};

__device__ inline void prepare(const AdamWCall& call, AdamWShared& shared) {
  const double lr = number(call.lr), step = number(call.step);
  AdamWScalars& s = shared.scalars;
  shared.step = static_cast<uint32_t>(static_cast<int64_t>(step));
  shared.skip = call.found_inf != nullptr && *call.found_inf != 0.0f;
  float scale = call.grad_scale != nullptr ? __fdiv_rn(1.0f, *call.grad_scale) : 1.0f;
  if (call.norm != nullptr) {
    const double norm = *call.norm;
    scale = __fmul_rn(scale, static_cast<float>(fmin(1.0, call.max_norm / (norm + 1e-6))));
    if (!(norm < INFINITY)) shared.skip = true;
  }
  s.gradient_scale = call.maximize ? -scale : scale;
  AdamWRates rates = call.rates;
  if (call.lr.type != AdamWNumber::kHost || call.step.type != AdamWNumber::kHost) {
    rates.decay = static_cast<float>(__dsub_rn(1.0, __dmul_rn(lr, call.weight_decay)));
    rates.step_size = static_cast<float>(lr / (1.0 - pow(call.beta1, step)));
    rates.inverse_bias2 = static_cast<float>(1.0 / sqrt(1.0 - pow(call.beta2, step)));
  }
  s.decay = rates.decay;
  s.step_size = rates.step_size;
  s.inverse_bias2 = rates.inverse_bias2;
  s.root_factor = __fmul_rn(s.inverse_bias2, 0x1p-32f);
  // A denominator in [2^-50, 2^25], and a ratio in the range of normal floats.
  const bool usual = call.eps >= 0x1p-50f && call.eps <= 0x1p24f && s.inverse_bias2 <= 0x1p14f;
  s.limit = usual ? kLarge : 0.0f;
  // |m| < kSmall changes a parameter by less than kSmall / eps * step_size: below a quarter of its last place, and that
  // of its neighbours after one more rounding, where it is 2^29 times as large.
  s.least_param = __fmul_ru(__fdiv_ru(fabsf(s.step_size), call.eps), kSmall * 0x1p29f);
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

// What byte k of a word of codes stands for. lane_bytes: 4 * lane.
template <uint32_t kTable, bool kReplicated>
__device__ __forceinline__ float decode(uint32_t word, int k, uint32_t lane_bytes) {
  const uint32_t offset = kReplicated ? __byte_perm(word, lane_bytes, 0x5504 | k << 4) : (word >> 8 * k & 0xff) * 4;
  return __uint_as_float(shared_word<kTable>(offset));
}

// The codes of a lane's new moments, relative to their blocks' largest, and what is stored of those.
template <typename Layout>
__device__ __forceinline__ void encode_moments(const float (&m)[8], const float (&v)[8], float& m_largest,
                                               float& v_largest, bool crowded, const char* shared,
                                               uint32_t (&m_codes)[2], uint32_t (&v_codes)[2]) {
  if (!crowded && fminf(m_largest, v_largest) >= kSmall && max_nan(m_largest, v_largest) < kLarge) {
    encode_first<Layout, true>(m, __fmul_rn(reciprocal_short(m_largest), kCodeScale), m_codes);
    encode_second<Layout, true>(v, __fmul_rn(reciprocal_short(v_largest), kCodeScale), v_codes);
    return;
  }
  m_largest = m_largest > 0.0f ? fmaxf(m_largest, kAdamWMinAbsmax) : m_largest;
  v_largest = v_largest > 0.0f ? fmaxf(v_largest, kAdamWMinAbsmax) : v_largest;
  const float m_inverse = __frcp_rn(fmaxf(m_largest, kAdamWMinAbsmax));
  const float v_inverse = __frcp_rn(fmaxf(v_largest, kAdamWMinAbsmax));
  if (crowded) {
    const float* points = reinterpret_cast<const float*>(shared + Layout::kPoints);
    encode_search(m, m_inverse, points, m_codes);
    encode_search(v, v_inverse, points + 256, v_codes);
  } else {
    encode_first<Layout, false>(m, m_inverse, m_codes);
    encode_second<Layout, false>(v, v_inverse, v_codes);
  }
}

// Updates the tile in the stage. after_read: called when the stage is free.
template <typename Format, typename Traits, typename Stage, typename AfterRead>
__device__ __forceinline__ void step_tile(const AdamWTile<Format>& tile, const Stage& stage,
                                          const AdamWTensors& tensors, const AdamWCall& call, const AdamWShared& common,
                                          const char* shared, float* exchange, int parity,
                                          const AfterRead& after_read) {
  using Layout = typename Traits::Layout;
  const AdamWScalars& s = common.scalars;
  const int lane = threadIdx.x % 32, t = tile.t, n = tile.n;
  const uint32_t offset = tile.offset;
  const bool whole = is_whole(tile, tensors);

  float m_scale = 0.0f, v_scale = 0.0f;
  const uint32_t first = offset + Format::position(lane, 0), block = first >> call.log2_blocksize;
  if (Format::position(lane, 0) < n) {
    m_scale = __fmul_rn(*reinterpret_cast<const float*>(address<4>(tensors.m_absmax[t], block)), call.beta1_rounded);
    v_scale = __fmul_rn(*reinterpret_cast<const float*>(address<4>(tensors.v_absmax[t], block)), call.beta2_rounded);
  }
  float m[8], v[8];
  {
    uint32_t grad[Format::kWords], m_codes[2], v_codes[2];
    stage.grads(grad);
    stage.codes(m_codes, v_codes);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float g = element<Format::kType>(grad, i);
      if constexpr (Traits::kScaled) g = __fmul_rn(g, s.gradient_scale);
      const float m_book = decode<Layout::kDecode, Layout::kReplicated>(m_codes[i >> 2], i & 3, lane * 4);
      const float v_book = decode<Layout::kDecodeSecond, Layout::kReplicated>(v_codes[i >> 2], i & 3, lane * 4);
      m[i] = __fadd_rn(__fmul_rn(m_book, m_scale), __fmul_rn(g, call.one_minus_beta1));
      v[i] = __fadd_rn(__fmul_rn(v_book, v_scale), __fmul_rn(__fmul_rn(g, g), call.one_minus_beta2));
    }
  }
  if (!whole) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (Format::position(lane, i) >= n) m[i] = v[i] = 0.0f;
    }
  }
  float m_largest = 0.0f, v_largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    m_largest = max_nan(m_largest, fabsf(m[i]));
    v_largest = max_nan(v_largest, v[i]);
  }

  float p[8];
  uint32_t param[Format::kWords];
  stage.params(param);
#pragma unroll
  for (int i = 0; i < 8; ++i) p[i] = step_param<true>(element<Format::kType>(param, i), m[i], v[i], s, call.eps);
  bool exact = max_nan(m_largest, v_largest) < s.limit;
  if (least_magnitude<Format>(p) < s.least_param) {
#pragma unroll
    for (int i = 0; i < 8; ++i) exact = exact && (fabsf(m[i]) >= kSmall || m[i] == 0.0f);
  }
  if (!exact) {
    stage.params(param);  // again: kept, they would cost registers
#pragma unroll
    for (int i = 0; i < 8; ++i) p[i] = step_param<false>(element<Format::kType>(param, i), m[i], v[i], s, call.eps);
  }
  __syncwarp();
  after_read();
  uint32_t random[4];
  if constexpr (Traits::kStochastic) {
    const uint64_t eight = uint64_t{tensors.place[t]} * (kAdamWPlace / 8) + (offset / 8 + lane);
    const PhiloxWords words =
        philox4x32({static_cast<uint32_t>(eight), static_cast<uint32_t>(eight >> 32), 0, common.step},
                   static_cast<uint32_t>(call.seed), static_cast<uint32_t>(call.seed >> 32));
    random[0] = words.w0;
    random[1] = words.w1;
    random[2] = words.w2;
    random[3] = words.w3;
  }
  store_params<Format, Traits::kStochastic>(p, random, tensors.param[t], offset, n, whole,
                                            param_type<Format>(tensors, t), lane);

  reduce_block<Traits::kWarps>(m_largest, v_largest, call.log2_blocksize, exchange, parity);
  uint32_t m_codes[2], v_codes[2];
  encode_moments<Layout>(m, v, m_largest, v_largest, common.crowded, shared, m_codes, v_codes);
  if (whole) {
    store_codes<Format>(m_codes, tensors.m_code[t], offset, n, true, lane);
    store_codes<Format>(v_codes, tensors.v_code[t], offset, n, true, lane);
  } else {
    store_codes<Format>(m_codes, tensors.m_code[t], offset, n, false, lane);
    store_codes<Format>(v_codes, tensors.v_code[t], offset, n, false, lane);
  }
  // The first lane of each block that starts in this tile.
  if (Format::position(lane, 0) < n && (first & ((1u << call.log2_blocksize) - 1)) == 0) {
    *reinterpret_cast<float*>(address<4>(tensors.m_absmax[t], block)) = m_largest;
    *reinterpret_cast<float*>(address<4>(tensors.v_absmax[t], block)) = v_largest;
  }
}

// Shared memory from its beginning, whose addresses there are those of code_tables.h.
__device__ __forceinline__ char* shared_base() {
  extern __shared__ char memory[];
  return memory - static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

// The entry that holds a chunk, from entry t on. first_chunk: in shared memory; each lane looks at one of the next 32.
__device__ __forceinline__ int advance_to(int t, uint32_t chunk, const uint32_t* first_chunk, int count) {
  int passed;
  do {
    const int next = min(t + 1 + static_cast<int>(threadIdx.x % 32), count);
    passed = __popc(__ballot_sync(kAllLanes, first_chunk[next] <= chunk));
    t += passed;
  } while (passed == 32);
  return t;
}

// All loads come before the first store: the tables cost one latency.
template <typename Layout, int kThreads>
__device__ inline void fill_tables(char* shared, const uint32_t* tables) {
  static_assert(kCodeBins / 4 <= kThreads && kThreads * 4 == 4096, "each thread has its words");
  const int i = threadIdx.x;
  const bool has_bins = i < kCodeBins / 4, has_points = i < 128;
  const auto load = [&](int from) { return __ldg(reinterpret_cast<const uint4*>(tables + from) + i); };
  const auto store = [&](uint32_t to, int at, uint4 v) { reinterpret_cast<uint4*>(shared + to)[at] = v; };
  uint4 positive, negative, second, points, decode;
  uint32_t values[4];
  if (has_bins) {
    positive = load(kEncodePositive);
    negative = load(kEncodeNegative);
    second = load(kEncodeSecond);
  }
  if (has_points) points = load(kPointsFirst);
  if constexpr (Layout::kReplicated) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      values[k] = __ldg(tables + (i & 8 ? kDecodeSecond : kDecodeFirst) + (i + k * 1024) / 16);
  } else {
    if (has_points) decode = load(kDecodeFirst);
  }
  if (has_bins) {
    store(Layout::kPositive, i, positive);
    store(Layout::kNegative, i, negative);
    store(Layout::kSecond, i, second);
  }
  if (has_points) store(Layout::kPoints, i, points);
  if constexpr (Layout::kReplicated) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      store(Layout::kDecode, i + k * 1024, make_uint4(values[k], values[k], values[k], values[k]));
    }
  } else {
    if (has_points) store(Layout::kDecode, i, decode);
  }
}

template <typename Format, typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    adamw8bit_step_kernel(const __grid_constant__ AdamWTensors tensors, const __grid_constant__ AdamWCall call) {
  __shared__ AdamWShared common;
  __shared__ float exchange[4 * Traits::kWarps];
  __shared__ uint32_t first_chunk[kAdamWMaxTensors + 1];
  __shared__ uint64_t barriers[Traits::kWarps];
  constexpr bool kStaged = Traits::kStaged && kHasCopyEngine, kFetched = kStaged && !Format::kMixed;
  char* const shared = shared_base();
  const int warp = threadIdx.x / 32;
  // Beside the end of the look: the tables are there since the code books are.
  for (int i = threadIdx.x; i <= tensors.count; i += Traits::kThreads) first_chunk[i] = tensors.first_chunk[i];
  fill_tables<typename Traits::Layout, Traits::kThreads>(shared, call.code_tables);
  if (threadIdx.x == 0) common.crowded = __ldg(call.code_tables + kTableFlags) != 0;
  if constexpr (kFetched) {
    if (threadIdx.x % 32 == 0) {
      barrier_init(&barriers[warp], 1);
      barrier_init_fence();
    }
  }
  __syncthreads();
  wait_for_earlier_kernels();
  if (threadIdx.x == Traits::kThreads - 1) prepare(call, common);

  const uint32_t chunks = first_chunk[tensors.count];
  using Staged = AdamWStage<Format>;
  std::conditional_t<kStaged, Staged, AdamWHeld<Format>> stage;
  if constexpr (kStaged) {
    stage = Staged(Traits::Layout::stage(warp, Staged::kBytes), shared_address(&barriers[warp]));
  }
  const auto tile_of = [&](int t, uint32_t chunk) {
    const uint32_t offset = (chunk - first_chunk[t]) * kAdamWChunk + warp * kAdamWTile;
    return AdamWTile<Format>{t, max(0, min(kAdamWTile, static_cast<int>(tensors.numel[t] - offset))), offset};
  };
  uint32_t chunk = blockIdx.x;
  int t = advance_to(0, chunk, first_chunk, tensors.count);
  const auto fetch = [&]() {
    const AdamWTile<Format> tile = tile_of(t, chunk);
    if constexpr (kFetched) {
      if (is_whole(tile, tensors)) stage.fetch(tile, tensors);
    }
  };
  fetch();
  __syncthreads();
  if (common.skip) {
    if constexpr (kFetched) {  // nothing may arrive after the end
      if (is_whole(tile_of(t, chunk), tensors)) stage.wait();
    }
    return;
  }

  const bool alone = call.log2_blocksize <= 8;
  for (int parity = 0; chunk < chunks; parity ^= 1) {
    const AdamWTile<Format> tile = tile_of(t, chunk);
    const auto next = [&]() {
      chunk += gridDim.x;
      if (chunk >= chunks) return;
      t = advance_to(t, chunk, first_chunk, tensors.count);
      fetch();
    };
    if (alone && tile.n == 0) {
      next();
      continue;
    }
    const bool whole = is_whole(tile, tensors);
    if constexpr (kFetched) {
      if (whole) {
        stage.wait();
      } else {
        stage.load(tile, tensors, false);
      }
    } else {
      stage.load(tile, tensors, whole);
    }
    step_tile<Format, Traits>(tile, stage, tensors, call, common, shared, exchange, parity, next);
  }
}

}  // namespace peftkern
