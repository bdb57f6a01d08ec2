// adamw8bit: one AdamW step of all tensors of a list in one launch.
#pragma once

#include "adamw8bit/step_config.h"
#include "adamw8bit/step_tile.cuh"
#include "common/dependent_launch.cuh"

namespace peftkern {

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

template <typename Format>
__device__ inline void prepare(const AdamWCall& call, AdamWShared& shared, AdamWScalars& s) {
  const double lr = number(call.lr), step = number(call.step);
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
  s.root_factor = __fmul_rn(rates.inverse_bias2, 0x1p-32f);
  // A denominator in [2^-50, 2^25], and a ratio in the range of normal floats.
  const bool usual = call.eps >= 0x1p-50f && call.eps <= 0x1p24f && rates.inverse_bias2 <= 0x1p14f;
  s.limit = usual ? kLarge : 0.0f;
  s.encode_limit = shared.crowded ? 0.0f : kLarge;
  // |m| < kSmall changes a parameter by less than kSmall / eps * step_size: below a quarter of its last place, and that
  // of its neighbours after one more rounding, where it is 2^29 times as large.
  s.least_param = __fmul_ru(__fdiv_ru(fabsf(s.step_size), call.eps), kSmall * 0x1p29f);
  s.least_pair = magnitude_bound<Format>(s.least_param);
}

// Shared memory from its beginning, whose addresses there are those of code_tables.h.
__device__ __forceinline__ char* shared_base() {
  extern __shared__ char memory[];
  return memory - static_cast<uint32_t>(__cvta_generic_to_shared(memory));
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
  if constexpr (Layout::kTables == DecodeTables::kBanks) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      values[k] = __ldg(tables + (i & 8 ? kDecodeSecond : kDecodeFirst) + (i + k * 1024) / 16);
  } else if constexpr (Layout::kTables == DecodeTables::kEight) {
    values[0] = __ldg(tables + kDecodeFirst + i / 2);  // the second book's follow the first's
  } else {
    if (has_points) decode = load(kDecodeFirst);
  }
  if (has_bins) {
    store(Layout::kPositive, i, positive);
    store(Layout::kNegative, i, negative);
    store(Layout::kSecond, i, second);
  }
  if (has_points) store(Layout::kPoints, i, points);
  if constexpr (Layout::kStaged) {
#pragma unroll
    for (int k = 0; k < (Layout::kTables == DecodeTables::kBanks ? 4 : 1); ++k) {
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
  __shared__ AdamWSlots slots;
  static_assert(sizeof(common) + sizeof(exchange) + sizeof(first_chunk) + sizeof(slots) <= kStepStatic, "room");
  constexpr bool kFetched = Traits::kStaged && kHasCopyEngine && !Format::kMixed;
  using Stage = std::conditional_t<Traits::kStaged, AdamWStage<Format>, AdamWHeld<Format>>;
  using Layout = typename Stage::Layout;
  constexpr uint32_t kAhead = kFetched ? 2 : 1;  // turns that are known before they come
  char* const shared = shared_base();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Beside the end of the look: the tables are there since the code books are.
  for (int i = threadIdx.x; i <= tensors.count; i += Traits::kThreads) first_chunk[i] = tensors.first_chunk[i];
  fill_tables<Layout, Traits::kThreads>(shared, call.code_tables);
  if (threadIdx.x == 0) common.crowded = __ldg(call.code_tables + kTableFlags) != 0;
  if constexpr (kFetched) {
    if (lane == 0 && warp < Stage::kBarriers) {
      barrier_init(&slots.filled[warp], 1);
      barrier_init(&slots.readers[warp].threads, Stage::kTeam * 32);
      slots.readers[warp].warps = 0;
      barrier_init_fence();
    }
  }
  __syncthreads();
  wait_for_earlier_kernels();
  if (threadIdx.x == Traits::kThreads - 1) {
    prepare<Format>(call, common, *reinterpret_cast<AdamWScalars*>(shared + Layout::kScalars));
  }

  Stage stage;
  if constexpr (Traits::kStaged) stage = Stage(warp, lane, slots);
  const auto offset_of = [&](AdamWTurn turn) { return turn.offset() + warp * kAdamWTile; };
  const auto has_tile = [&](AdamWTurn turn) { return turn.count(tensors, offset_of(turn), kAdamWTile) != 0; };
  const auto look_up = [&](uint32_t done) {
    return AdamWTurn::find(tensors, first_chunk, blockIdx.x + (done + lane) * gridDim.x,
                           call.log2_blocksize == kLog2Tile);
  };
  AdamWTurn turns = look_up(0), turn = turns.of(0), after = turns.of(kAhead - 1);
  [[maybe_unused]] const auto of_first = [&](uint32_t load) {
    if constexpr (kFetched) return load < Stage::kTeams ? turn : after;
  };
  if constexpr (kFetched) {
    if (threadIdx.x == 0) {
      for (uint32_t load = 0; load < Stage::kLoads; ++load) stage.fetch(load, of_first(load), tensors);
    }
  }
  __syncthreads();
  if (common.skip) {
    if constexpr (kFetched) {  // nothing may arrive after the end
      for (uint32_t load = 0; load < Stage::kLoads; ++load) {
        if (!of_first(load).ended()) stage.wait_for_first(load);
      }
    }
    return;
  }

  const bool alone = call.log2_blocksize <= kLog2Tile;
  for (uint32_t done = 0; !turn.ended();) {
    const AdamWTurn now = turn;
    if constexpr (kFetched) stage.turn_to(done);
    const auto next = [&]() {
      const uint32_t ahead = done + kAhead;
      if (ahead % 32 == 0) turns = look_up(ahead);
      const AdamWTurn fetched = turns.of(ahead);
      if constexpr (kFetched) {
        stage.done();
        if (lane == 0 && stage.is_last()) stage.fetch(stage.next_load(), stage.next_of(after, fetched), tensors);
      }
      turn = kAhead > 1 ? after : fetched;
      after = fetched;
      ++done;
    };
    const auto step = [&](const AdamWTile& tile, auto plain) {
      step_tile<Format, Traits, decltype(plain)::value>(tile, stage, tensors, call, common, shared, exchange, done,
                                                        next);
    };
    const uint32_t t = now.entry(), offset = offset_of(now);
    if constexpr (kFetched) {
      stage.wait();
      if (now.plain()) {
        if (has_tile(now)) {
          step({t, offset, kAdamWTile, true}, std::true_type());
        } else {
          next();
        }
        continue;
      }
    }
    AdamWTile tile = {t, offset, kAdamWTile, true};
    if (!now.fetched()) {
      const AdamWEntry& entry = tensors.entries[t];
      tile.n = max(0, min(kAdamWTile, static_cast<int>(entry.numel - offset)));
      tile.whole = tile.n == kAdamWTile && entry.grad_type < kAdamWUnaligned;
      if (alone && tile.n == 0) {
        next();
        continue;
      }
    }
    if (!kFetched || !now.fetched()) stage.load(tile, tensors);
    step(tile, std::false_type());
  }
}

}  // namespace peftkern
