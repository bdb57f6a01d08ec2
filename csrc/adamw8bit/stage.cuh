// Where warps have their tiles before they update them.
#pragma once

#include "adamw8bit/step_call.h"
#include "adamw8bit/tile.cuh"
#include "common/hopper.cuh"

namespace peftkern {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kHasCopyEngine = false;
#else
inline constexpr bool kHasCopyEngine = true;
#endif

// What a CTA updates in one of its turns, as one word: each lane of a warp looks up one of the next 32. Bit 0: there is
// none left. Bits 1 to 3: its kind. Bits 6 to 14: the entry, so that they are its offset in the table; the others: its
// chunk.
class AdamWTurn {
 public:
  AdamWTurn() = default;
  explicit __device__ AdamWTurn(uint32_t word) : word_(word) {}

  static __device__ __forceinline__ AdamWTurn find(const AdamWIndex& index, int count, uint32_t chunk) {
    if (chunk >= index.first_chunk[count]) return AdamWTurn(kEnd);
    const uint32_t t = find_tensor(index.first_chunk, count, chunk);
    const bool last = chunk + 1 == index.first_chunk[t + 1];
    const uint32_t kind = last ? index.kinds[t] & 15 : index.kinds[t] >> 4;
    return AdamWTurn((chunk - index.first_chunk[t]) << 15 | t << 6 | kind);
  }
  // What lane `lane` % 32 has; all lanes ask.
  __device__ __forceinline__ AdamWTurn of(uint32_t lane) const {
    return AdamWTurn(__shfl_sync(kAllLanes, word_, static_cast<int>(lane)));
  }

  __device__ __forceinline__ bool ended() const { return (word_ & kEnd) != 0; }
  __device__ __forceinline__ bool fetched() const { return (word_ & kAdamWFetched) != 0; }
  __device__ __forceinline__ bool plain() const { return (word_ & kAdamWPlain) != 0; }
  __device__ __forceinline__ uint32_t entry() const { return (word_ & 0x7fc0) >> 6; }
  __device__ __forceinline__ uint32_t offset() const { return (word_ & 0xffff8000) >> 2; }  // of the chunk's elements
  // Of what is fetched: how many of `most` elements from `element` on there are.
  __device__ __forceinline__ uint32_t count(const AdamWTensors& tensors, uint32_t element, uint32_t most) const {
    if ((word_ & kAdamWPartial) == 0) return most;
    const uint32_t numel = tensors.entries[entry()].numel;
    return element < numel ? min(numel - element, most) : 0;
  }

 private:
  static constexpr uint32_t kEnd = 1;
  static_assert(kAdamWMaxTensors <= 512 && kAdamWMaxPart / kAdamWChunk <= 1 << 17 && kAdamWChunk == 1 << 13, "bits");

