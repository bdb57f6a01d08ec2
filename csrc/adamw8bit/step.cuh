// adamw8bit: one AdamW step of all tensors of a list in one launch.
#pragma once

#include "adamw8bit/step_config.h"
#include "adamw8bit/step_tile.cuh"
#include "common/dependent_launch.cuh"

namespace peftkern {

// A number as the word that holds it, to be read before any is used.
__device__ __forceinline__ uint64_t load_word(const AdamWNumber& n) {
  if (n.type == AdamWNumber::kHost) return static_cast<uint64_t>(__double_as_longlong(n.value));
  if (n.type == AdamWNumber::kFloat) return *static_cast<const uint32_t*>(n.pointer);
  return *static_cast<const uint64_t*>(n.pointer);
}

__device__ __forceinline__ double number(const AdamWNumber& n, uint64_t word) {
  if (n.type == AdamWNumber::kFloat) return __uint_as_float(static_cast<uint32_t>(word));
  if (n.type == AdamWNumber::kLong) return static_cast<double>(static_cast<int64_t>(word));
  return __longlong_as_double(static_cast<int64_t>(word));
}

// beta^count, off by up to count * 2^-53 of itself: far from showing in what is rounded to float32, since the more
// factors it has, the less it counts beside 1. pow() is kilobytes of code, which no cache holds yet when a kernel
// starts.
__device__ __forceinline__ double power(double beta, uint64_t count) {
  double result = 1.0;
  for (; count != 0; count >>= 1) {
    if (count & 1) result = __dmul_rn(result, beta);
    beta = __dmul_rn(beta, beta);
  }
  return result;
}

// By one thread. All is read before any of it is used: one latency.
template <typename Format>
__device__ __forceinline__ void prepare(const AdamWCall& call, AdamWShared& shared, AdamWScalars& s) {
  const uint64_t lr_word = load_word(call.lr), step_word = load_word(call.step);
  const float found = call.found_inf != nullptr ? *call.found_inf : 0.0f;
  const float grad_scale = call.grad_scale != nullptr ? *call.grad_scale : 1.0f;
  const float norm = call.norm != nullptr ? *call.norm : 0.0f;
  const bool crowded = __ldg(call.code_tables + kTableFlags) != 0;

  const double lr = number(call.lr, lr_word);
  const uint64_t step = static_cast<uint64_t>(static_cast<int64_t>(number(call.step, step_word)));
  shared.step = static_cast<uint32_t>(step);
  shared.skip = found != 0.0f || !(norm < INFINITY);
  shared.crowded = crowded;
  float scale = call.grad_scale != nullptr ? __fdiv_rn(1.0f, grad_scale) : 1.0f;
  if (call.norm != nullptr) {
    scale = __fmul_rn(scale, static_cast<float>(fmin(1.0, call.max_norm / (double{norm} + 1e-6))));
  }
  s.gradient_scale = call.maximize ? -scale : scale;
  AdamWRates rates = call.rates;
  if (call.lr.type != AdamWNumber::kHost || call.step.type != AdamWNumber::kHost) {
    rates.decay = static_cast<float>(__dsub_rn(1.0, __dmul_rn(lr, call.weight_decay)));
    rates.step_size = static_cast<float>(lr / (1.0 - power(call.beta1, step)));
    rates.inverse_bias2 = static_cast<float>(1.0 / sqrt(1.0 - power(call.beta2, step)));
  }
  s.decay = rates.decay;
  s.step_size = rates.step_size;
  s.root_factor = __fmul_rn(rates.inverse_bias2, 0x1p-32f);
  // A denominator in [2^-50, 2^25], and a ratio in the range of normal floats.
  const bool usual = call.eps >= 0x1p-50f && call.eps <= 0x1p24f && rates.inverse_bias2 <= 0x1p14f;
  s.limit = usual ? kLarge : 0.0f;
  s.encode_limit = crowded ? 0.0f : kLarge;
  // |m| < kSmall changes a parameter by less than kSmall / eps * step_size: below a quarter of its last place, and that
  // of its neighbours after one more rounding, where it is 2^29 times as large.
  s.least_param = __fmul_ru(__fmul_ru(fabsf(s.step_size), call.inverse_eps), kSmall * 0x1p29f);
  s.least_pair = magnitude_bound<Format>(s.least_param);
}

// Shared memory from its beginning, whose addresses there are those of code_tables.h.
__device__ __forceinline__ char* shared_base() {
  extern __shared__ char memory[];
  return memory - static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

// Copies words of a kernel parameter to shared memory, through generic addresses: read as such, lanes that ask for
// different words come one after another.
template <int kThreads, typename T>
__device__ __forceinline__ void copy_words(const T& from, T& to) {
  static_assert(sizeof(T) % 4 == 0 && sizeof(T) / 4 <= kThreads, "a word a thread");
  if (threadIdx.x < sizeof(T) / 4) {
    uint32_t word;
    asm volatile("ld.u32 %0, [%1];" : "=r"(word) : "l"(reinterpret_cast<const uint32_t*>(&from) + threadIdx.x));
    reinterpret_cast<uint32_t*>(&to)[threadIdx.x] = word;
  }
}

// A thread's words of the tables that every CTA copies to shared memory. All are asked for before the first is stored,
// so that they cost one latency, in which the CTA asks for its first chunk.
template <typename Layout, int kThreads>
class AdamWTables {
 public:
  __device__ explicit AdamWTables(const uint32_t* tables) {
    static_assert(kCodeBins / 4 <= kThreads && kThreads * 4 == 4096, "each thread has its words");
    const int i = threadIdx.x;
    const auto load = [&](int from) { return __ldg(reinterpret_cast<const uint4*>(tables + from) + i); };
    if (has_bins()) {
      positive_ = load(kEncodePositive);
      negative_ = load(kEncodeNegative);
      second_ = load(kEncodeSecond);
    }
    if (has_points()) points_ = load(kPointsFirst);
    if constexpr (Layout::kTables == DecodeTables::kBanks) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        values_[k] = __ldg(tables + (i & 8 ? kDecodeSecond : kDecodeFirst) + (i + k * 1024) / 16);
    } else if constexpr (Layout::kTables == DecodeTables::kEight) {
      values_[0] = __ldg(tables + kDecodeFirst + i / 2);  // the second book's follow the first's
    } else {
      if (has_points()) decode_ = load(kDecodeFirst);
    }
  }

  __device__ void store(char* shared) const {
    const auto put = [&](uint32_t to, int at, uint4 v) { reinterpret_cast<uint4*>(shared + to)[at] = v; };
    const int i = threadIdx.x;
    if (has_bins()) {
      put(Layout::kPositive, i, positive_);
      put(Layout::kNegative, i, negative_);
      put(Layout::kSecond, i, second_);
    }
    if (has_points()) put(Layout::kPoints, i, points_);
    if constexpr (Layout::kStaged) {
#pragma unroll
      for (int k = 0; k < (Layout::kTables == DecodeTables::kBanks ? 4 : 1); ++k) {
        put(Layout::kDecode, i + k * 1024, make_uint4(values_[k], values_[k], values_[k], values_[k]));
      }
    } else {
      if (has_points()) put(Layout::kDecode, i, decode_);
    }
  }

 private:
  static __device__ bool has_bins() { return threadIdx.x < kCodeBins / 4; }
  static __device__ bool has_points() { return threadIdx.x < 128; }

  uint4 positive_, negative_, second_, points_, decode_;
  uint32_t values_[4];
};

template <typename Format, typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    adamw8bit_step_kernel(const __grid_constant__ AdamWTensors tensors, const __grid_constant__ AdamWCall call) {
  __shared__ AdamWShared common;
  __shared__ float exchange[4 * Traits::kWarps];
  __shared__ AdamWIndex index;
  __shared__ AdamWSlots slots;
  static_assert(sizeof(common) + sizeof(exchange) + sizeof(index) + sizeof(slots) <= kStepStatic, "room");
  constexpr bool kFetched = Traits::kStaged && kHasCopyEngine && !Format::kMixed;
  using Stage = std::conditional_t<Traits::kStaged, AdamWStage<Format>, AdamWHeld<Format>>;
  using Layout = typename Stage::Layout;
  constexpr uint32_t kAhead = kFetched ? 2 : 1;  // turns that are known before they come
  char* const shared = shared_base();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Beside the end of the kernel before: the tables are there since the code books are.
  const AdamWTables<Layout, Traits::kThreads> tables(call.code_tables);
  if constexpr (kFetched) {
    if (lane == 0 && warp < Stage::kBarriers) {
      barrier_init(&slots.filled[warp], 1);
      barrier_init(&slots.readers[warp].threads, Stage::kTeam * 32);
      slots.readers[warp].warps = 0;
      barrier_init_fence();
    }
  }
  copy_words<Traits::kThreads>(tensors.index, index);
  __syncthreads();

  Stage stage;
  if constexpr (Traits::kStaged) stage = Stage(warp, lane, slots);
  const auto offset_of = [&](AdamWTurn turn) { return turn.offset() + warp * kAdamWTile; };
  const auto has_tile = [&](AdamWTurn turn) { return turn.count(tensors, offset_of(turn), kAdamWTile) != 0; };
  const auto look_up = [&](uint32_t done) {
    return AdamWTurn::find(index, tensors.count, blockIdx.x + (done + lane) * gridDim.x);
  };
  // Nothing else is as urgent as the first chunk. One thread asks for it in order: of what several ask for at once, the
  // first part comes later.
  AdamWTurn turns;
  if (warp == 0) turns = look_up(0);
  wait_for_earlier_kernels();
  if constexpr (kFetched) {
    if (warp == 0) {
      const AdamWTurn first = turns.of(0);
      if (lane == 0) {
        for (uint32_t load = 0; load < Stage::kTeams; ++load) stage.fetch(load, first, tensors);
      }
    }
  }
  tables.store(shared);
  if (threadIdx.x == Traits::kThreads - 1) {
    prepare<Format>(call, common, *reinterpret_cast<AdamWScalars*>(shared + Layout::kScalars));
  }
  if (warp != 0) turns = look_up(0);
  AdamWTurn turn = turns.of(0), after = turns.of(kAhead - 1);
  __syncthreads();
  if (common.skip) {
    if constexpr (kFetched) {  // nothing may arrive after the end
      for (uint32_t load = 0; load < Stage::kTeams; ++load) stage.wait_for_first(load);
    }
    return;
  }
  if constexpr (kFetched) {
    if (threadIdx.x == 0) {
      for (uint32_t load = Stage::kTeams; load < Stage::kLoads; ++load) stage.fetch(load, after, tensors);
    }
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
