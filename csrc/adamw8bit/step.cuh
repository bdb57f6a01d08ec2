// adamw8bit: one AdamW step of all tensors of a list in one launch.
#pragma once

#include "adamw8bit/step_call.h"
#include "adamw8bit/step_math.cuh"
#include "adamw8bit/tile.cuh"
#include "common/dependent_launch.cuh"
#include "common/hopper.cuh"
#include "common/philox.h"

namespace peftkern {

// What a kernel is compiled for beside its format. kScaled: gradients are multiplied before use. kStochastic: bfloat16
// parameters are rounded stochastically. kStaged: for devices with the copy engine and the shared memory of Hopper.
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

// A CTA's view of the call: shared by its threads.
struct AdamWShared {
  AdamWScalars scalars;
  uint32_t step;  // for the random numbers
  bool skip;
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

// A tile of entry t as it is in memory: n elements from `offset` on, 0 where a block's other warps hold all of it.
template <typename Format>
struct AdamWTile {
  uint32_t param[Format::kWords], grad[Format::kWords], m_codes[2], v_codes[2];
  float m_absmax, v_absmax;
  int t, n;
  uint32_t offset;
};

// Whether a tile can be read and written 16 bytes at a time.
template <typename Format>
__device__ __forceinline__ bool is_whole(const AdamWTile<Format>& tile, const AdamWTensors& tensors) {
  return tile.n == kAdamWTile && tensors.grad_type[tile.t] < kAdamWUnaligned;
}

template <typename Format>
__device__ __forceinline__ void load_scales(AdamWTile<Format>& tile, const AdamWTensors& tensors, int log2_blocksize) {
  const int lane = threadIdx.x % 32, t = tile.t;
  tile.m_absmax = tile.v_absmax = 0.0f;
  if (Format::position(lane, 0) < tile.n) {
    const uint32_t block = (tile.offset + Format::position(lane, 0)) >> log2_blocksize;
    tile.m_absmax = *reinterpret_cast<const float*>(address<4>(tensors.m_absmax[t], block));
    tile.v_absmax = *reinterpret_cast<const float*>(address<4>(tensors.v_absmax[t], block));
  }
}

template <typename Format>
__device__ __forceinline__ void load_tile(AdamWTile<Format>& tile, const AdamWTensors& tensors, bool whole) {
  const int lane = threadIdx.x % 32, t = tile.t, n = tile.n;
  const uint32_t offset = tile.offset;
  const int param_type = Format::kMixed ? tensors.param_type[t] : Format::kType;
  const int grad_type = Format::kMixed ? tensors.grad_type[t] & 3 : Format::kType;
  if (whole) {
    load_values<Format>(tile.grad, tensors.grad[t], offset, n, true, grad_type, lane);
    load_codes<Format>(tile.m_codes, tensors.m_code[t], offset, n, true, lane);
    load_codes<Format>(tile.v_codes, tensors.v_code[t], offset, n, true, lane);
    load_values<Format>(tile.param, tensors.param[t], offset, n, true, param_type, lane);
  } else {
    load_values<Format>(tile.grad, tensors.grad[t], offset, n, false, grad_type, lane);
    load_codes<Format>(tile.m_codes, tensors.m_code[t], offset, n, false, lane);
    load_codes<Format>(tile.v_codes, tensors.v_code[t], offset, n, false, lane);
    load_values<Format>(tile.param, tensors.param[t], offset, n, false, param_type, lane);
  }
}

// A warp's stage: where the copy engine puts its next tile if it is whole.
template <typename Format>
struct AdamWStage {
  static constexpr uint32_t kValues = Format::kWords * 128, kCodes = kAdamWTile;
  static constexpr uint32_t kBytes = 2 * kValues + 2 * kCodes;
  uint32_t address, barrier;  // of shared memory
  uint32_t parity;

  __device__ __forceinline__ void fetch(const AdamWTile<Format>& tile, const AdamWTensors& tensors) const {
    if (threadIdx.x % 32 != 0) return;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "n"(kBytes) : "memory");
    copy(address, peftkern::address<Format::kWords / 2>(tensors.param[tile.t], tile.offset), kValues);
    copy(address + kValues, peftkern::address<Format::kWords / 2>(tensors.grad[tile.t], tile.offset), kValues);
    copy(address + 2 * kValues, tensors.m_code[tile.t] + tile.offset, kCodes);
    copy(address + 2 * kValues + kCodes, tensors.v_code[tile.t] + tile.offset, kCodes);
  }

  __device__ __forceinline__ void copy(uint32_t to, const void* from, uint32_t bytes) const {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
  }