  uint32_t word_;
};

// A tile of entry t: n elements from `offset` on, 0 where a block's other warps hold all of it. whole: it has all its
// elements, to be moved 16 bytes at a time.
struct AdamWTile {
  uint32_t t, offset;
  int n;
  bool whole;
};

template <typename Format>
__device__ __forceinline__ int param_type(const AdamWEntry& entry) {
  return Format::kMixed ? entry.param_type : Format::kType;
}

template <typename Format>
__device__ __forceinline__ int grad_type(const AdamWEntry& entry) {
  return Format::kMixed ? entry.grad_type & 3 : Format::kType;
}

// Keeps the compiler from working a number out again wherever it is used: it costs a register instead.
__device__ __forceinline__ uint32_t kept(uint32_t number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Of a team's part of a slot: who is done with it.
struct AdamWReaders {
  uint64_t threads;  // a barrier; racecheck takes no thread's arrival for another's reads
  uint32_t warps;    // counted to know the last one
};

// What the warps of a CTA that share a stage tell each other.
struct AdamWSlots {
  static constexpr uint32_t kMostBarriers = 8, kMostTargets = 16;

  // One for each slot and team: a barrier's phases are told apart only by those who see all of them.
  uint64_t filled[kMostBarriers];
  AdamWReaders readers[kMostBarriers];
  // Where a load's results go: parameters, codes, scales. A launch's tables of pointers are larger than the cache of
  // kernel parameters, so one thread reads them ahead for all. A team's fourth load from here writes where this one's
  // were: by then all of its warps have begun another.
  char* targets[kMostTargets][5];
};
enum AdamWTarget { kToParams, kToCodes, kToScales = kToCodes + 2 };

// The stage of a CTA in shared memory: parameters, gradients and codes as the copy engine brings them, so that memory
// is asked for kilobytes in a row and ahead. A team of warps shares a load, its part of a chunk. Loads are numbered;
// the teams take them in turn, and their warps need not wait for those of others. A slot holds a chunk of 16-bit
// formats; of float32, of which two do not fit, half of one, which is a load. Of mixed formats each warp has a tile of
// its own, which it brings itself.
template <typename Format>
class AdamWStage {
  static constexpr bool kHalves = Format::kWords == 4;
  static constexpr uint32_t kSize = Format::kWords / 2;                         // bytes of an element
  static constexpr uint32_t kValues = kSize * kAdamWTile, kCodes = kAdamWTile;  // of a tile

 public:
  static constexpr bool kShared = !Format::kMixed;
  using Layout = AdamWLayout<kHalves || !kShared ? DecodeTables::kBanks : DecodeTables::kEight>;
  static constexpr uint32_t kTeams = kHalves ? 4 : 2, kTeam = kAdamWChunk / kAdamWTile / kTeams;  // warps of a team
  static constexpr uint32_t kSlots = kHalves ? 2 : 3, kSlotLoads = kHalves ? kTeams : 1;
  static constexpr uint32_t kLoads = kSlots * kSlotLoads, kSlotWarps = kSlotLoads * kTeam;  // of the stage, of a slot
  static constexpr uint32_t kBarriers = kSlots * kTeams, kTargets = 4 * kTeams;
  static_assert(kBarriers <= AdamWSlots::kMostBarriers && kTargets <= AdamWSlots::kMostTargets, "room");

  AdamWStage() = default;
  __device__ AdamWStage(uint32_t warp, uint32_t lane, const AdamWSlots& slots)
      : values_(kept((kShared ? warp % kSlotWarps * kValues : Layout::tile_stage(warp)) + lane * 16)),
        codes_(
            kept((kShared ? warp % kSlotWarps * kCodes : Layout::tile_stage(warp)) + lane * (Format::kSplit ? 4 : 8))),
        filled_(kept(shared_address(slots.filled))),
        team_(warp / kTeam),
        slot_(warp / kSlotWarps) {}

  // This warp's load of turn `turn`: from here on this is about it.
  __device__ __forceinline__ void turn_to(uint32_t turn) {
    load_ = turn * kTeams + team_;
    slot_ = (kHalves ? turn : load_) % kSlots;
    barrier_ = load_ % kBarriers;
    parity_ = load_ / kBarriers % 2;
  }

  // The load that takes this one's place, and of two turns that follow the one that it belongs to.
  __device__ __forceinline__ uint32_t next_load() const { return load_ + kLoads; }
  __device__ __forceinline__ AdamWTurn next_of(AdamWTurn first, AdamWTurn second) const {
    return team_ + kLoads < 2 * kTeams ? first : second;
  }

  // Asks for a load of a turn, by one thread, when nobody reads its slot any more. What is not fetched the warps bring
  // themselves, tile by tile.
  __device__ __forceinline__ void fetch(uint32_t load, AdamWTurn turn, const AdamWTensors& tensors) const {
    if (turn.ended()) return;
    const uint32_t element = turn.offset() + load % kTeams * kTeam * kAdamWTile;
    const uint32_t count = turn.fetched() ? turn.count(tensors, element, kTeam * kAdamWTile) : 0;
    const uint32_t scales = turn.plain() ? count / kAdamWTile * 4 : 0;  // bytes
    const AdamWEntry& e = tensors.entries[turn.entry()];
    char* const targets[5] = {address<kSize>(e.param, element), address<1>(e.code[0], element),
                              address<1>(e.code[1], element), address<4>(e.absmax[0], element / kAdamWTile),
                              address<4>(e.absmax[1], element / kAdamWTile)};
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      asm volatile("st.shared.u64 [%0], %1;" ::"r"(target(load, i)), "l"(targets[i]) : "memory");
    }
    const uint32_t filled = filled_of(load % kBarriers);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(filled),
                 "r"(count * (2 * kSize + 2) + 2 * scales)
                 : "memory");
    if (count == 0) return;
    const AdamWSlot to = slot(load / kSlotLoads % kSlots);
    const uint32_t part = load % kSlotLoads * kTeam;  // in warps
    copy(to.params + part * kValues, targets[kToParams], count * kSize, filled);
    copy(to.grads + part * kValues, address<kSize>(e.grad, element), count * kSize, filled);
    copy(to.first + part * kCodes, targets[kToCodes], count, filled);
    copy(to.second + part * kCodes, targets[kToCodes + 1], count, filled);
    if (scales == 0) return;
    copy(to.scales + part * 4, targets[kToScales], scales, filled);
    copy(to.scales + (part + kSlotWarps) * 4, targets[kToScales + 1], scales, filled);
  }

