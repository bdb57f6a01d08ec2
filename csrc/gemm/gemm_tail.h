// The last main tiles of lora_gemm, cut up so that all blocks end together. Pure functions, tested on the CPU.
//
// Main tiles take equally long: done one by one, they leave most blocks idle while the last ones are made. So the last
// one to two tiles of each block are laid end to end, a line of steps along their contractions, and cut anew into one
// slot for each block, the longer ones for blocks that come earlier. A slot's pieces of tiles are done from its end to
// its beginning. A piece that does not end its tile leaves its sums in the workspace; the one that does adds those of
// the earlier slots, in order, and makes the outs. So each slot leaves one tile's sums at most, and waits for earlier
// slots only, which leave theirs long before: whoever holds those has drawn them before, and what it does first waits
// for nothing later.
//
// Times are in steps of a main tile: 1024 cycles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace peftkern {

inline constexpr int kGemmMaxSlots = 144;          // no sm_90 has more multiprocessors
inline constexpr int kGemmSnap = 3;                // steps next to a tile's end that cost less than its sums
inline constexpr int kGemmMinSlotSteps = 8;        // of the shortest slot, more than twice the above
inline constexpr int kGemmMaxTailSteps = 1 << 20;  // of a tile: all are counted in 32 bits
inline constexpr double kGemmTileTime = 1;         // of a main tile beside its steps
inline constexpr double kGemmCutTime = 8;          // of a slot beside its steps: sums left, and added
inline constexpr double kGemmTakeTime = 4;         // of adding the sums of one slot
inline constexpr double kGemmNever = 1e30;

// When blocks come to their first main tile, the first of them first.
struct GemmStarts {
  int count;
  double at[kGemmMaxSlots];
};

struct GemmTail {
  int tiles, count;               // that are cut up; slots
  int starts[kGemmMaxSlots + 1];  // of slots on the line; then its end
};

struct GemmPiece {
  int tile, first, steps;  // of the tail; where along the tile's contraction
  int earlier;             // slots whose sums it adds; -1: it leaves its own
  bool last;               // of the slot
};

constexpr GemmPiece gemm_piece(const GemmTail& t, int steps, int slot, int number) {
  const int from = t.starts[slot], to = t.starts[slot + 1];
  const int tile = (to - 1) / steps - number, begin = tile * steps, end = begin + steps;
  GemmPiece p{tile, (from > begin ? from : begin) - begin, 0, -1, from >= begin};
  p.steps = (to < end ? to : end) - begin - p.first;
  if (to < end) return p;
  p.earlier = 0;
  while (t.starts[slot - p.earlier] > begin) ++p.earlier;
  return p;
}

// When tiles that are not cut up are done: each block begins one after the other.
inline double gemm_whole_time(const GemmStarts& starts, int tiles, double tile) {
  double work = tiles * tile;
  int blocks = 0;
  while (blocks < starts.count && starts.at[blocks] * (blocks + 1) < work + starts.at[blocks]) {
    work += starts.at[blocks++];
  }
  const double before = work / blocks - tile;  // no more than all have begun by then
  double next[kGemmMaxSlots];
  int left = tiles;
  for (int i = 0; i < blocks; ++i) {
    const double since = before - starts.at[i];
    const int begun = since < 0 ? 0 : static_cast<int>(since / tile + 1e-6) + 1;
    left -= begun;
    next[i] = starts.at[i] + begun * tile;
  }
  if (left <= 0) return before + tile;
  left = std::min(left, blocks);
  std::nth_element(next, next + left - 1, next + blocks);
  return next[left - 1] + tile;
}

struct GemmPlan {
  GemmTail tail;
  double time;  // when all tiles are done
};

// Slots that are this long, relative to each other. One that would almost end with a tile does.
inline void gemm_lay(GemmTail& t, int steps, int tiles, int count, const double* lengths) {
  const double line = static_cast<double>(tiles) * steps;
  double all = 0, at = 0;
  for (int i = 0; i < count; ++i) all += lengths[i];
  t.tiles = tiles;
  t.count = count;
  for (int i = 0; i < count; ++i) {
    at += lengths[i];
    const int end = static_cast<int>(line * (at / all) + 0.5), within = end % steps;
    const int over = within <= kGemmSnap ? within : within >= steps - kGemmSnap ? within - steps : 0;
    t.starts[i + 1] = end - over;
  }
}

// Few tiles for many blocks.
inline GemmPlan gemm_share_few(int blocks, int tiles, int steps) {
  const int64_t line = int64_t{tiles} * steps, fours = int64_t{4} * tiles, most = line / kGemmMinSlotSteps;
  const int count = static_cast<int>(std::min({int64_t{blocks}, fours, most}));
  GemmPlan plan{{}, kGemmNever};
  if (count <= tiles) return plan;
  double lengths[kGemmMaxSlots];
  std::fill_n(lengths, count, 1.0);
  gemm_lay(plan.tail, steps, tiles, count, lengths);
  plan.time = static_cast<double>(line) / count + kGemmCutTime + static_cast<double>(count / tiles) * kGemmTakeTime;
  return plan;
}

// A tail whose slots end together, with none shorter than half a tile. Blocks that come too late for that are left out.
inline GemmPlan gemm_cut(const GemmStarts& starts, int tiles, int steps) {
  const double tile = steps + kGemmTileTime, shortest = steps / 2;
  GemmPlan plan{{}, kGemmNever};
  if (tiles == 0 || steps < 2 * kGemmMinSlotSteps || steps > kGemmMaxTailSteps) return plan;
  int blocks = 0;
  double work = tiles * tile;
  for (; blocks < starts.count; ++blocks) {
    const double start = starts.at[blocks];
    if ((start + shortest) * (blocks + 1) > work + start) break;
    work += start;
  }
  if (blocks < starts.count && starts.at[blocks] == 0) {
    const int together = static_cast<int>(std::upper_bound(starts.at, starts.at + starts.count, 0.0) - starts.at);
    return gemm_share_few(together, tiles, steps);
  }
  if (blocks == 0) return plan;
  const double end = work / blocks;  // but for what the cuts cost
  double lengths[kGemmMaxSlots];
  int64_t whole = 0;
  for (int i = 0; i < blocks; ++i) {
    const double left = end - starts.at[i];
    const int64_t before = static_cast<int64_t>((left - shortest) / tile);
    whole += before;
    lengths[i] = left - before * tile;
  }
  std::sort(lengths, lengths + blocks, std::greater<double>());
  gemm_lay(plan.tail, steps, static_cast<int>(tiles - whole), blocks, lengths);
  plan.time = end + kGemmCutTime;
  return plan;
}

}  // namespace peftkern