  __device__ __forceinline__ void read(AdamWTile<Format>& tile) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
    parity ^= 1;
    const uint32_t lane = threadIdx.x % 32, at = address + lane * 16;
    put(tile.grad, 0, word4(at + kValues));
    if constexpr (Format::kWords == 8) put(tile.grad, 4, word4(at + kValues + 512));
    put(tile.param, 0, word4(at));
    if constexpr (Format::kWords == 8) put(tile.param, 4, word4(at + 512));
    if constexpr (Format::kSplit) {
      const uint32_t codes = address + 2 * kValues + lane * 4;
      tile.m_codes[0] = word(codes);
      tile.m_codes[1] = word(codes + 128);
      tile.v_codes[0] = word(codes + kCodes);
      tile.v_codes[1] = word(codes + kCodes + 128);
    } else {
      const uint32_t codes = address + 2 * kValues + lane * 8;
      word2(tile.m_codes, codes);
      word2(tile.v_codes, codes + kCodes);
    }
    __syncwarp();
  }

  static __device__ __forceinline__ uint4 word4(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
  }
  static __device__ __forceinline__ void word2(uint32_t (&to)[2], uint32_t at) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(at) : "memory");
  }
  static __device__ __forceinline__ uint32_t word(uint32_t at) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
  }
};

template <typename Format, typename Traits>
__device__ __forceinline__ void step_tile(const AdamWTile<Format>& tile, const AdamWTensors& tensors,
                                          const AdamWCall& call, const AdamWScalars& s, const char* shared,
                                          bool crowded, uint32_t step, float* exchange, int parity) {
  using Layout = typename Traits::Layout;
  const int lane = threadIdx.x % 32, t = tile.t, n = tile.n;
  const uint32_t offset = tile.offset;
  const int param_type = Format::kMixed ? tensors.param_type[t] : Format::kType;
  const bool whole = is_whole(tile, tensors);

  float m[8], v[8];
  const float m_scale = __fmul_rn(tile.m_absmax, call.beta1_rounded);
  const float v_scale = __fmul_rn(tile.v_absmax, call.beta2_rounded);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float g = element<Format::kType>(tile.grad, i);
    if constexpr (Traits::kScaled) g = __fmul_rn(g, s.gradient_scale);
    const float m_book = decode<Layout::kDecode, Layout::kReplicated>(tile.m_codes[i >> 2], i & 3, lane * 4);
    const float v_book = decode<Layout::kDecodeSecond, Layout::kReplicated>(tile.v_codes[i >> 2], i & 3, lane * 4);
    m[i] = __fadd_rn(__fmul_rn(m_book, m_scale), __fmul_rn(g, call.one_minus_beta1));
    v[i] = __fadd_rn(__fmul_rn(v_book, v_scale), __fmul_rn(__fmul_rn(g, g), call.one_minus_beta2));
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
#pragma unroll
  for (int i = 0; i < 8; ++i) p[i] = step_param<true>(element<Format::kType>(tile.param, i), m[i], v[i], s, call.eps);
  bool exact = max_nan(m_largest, v_largest) < s.limit;
  if (least_magnitude<Format>(p) < s.least_param) {
#pragma unroll
    for (int i = 0; i < 8; ++i) exact = exact && (fabsf(m[i]) >= kSmall || m[i] == 0.0f);
  }
  if (!exact) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      p[i] = step_param<false>(element<Format::kType>(tile.param, i), m[i], v[i], s, call.eps);
  }
  uint32_t random[4];
  if constexpr (Traits::kStochastic) {
    // The calls of a tensor are numbered by eight elements; an entry is a part of 2^30.
    const PhiloxWords words =
        philox4x32({offset / 8 + lane + (tensors.tensor[t] >> 24 << 27), 0, tensors.tensor[t] & 0xffffff, step},
                   static_cast<uint32_t>(call.seed), static_cast<uint32_t>(call.seed >> 32));
    random[0] = words.w0;
    random[1] = words.w1;
    random[2] = words.w2;
    random[3] = words.w3;
  }
  store_params<Format, Traits::kStochastic>(p, random, tensors.param[t], offset, n, whole, param_type, lane);

  reduce_block<Traits::kWarps>(m_largest, v_largest, call.log2_blocksize, exchange, parity);
  uint32_t m_codes[2], v_codes[2];
  encode_moments<Layout>(m, v, m_largest, v_largest, crowded, shared, m_codes, v_codes);
  if (whole) {
    store_codes<Format>(m_codes, tensors.m_code[t], offset, n, true, lane);
    store_codes<Format>(v_codes, tensors.v_code[t], offset, n, true, lane);
  } else {
    store_codes<Format>(m_codes, tensors.m_code[t], offset, n, false, lane);
    store_codes<Format>(v_codes, tensors.v_code[t], offset, n, false, lane);
  }
  // The first lane of each block that starts in this tile.
  const uint32_t first = offset + Format::position(lane, 0), block = first >> call.log2_blocksize;
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