  // Until what was asked for is there.
  __device__ __forceinline__ void wait() const { barrier_wait(filled_of(barrier_), parity_); }
  // The same of one of the first loads.
  __device__ __forceinline__ void wait_for_first(uint32_t load) const { barrier_wait(filled_of(load), 0); }

  // This thread has read all that it needs of the slot.
  __device__ __forceinline__ void done() const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(readers()) : "memory");
  }
  // Whether this warp is the last of its team that is done with the slot, which then may be overwritten: one lane asks,
  // after done(). The counter only elects; the barrier orders all reads before what overwrites them.
  __device__ __forceinline__ bool is_last() const {
    constexpr uint32_t kWarps = offsetof(AdamWReaders, warps);
    uint32_t before;
    asm volatile("atom.relaxed.cta.shared::cta.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "r"(readers() + kWarps), "n"(kTeam - 1)
                 : "memory");
    if (before < kTeam - 1) return false;
    barrier_wait(readers(), parity_);
    return true;
  }

  // Brings any tile, lane by lane; each reads what it wrote.
  __device__ __forceinline__ void load(const AdamWTile& tile, const AdamWTensors& tensors) const {
    const int lane = threadIdx.x % 32;
    const AdamWEntry& e = tensors.entries[tile.t];
    uint32_t values[Format::kWords], codes[2];
    load_values<Format>(values, e.grad, tile.offset, tile.n, tile.whole, grad_type<Format>(e), lane);
    write(grads_at(), values);
    load_codes<Format>(codes, e.code[0], tile.offset, tile.n, tile.whole, lane);
    write(first_at(), codes);
    load_codes<Format>(codes, e.code[1], tile.offset, tile.n, tile.whole, lane);
    write(second_at(), codes);
    load_values<Format>(values, e.param, tile.offset, tile.n, tile.whole, param_type<Format>(e), lane);
    write(params_at(), values);
    if constexpr (kHasCopyEngine) shared_writes_fence();  // the copy engine writes there next
  }

  __device__ __forceinline__ void params(uint32_t (&words)[Format::kWords]) const { read(params_at(), words); }
  __device__ __forceinline__ void grads(uint32_t (&words)[Format::kWords]) const { read(grads_at(), words); }
  __device__ __forceinline__ void codes(uint32_t (&first)[2], uint32_t (&second)[2]) const {
    read(first_at(), first);
    read(second_at(), second);
  }
  // Of the warp's tile, of both moments.
  __device__ __forceinline__ float2 scales() const {
    const uint32_t at = slot(slot_).scales + threadIdx.x / 32 % kSlotWarps * 4;
    return {__uint_as_float(read4(at)), __uint_as_float(read4(at + kSlotWarps * 4))};
  }
  // The warp's tile among the load's elements, and where the results of these go.
  __device__ __forceinline__ uint32_t place() const { return threadIdx.x / 32 % kTeam * kAdamWTile; }
  __device__ __forceinline__ char* target(uint32_t which) const {
    char* pointer;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(pointer) : "r"(target(load_, which)) : "memory");
    return pointer;
  }

 private:
  __device__ __forceinline__ uint32_t filled_of(uint32_t barrier) const { return filled_ + barrier * 8; }
  __device__ __forceinline__ uint32_t readers() const {
    return filled_ + offsetof(AdamWSlots, readers) + barrier_ * sizeof(AdamWReaders);
  }
  __device__ __forceinline__ uint32_t target(uint32_t load, uint32_t which) const {
    constexpr uint32_t kFirst = offsetof(AdamWSlots, targets), kSize = sizeof(AdamWSlots::targets[0]);
    return filled_ + kFirst + load % kTargets * kSize + which * 8;
  }
  static __device__ __forceinline__ AdamWSlot slot(uint32_t slot) {
    return kHalves ? adamw_half_slot(slot) : adamw_float_slot(slot);
  }
  __device__ __forceinline__ void read(uint32_t from, uint32_t (&words)[Format::kWords]) const {
    put(words, 0, read16(values_ + from));
    if constexpr (Format::kWords == 8) put(words, 4, read16(values_ + from + 512));
  }
  __device__ __forceinline__ void read(uint32_t from, uint32_t (&codes)[2]) const {
    if constexpr (Format::kSplit) {
      codes[0] = read4(codes_ + from);
      codes[1] = read4(codes_ + from + 128);
    } else {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(codes[0]), "=r"(codes[1]) : "r"(codes_ + from) : "memory");
    }
  }
  // Where the slot's parameters and the others begin, or the warp's, from its own stage on.
  __device__ __forceinline__ uint32_t params_at() const { return kShared ? slot(slot_).params : 0; }
  __device__ __forceinline__ uint32_t grads_at() const { return kShared ? slot(slot_).grads : kValues; }
  __device__ __forceinline__ uint32_t first_at() const { return kShared ? slot(slot_).first : 2 * kValues; }
  __device__ __forceinline__ uint32_t second_at() const { return kShared ? slot(slot_).second : 2 * kValues + kCodes; }
  __device__ __forceinline__ void copy(uint32_t to, const void* from, uint32_t bytes, uint32_t filled) const {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(filled)
                 : "memory");
  }
  __device__ __forceinline__ void write(uint32_t to, const uint32_t (&words)[Format::kWords]) const {
    const uint32_t at = values_ + to;
#pragma unroll
    for (int i = 0; i < Format::kWords; i += 4) {
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at + i * 128), "r"(words[i]), "r"(words[i + 1]),
                   "r"(words[i + 2]), "r"(words[i + 3])
                   : "memory");
    }
  }
  __device__ __forceinline__ void write(uint32_t to, const uint32_t (&codes)[2]) const {
    const uint32_t at = codes_ + to;
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(codes[0]) : "memory");
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at + (Format::kSplit ? 128 : 4)), "r"(codes[1]) : "memory");
  }
  static __device__ __forceinline__ uint4 read16(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
  }
  static __device__ __forceinline__ uint32_t read4(uint32_t at) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
  }

  uint32_t values_, codes_;  // where the lane's lie, in a slot of its warp's or of all
  uint32_t filled_;          // the first of the slots' barriers
  uint32_t team_, load_ = 0, barrier_ = 0, parity_ = 0;
  uint32_t slot_;  // the team's own where the copy engine brings nothing
};

