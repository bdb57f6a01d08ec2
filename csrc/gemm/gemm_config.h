// The LoRA matmul on wgmma: its tiles, and the order of its jobs. Pure functions, tested on the CPU.
//
// One launch does three kinds of job, each with a queue of its own:
//   project   128 tokens of P = X P1^T, the low-rank product that the main tiles of those tokens end with
//   main      128 tokens x 256 outs of Y = X W^T + P P2^T
//   gradient  128 features of G = Z^T P over a part of the tokens; the last part to be done adds them up, in order
// A main tile takes long and all take equally long: they are done in rounds, and what puts blocks out of step lengthens
// the last one. So a few blocks do all projections while the others do their first main tiles, fewer go on with
// gradients for as long as there are some, and those left over fill the last round. Gradients early also spread what
// they read from memory, which in the last round alone would bound it. Where a last round would leave many blocks idle,
// the last main tiles are cut up instead (gemm_tail.h).
#pragma once

#include <cstdint>

#include "gemm/gemm_tail.h"

namespace peftkern {

inline constexpr int kGemmTokens = 128;    // of a project or main tile: 64 per consumer warpgroup
inline constexpr int kGemmOuts = 256;      // of a main tile
inline constexpr int kGemmFeatures = 128;  // of a gradient tile: 64 per consumer warpgroup
inline constexpr int kGemmDepth = 64;      // of the contraction per step
// Numbers of dropout are compared as halves, of which the larger ones are infinite or none: p up to 31/32.
inline constexpr uint32_t kLoraMaxThreshold = 0x7c00;
inline constexpr int kGemmThreads = 384;  // one producer and two consumer warpgroups
inline constexpr int kGemmStages = 4;
inline constexpr int kGemmStageBytes = (kGemmTokens + kGemmOuts) * kGemmDepth * 2;
inline constexpr int kGemmGroup = 16;  // token tiles whose main tiles share their outs, and so the L2 cache
inline constexpr int kGemmMaxParts = 4;
// Projections a block: so that all take two main tiles' time at most; with a mask to make, fewer.
inline constexpr int kGemmProjectsPerBlock = 4, kGemmMaskedProjectsPerBlock = 2;
inline constexpr int kGemmProjectsPerMain = 2;  // in a main tile's time
// In main tiles of 4096 deep: a gradient job's time, without and with a mask to make, and its share of the memory's
// time where only gradients run.
inline constexpr double kGemmGradientTime = 0.29, kGemmMaskedGradientTime = 0.42, kGemmGradientMemory = 0.005;
// In steps of a main tile: a projection's steps, and a gradient's tiles of tokens, without and with a mask to make.
// From rank 128 on the products take longer than the loads.
inline constexpr double kGemmProjectStep = 0.5, kGemmMaskedProjectStep = 0.82;
inline constexpr double kGemmGradientTokens = 1.16, kGemmMaskedGradientTokens = 1.68;
inline constexpr double kGemmGradientShare = 0.6;  // of the time until the end in which blocks are through with them
inline constexpr int kGemmPrefetches = 12;         // boxes of gradients, by each producer of the last round

constexpr int64_t gemm_ceil(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

constexpr int gemm_min(int a, int b) {
  return a < b ? a : b;
}

// Parts that a gradient's tokens are summed in: each of as many tokens as a group of main tiles, if that is not too
// many.
constexpr int gemm_parts(int64_t M) {
  return gemm_min(static_cast<int>(gemm_ceil(M, kGemmGroup * kGemmTokens)), kGemmMaxParts);
}

enum GemmJobKind { kGemmFinish, kGemmProject, kGemmMain, kGemmGradientB, kGemmGradientA };
enum GemmQueue { kProjects, kMains, kGradients };

struct alignas(16) GemmJob {
  GemmJobKind kind;
  int tile;   // of tokens, or of features
  int other;  // out tile, or part of the tokens
  // of a main tile, or a piece of one
  int steps, first;  // of the contraction; the first of them
  int slot;          // of the tail; -1: a tile that is not cut up
  int earlier;       // slots whose sums are added; -1: the sums are left to a later slot
  int last;          // of the slot
};

struct GemmWork {
  int64_t M, outs, depth;  // of the main tiles; outs 0: none
  bool project;
  int64_t features_b, features_a;  // of the gradients; 0: none
  bool masked_projects, masked_a;  // dropout's mask is made for what they read
  int rank = 16;
};

// The first project_blocks start with project b, those after lead_blocks with a main tile. Then every block draws from
// its queues: projections (only blocks that start with one), then main tiles, then gradients; the first skinny_blocks
// take gradients before main tiles. Projections wait for nothing, and blocks start in order: all others may wait for
// them.
//
// Gradients that come after the last main tiles find their features in the L2 cache: the producers of the last round
// fetch kGemmPrefetches boxes each.
struct GemmSchedule {
  int token_tiles, out_tiles;  // out_tiles 0: no main tiles
  int steps;                   // of kGemmDepth along a main tile's contraction
  int feature_tiles[2];        // of B, of A
  int parts, part_tiles;       // token tiles in a part
  int jobs[3];                 // of each queue; of the main tiles' those that are not cut up, then slots
  int whole;                   // main tiles that are not cut up
  GemmTail tail;
  int blocks, project_blocks, skinny_blocks;
  int lead_blocks, static_mains;  // blocks that do not start with a main tile; those of the others
};

// -1: as computed here.
struct GemmOptions {
  int project_blocks = -1, skinny_blocks = -1, cut = -1;
};

// Blocks that take gradients before main tiles: as many as the rounds of main tiles leave free, or one round more where
// that is shorter than the gradients left over.
constexpr int gemm_skinny_blocks(const GemmSchedule& s, const GemmWork& w) {
  const int work = s.jobs[kMains] + static_cast<int>(gemm_ceil(s.jobs[kProjects], kGemmProjectsPerMain));
  const int first = static_cast<int>(gemm_ceil(work, s.blocks));
  const double scale = 4096.0 / static_cast<double>(w.depth);
  const double a_time = w.masked_a ? kGemmMaskedGradientTime : kGemmGradientTime;
  const double all = s.parts * (s.feature_tiles[0] * kGemmGradientTime + s.feature_tiles[1] * a_time);
  const double time_each = s.jobs[kGradients] > 0 ? all / s.jobs[kGradients] : 1.0;
  double best = 1e30;
  int blocks = 0;
  for (int rounds = first; rounds > 0 && rounds <= first + 1; ++rounds) {
    const int spare = (rounds * s.blocks - work) / rounds;
    const double left = s.jobs[kGradients] - spare * rounds / (time_each * scale);
    const double time = rounds + (left > 0 ? left * kGemmGradientMemory * scale : 0);
    if (time < best) {
      best = time;
      blocks = spare;
    }
  }
  return blocks;
}

// The blocks by when they come to their first main tile.
struct GemmTimes {
  double project, gradients;  // a job's; all jobs'
};

constexpr GemmTimes gemm_times(const GemmSchedule& s, const GemmWork& w) {
  const double wide = w.rank / 256.0;  // of a main tile's products
  const auto longer = [](double a, double b) { return a > b ? a : b; };
  const double project = longer(w.masked_projects ? kGemmMaskedProjectStep : kGemmProjectStep, wide) * s.steps;
  const double b = longer(kGemmGradientTokens, 2 * wide) * s.part_tiles;
  const double a = longer(w.masked_a ? kGemmMaskedGradientTokens : kGemmGradientTokens, 2 * wide) * s.part_tiles;
  return {project, s.parts * (s.feature_tiles[0] * b + s.feature_tiles[1] * a)};
}

inline GemmStarts gemm_starts(const GemmSchedule& s, const GemmTimes& t, int skinny) {
  const int both = gemm_min(skinny, s.project_blocks);
  const double project = s.project_blocks > 0 ? s.jobs[kProjects] * t.project / s.project_blocks : 0.0;
  const int jobs = s.jobs[kGradients];
  GemmStarts starts{s.blocks, {}};
  for (int i = 0; i < skinny; ++i) {
    const int own = jobs / skinny + (i < jobs % skinny ? 1 : 0);
    starts.at[i] = both * project / skinny + own * t.gradients / jobs;
  }
  for (int i = skinny; i < s.project_blocks; ++i) starts.at[i] = project;
  std::sort(starts.at, starts.at + starts.count);
  return starts;
}

// Cuts main tiles up where that is faster. skinny: the blocks that take gradients first
// where none is.
inline void gemm_choose_tail(GemmSchedule& s, const GemmWork& w, int mains, int skinny, const GemmOptions& options) {
  s.skinny_blocks = skinny;
  s.whole = mains;
  if (mains == 0 || options.cut == 0 || s.blocks > kGemmMaxSlots) return;
  const GemmTimes t = gemm_times(s, w);
  const double tile = s.steps + kGemmTileTime;
  const double projected =
      s.jobs[kProjects] > 0 ? gemm_ceil(s.jobs[kProjects], s.project_blocks) * t.project + kGemmTileTime : 0.0;
  double whole = std::max(gemm_whole_time(gemm_starts(s, t, skinny), mains, tile), projected);
  const double left = t.gradients - skinny * whole;
  if (left > 0) whole += left / t.gradients * s.jobs[kGradients] * kGemmGradientMemory * 4096 / kGemmDepth;
  const bool masked = w.masked_a && w.outs > 0;  // whose last pieces would wait for bits
  if (options.cut < 0 && masked) return;
  const double all = (mains * tile + s.jobs[kProjects] * t.project + t.gradients) / s.blocks;
  int cut_skinny = t.gradients > 0 ? static_cast<int>(t.gradients / (kGemmGradientShare * all)) + 1 : 0;
  if (options.skinny_blocks >= 0) cut_skinny = skinny;
  cut_skinny = gemm_min(cut_skinny, s.blocks / 2);
  const GemmPlan plan = gemm_cut(gemm_starts(s, t, cut_skinny), mains, s.steps);
  const double time = std::max(plan.time, projected);
  if (plan.tail.count == 0 || (options.cut < 0 && time >= whole)) return;
  s.skinny_blocks = cut_skinny;
  s.whole = mains - plan.tail.tiles;
  s.tail = plan.tail;
}

// Few, but so many that the first main tiles find theirs done.
constexpr int gemm_project_blocks(const GemmSchedule& s, const GemmWork& w) {
  const int projects = s.jobs[kProjects], first = gemm_min(projects, kGemmGroup);
  if (2 * s.jobs[kMains] <= s.blocks) return projects;
  const int most = w.masked_projects ? kGemmMaskedProjectsPerBlock : kGemmProjectsPerBlock;
  const int in_time = w.masked_projects || w.rank > 128 ? 1 : kGemmProjectsPerMain;
  return static_cast<int>(std::max(gemm_ceil(projects, most), gemm_ceil(first, in_time)));
}

inline GemmSchedule gemm_schedule(const GemmWork& w, int max_blocks, const GemmOptions& options = {}) {
  GemmSchedule s{};
  s.token_tiles = static_cast<int>(gemm_ceil(w.M, kGemmTokens));
  s.out_tiles = static_cast<int>(gemm_ceil(w.outs, kGemmOuts));
  s.steps = static_cast<int>(gemm_ceil(w.depth, kGemmDepth));
  s.feature_tiles[0] = static_cast<int>(gemm_ceil(w.features_b, kGemmFeatures));
  s.feature_tiles[1] = static_cast<int>(gemm_ceil(w.features_a, kGemmFeatures));
  s.part_tiles = static_cast<int>(gemm_ceil(s.token_tiles, gemm_parts(w.M)));
  s.parts = static_cast<int>(gemm_ceil(s.token_tiles, s.part_tiles));
  const int projects = w.project ? s.token_tiles : 0, mains = s.token_tiles * s.out_tiles;
  s.jobs[kProjects] = projects;
  s.jobs[kMains] = mains;
  s.jobs[kGradients] = s.parts * (s.feature_tiles[0] + s.feature_tiles[1]);
  const int jobs = projects + mains + s.jobs[kGradients];
  s.blocks = jobs > 0 ? max_blocks : 0;
  if (s.blocks == 0) return s;
  int skinny = options.skinny_blocks < 0 ? gemm_skinny_blocks(s, w) : gemm_min(options.skinny_blocks, s.blocks);
  if (s.jobs[kGradients] == 0) skinny = 0;
  const int project_blocks = gemm_project_blocks(s, w);
  s.project_blocks = mains == 0 ? projects : options.project_blocks < 0 ? project_blocks : options.project_blocks;
  s.project_blocks = gemm_min(gemm_min(std::max(s.project_blocks, 1), projects), s.blocks);
  gemm_choose_tail(s, w, mains, skinny, options);
  s.jobs[kMains] = s.whole + s.tail.count;
  s.blocks = gemm_min(s.blocks, projects + s.jobs[kMains] + s.jobs[kGradients]);
  s.project_blocks = gemm_min(s.project_blocks, s.blocks);
  s.skinny_blocks = gemm_min(s.skinny_blocks, s.blocks);
  s.lead_blocks = s.project_blocks > s.skinny_blocks ? s.project_blocks : s.skinny_blocks;
  s.static_mains = gemm_min(s.blocks - s.lead_blocks, s.jobs[kMains]);
  return s;
}

// Main tile `number` of those in order.
constexpr GemmJob gemm_tile(const GemmSchedule& s, int number) {
  const int per_group = kGemmGroup * s.out_tiles, group = number / per_group, first = group * kGemmGroup;
  const int height = gemm_min(s.token_tiles - first, kGemmGroup), within = number - group * per_group;
  return {kGemmMain, first + within % height, within / height, s.steps, 0, -1, 0, true};
}

constexpr GemmJob gemm_slot(const GemmSchedule& s, int slot, int number) {
  const GemmPiece piece = gemm_piece(s.tail, s.steps, slot, number);
  GemmJob job = gemm_tile(s, s.whole + piece.tile);
  job.steps = piece.steps;
  job.first = piece.first;
  job.slot = slot;
  job.earlier = piece.earlier;
  job.last = piece.last;
  return job;
}

// Job `number` of the main tiles' queue; of a slot its first piece.
constexpr GemmJob gemm_main(const GemmSchedule& s, int number) {
  return number < s.whole ? gemm_tile(s, number) : gemm_slot(s, number - s.whole, 0);
}

constexpr GemmJob gemm_gradient(const GemmSchedule& s, int number) {
  const int b = s.feature_tiles[0], a = s.feature_tiles[1];
  const int part = number / (a + b), within = number % (a + b);
  if (within < a) return {kGemmGradientA, within, part, 0, 0, -1, 0, true};
  return {kGemmGradientB, within - a, part, 0, 0, -1, 0, true};
}

// Job `count` of a queue's counter.
constexpr GemmJob gemm_job(const GemmSchedule& s, int queue, int count) {
  const int number = count + (queue == kProjects ? s.project_blocks : queue == kMains ? s.static_mains : 0);
  if (number >= s.jobs[queue]) return {kGemmFinish, 0, 0, 0, 0, -1, 0, true};
  if (queue == kProjects) return {kGemmProject, number, 0, 0, 0, -1, 0, true};
  return queue == kMains ? gemm_main(s, number) : gemm_gradient(s, number);
}

// The skinny operands in a stage, for rank kR.
template <int kR>
struct GemmSkinny {
  static_assert(kR == 16 || kR == 32 || kR == 64 || kR == 128 || kR == 256);
  // project: X as boxes of 64 columns, then two boxes of P1, side by side along the contraction or along the rank
  static constexpr int kProjectColumns = kR <= 64 ? 2 : 1;  // times 64
  static constexpr int kProjectRows = kR <= 64 ? kR : kR / 2;
  static constexpr int kProjectX = kProjectColumns * kGemmTokens * 128;
  static constexpr int kProjectBytes = kProjectX + 2 * kProjectRows * 128;
  // extension: steps of 64 along the rank
  static constexpr int kExtensionSteps = (kR + 63) / 64;
  static constexpr int kExtensionProducts = kR < 64 ? kR / 16 : 4;  // per step, of depth 16
  // gradient: two boxes of 64 features of Z, then P in boxes of kWidth columns, all of kTokens
  static constexpr int kTokens = kR <= 64 ? 128 : 64;
  static constexpr int kWidth = kR < 64 ? kR : 64;
  static constexpr int kBoxes = kR / kWidth;
  static constexpr int kBoxBytes = kTokens * kWidth * 2;
  static constexpr int kZBytes = kTokens * 128;  // a box of Z
  static constexpr int kGradientBytes = 2 * kZBytes + kBoxes * kBoxBytes;
  static_assert(kProjectBytes <= kGemmStageBytes && kGradientBytes <= kGemmStageBytes);
};

}  // namespace peftkern