template <typename Layout, int kThreads>
__device__ inline void fill_tables(char* shared, const uint32_t* tables) {
  const auto copy = [&](uint32_t to, int from, int words) {
    for (int i = threadIdx.x; i < words / 4; i += kThreads) {
      reinterpret_cast<uint4*>(shared + to)[i] = __ldg(reinterpret_cast<const uint4*>(tables + from) + i);
    }
  };
  copy(Layout::kPositive, kEncodePositive, kCodeBins);
  copy(Layout::kNegative, kEncodeNegative, kCodeBins);
  copy(Layout::kSecond, kEncodeSecond, kCodeBins);
  copy(Layout::kPoints, kPointsFirst, 512);
  if constexpr (Layout::kReplicated) {
    for (int i = threadIdx.x; i < 4096; i += kThreads) {
      const uint32_t v = __ldg(tables + (i & 8 ? kDecodeSecond : kDecodeFirst) + i / 16);
      reinterpret_cast<uint4*>(shared + Layout::kDecode)[i] = make_uint4(v, v, v, v);
    }
  } else {
    copy(Layout::kDecode, kDecodeFirst, 512);
  }
}

template <typename Format, typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    adamw8bit_step_kernel(const __grid_constant__ AdamWTensors tensors, const __grid_constant__ AdamWCall call) {
  __shared__ AdamWShared common;
  __shared__ float exchange[4 * Traits::kWarps];
  __shared__ uint32_t first_chunk[kAdamWMaxTensors + 1];
  __shared__ uint64_t barriers[Traits::kWarps];
  constexpr bool kStaged = Traits::kStaged && !Format::kMixed;
  char* const shared = shared_base();
  const int warp = threadIdx.x / 32;
  // Beside the end of the look: the tables are there since the code books are.
  for (int i = threadIdx.x; i <= tensors.count; i += Traits::kThreads) first_chunk[i] = tensors.first_chunk[i];
  fill_tables<typename Traits::Layout, Traits::kThreads>(shared, call.code_tables);
  const bool crowded = __ldg(call.code_tables + kTableFlags) != 0;
  if (kStaged && threadIdx.x % 32 == 0) barrier_init(&barriers[warp], 1);
  __syncthreads();
  wait_for_earlier_kernels();
  if (threadIdx.x == Traits::kThreads - 1) prepare(call, common);

  const uint32_t chunks = first_chunk[tensors.count];
  const auto move_to = [&](AdamWTile<Format>& tile, uint32_t chunk) {
    tile.t = advance_to(tile.t, chunk, first_chunk, tensors.count);
    tile.offset = (chunk - first_chunk[tile.t]) * kAdamWChunk + warp * kAdamWTile;
    tile.n = max(0, min(kAdamWTile, static_cast<int>(tensors.numel[tile.t] - tile.offset)));
  };
  AdamWStage<Format> stage{Traits::Layout::stage(warp, AdamWStage<Format>::kBytes), shared_address(&barriers[warp]), 0};
  AdamWTile<Format> tile;
  tile.t = 0;
  move_to(tile, blockIdx.x);
  if constexpr (kStaged) {
    load_scales(tile, tensors, call.log2_blocksize);
    if (is_whole(tile, tensors)) stage.fetch(tile, tensors);
  }
  __syncthreads();
  if (common.skip) {
    if (kStaged && is_whole(tile, tensors)) stage.read(tile);  // nothing may arrive after the end
    return;
  }

  const AdamWScalars s = common.scalars;
  const uint32_t step = common.step;
  const bool alone = call.log2_blocksize <= 8;
  int parity = 0;
  for (uint32_t chunk = blockIdx.x; chunk < chunks; parity ^= 1) {
    AdamWTile<Format> next;
    next.t = tile.t;
    next.n = 0;
    chunk += gridDim.x;
    if (chunk < chunks) move_to(next, chunk);
    const bool whole = is_whole(tile, tensors);
    if constexpr (kStaged) {
      if (whole) {
        stage.read(tile);
      } else if (!alone || tile.n > 0) {
        load_tile(tile, tensors, false);
      }
      load_scales(next, tensors, call.log2_blocksize);
      if (is_whole(next, tensors)) stage.fetch(next, tensors);
    } else {
      load_tile(tile, tensors, whole);
      load_scales(tile, tensors, call.log2_blocksize);
    }
    if (!alone || tile.n > 0) {
      step_tile<Format, Traits>(tile, tensors, call, s, shared, crowded, step, exchange, parity);
    }
    tile = next;
  }
}

}  // namespace peftkern