// The same in registers, where shared memory has no room.
template <typename Format>
class AdamWHeld {
 public:
  using Layout = AdamWLayout<DecodeTables::kOnce>;

  __device__ __forceinline__ void load(const AdamWTile& tile, const AdamWTensors& tensors) {
    const int lane = threadIdx.x % 32;
    const AdamWEntry& e = tensors.entries[tile.t];
    load_values<Format>(grad_, e.grad, tile.offset, tile.n, tile.whole, grad_type<Format>(e), lane);
    load_codes<Format>(first_, e.code[0], tile.offset, tile.n, tile.whole, lane);
    load_codes<Format>(second_, e.code[1], tile.offset, tile.n, tile.whole, lane);
    load_values<Format>(param_, e.param, tile.offset, tile.n, tile.whole, param_type<Format>(e), lane);
  }
  __device__ __forceinline__ void params(uint32_t (&words)[Format::kWords]) const { assign(words, param_); }
  __device__ __forceinline__ void grads(uint32_t (&words)[Format::kWords]) const { assign(words, grad_); }
  __device__ __forceinline__ void codes(uint32_t (&first)[2], uint32_t (&second)[2]) const {
    assign(first, first_);
    assign(second, second_);
  }

 private:
  template <int kCount>
  static __device__ __forceinline__ void assign(uint32_t (&to)[kCount], const uint32_t (&from)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = from[i];
  }

  uint32_t param_[Format::kWords], grad_[Format::kWords], first_[2], second_[2];
};

}  // namespace peftkern
