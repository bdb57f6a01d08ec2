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

#include <cstdint>

namespace peftkern {

inline constexpr int kGemmMaxSlots = 144;          // no sm_90 has more multiprocessors
inline constexpr int kGemmSnap = 3;                // steps next to a tile's end that cost less than its sums
inline constexpr int kGemmMinSlotSteps = 8;        // of the shortest slot, more than twice the above
inline constexpr int kGemmMaxTailSteps = 1 << 20;  // of a tile: all are counted in 32 bits
inline constexpr double kGemmTileTime = 1;         // of a main tile beside its steps
inline constexpr double kGemmCutTime = 8;          // of a slot beside its steps: sums left, and added
inline constexpr double kGemmTakeTime = 4;         // of adding the sums of one slot
inline constexpr int kGemmCrews = 3;

// Blocks that come to their first main tile at the same time.
struct GemmCrew {
  int blocks;
  double start;
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

// Tiles that have been begun at a time, if each block begins one after the other.
constexpr int64_t gemm_begun(const GemmCrew (&crews)[kGemmCrews], double tile, double time) {
  int64_t begun = 0;
  for (const GemmCrew& c : crews) {
    if (time >= c.start) begun += c.blocks * (static_cast<int64_t>((time - c.start) / tile + 1e-3) + 1);
  }
  return begun;
}

// When tiles that are not cut up are done.
constexpr double gemm_whole_time(const GemmCrew (&crews)[kGemmCrews], int tiles, double tile) {
  double best = 1e30;
  for (const GemmCrew& c : crews) {
    if (c.blocks == 0) continue;
    int64_t few = -1, enough = tiles;
    while (enough - few > 1) {
      const int64_t middle = (few + enough) / 2;
      (gemm_begun(crews, tile, c.start + middle * tile) >= tiles ? enough : few) = middle;
    }
    const double end = c.start + (enough + 1) * tile;
    if (end < best) best = end;
  }
  return best;
}

struct GemmPlan {
  GemmTail tail;
  double time;  // when all tiles are done
};

// Adds slots, equally long, that end where `end` is on the line. A slot ends with a tile that it would almost end.
constexpr void gemm_add_slots(GemmTail& t, int steps, int count, int64_t end) {
  const int64_t from = t.starts[t.count];
  for (int i = 1; i <= count; ++i) {
    const int64_t at = from + (end - from) * i / count, within = at % steps;
    const int64_t over = within <= kGemmSnap ? within : within >= steps - kGemmSnap ? within - steps : 0;
    t.starts[++t.count] = static_cast<int>(at - over);
  }
}

// Few tiles for many blocks: those that are there from the start share them.
constexpr GemmPlan gemm_share_few(int blocks, int tiles, int steps) {
  int64_t count = int64_t{4} * tiles;
  const int64_t most = int64_t{tiles} * steps / kGemmMinSlotSteps;
  if (count > most) count = most;
  if (count > blocks) count = blocks;
  if (count <= tiles) return {{}, 1e30};
  const double each = static_cast<double>(tiles) * steps / count;
  const double takes = static_cast<double>(static_cast<int64_t>(steps / each));
  GemmPlan plan{{tiles, 0, {}}, each + kGemmCutTime + takes * kGemmTakeTime};
  gemm_add_slots(plan.tail, steps, static_cast<int>(count), int64_t{tiles} * steps);
  return plan;
}

// A tail whose slots end together, with none shorter than half a tile. Crews in the order of their starts, the first at
// 0; those that come too late are left out.
constexpr GemmPlan gemm_cut(const GemmCrew (&crews)[kGemmCrews], int tiles, int steps) {
  constexpr GemmPlan kNone{{}, 1e30};
  const double tile = steps + kGemmTileTime, shortest = steps / 2;
  if (tiles == 0 || steps < 2 * kGemmMinSlotSteps || steps > kGemmMaxTailSteps) return kNone;
  if (tiles * tile < crews[0].blocks * shortest) return gemm_share_few(crews[0].blocks, tiles, steps);
  GemmCrew taking[kGemmCrews]{};
  int count = 0, blocks = 0;
  double end = 0, work = tiles * tile;  // end: without what the cuts cost
  for (const GemmCrew& c : crews) {
    if (c.blocks == 0) continue;
    const double with = (work + c.blocks * c.start) / (blocks + c.blocks);
    if (c.start + shortest > with) break;
    taking[count++] = c;
    blocks += c.blocks;
    work += c.blocks * c.start;
    end = with;
  }
  if (blocks == 0 || blocks > kGemmMaxSlots) return kNone;
  double length[kGemmCrews]{}, lengths = 0;
  int64_t whole = 0;
  for (int i = 0; i < count; ++i) {
    const double left = end - taking[i].start;
    const int64_t before = static_cast<int64_t>((left - shortest) / tile);
    whole += before * taking[i].blocks;
    length[i] = left - before * tile;
    lengths += length[i] * taking[i].blocks;
  }
  GemmPlan plan{{static_cast<int>(tiles - whole), 0, {}}, end + kGemmCutTime};
  const double line = static_cast<double>(plan.tail.tiles) * steps;
  double at = 0;
  for (int place = 0; place < count; ++place) {  // the longest first
    int next = 0;
    for (int i = 1; i < count; ++i) {
      if (length[i] > length[next]) next = i;
    }
    at += length[next] * taking[next].blocks;
    gemm_add_slots(plan.tail, steps, taking[next].blocks, static_cast<int64_t>(line * (at / lengths) + 0.5));
    length[next] = -1;
  }
  return plan;
}

}  // namespace peftkern
