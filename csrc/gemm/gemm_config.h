// The LoRA matmul on wgmma: its tiles, and the order of its jobs. Pure functions, tested on the CPU.
//
// One launch does three kinds of job, each with a queue of its own:
//   project   128 tokens of P = X P1^T, the low-rank product that the main tiles of those tokens end with
//   main      128 tokens x 256 outs of Y = X W^T + P P2^T
//   gradient  128 features of G = Z^T P over a part of the tokens; the last part to be done adds them up, in order
// In a backward pass of small rank, which reads dy for D as for dB, a project job of 256 tokens makes both (fused): a
// block leaves one sum of dB for all its jobs, and a job each 128 features adds up the blocks' sums:
//   sum       128 features of dB
// A launch may be of several linear layers on one x (kGemmMaxLayers at most): their main tiles and gradients of B lie
// one layer's after the other's. Forward, a project job makes P for all of them, whose columns lie side by side;
// backward, it is one layer's, and a main tile's contraction goes over all layers. A main tile takes long and all take
// equally long: they are done in rounds, and what puts blocks out of step lengthens the last one. So a few blocks do
// all projections while the others do their first main tiles, fewer go on with gradients for as long as there are some,
// and those left over fill the last round. Gradients early also spread what they read from memory, which in the last
// round alone would bound it.
#pragma once

#include <cstdint>

namespace peftkern {

inline constexpr int kGemmTokens = 128;    // of a project or main tile: 64 per consumer warpgroup
inline constexpr int kGemmOuts = 256;      // of a main tile
inline constexpr int kGemmFeatures = 128;  // of a gradient tile: 64 per consumer warpgroup
inline constexpr int kGemmDepth = 64;      // of the contraction per step
// p up to 31/32 by the kernel; larger ones are for pieces.
inline constexpr uint32_t kLoraMaxThreshold = 0x7c00;
inline constexpr int kGemmBeyond = 1 << 16;  // a column that no P has
inline constexpr int kGemmThreads = 384;     // one producer and two consumer warpgroups
inline constexpr int kGemmStages = 4;
inline constexpr int kGemmStageBytes = (kGemmTokens + kGemmOuts) * kGemmDepth * 2;
inline constexpr int kGemmGroup = 16;  // token tiles whose main tiles share their outs, and so the L2 cache
inline constexpr int kGemmMaxParts = 4;
inline constexpr int kGemmMaxLayers = 4;
// Fused project jobs: their token tiles, and the blocks that do them. One takes a main tile's time, and the first main
// tiles need those of a group by their end: so there are kGemmMinFusedBlocks, or as many more as do them in half of the
// rounds of main tiles where few outs make few rounds: kGemmFusedBlocksOuts over the outs, of 132 multiprocessors.
inline constexpr int kGemmFusedTiles = 2, kGemmMinFusedBlocks = 8, kGemmMaxFusedBlocks = 16;
inline constexpr int64_t kGemmFusedBlocksOuts = 32768;
// Bytes of the sums of dB that kGemmMinFusedBlocks leave.
inline constexpr int kGemmMaxFusedRank = 16, kGemmMaxFusedBytes = 12 << 20;
// Projections a block: so that all take two main tiles' time at most; with a mask to make, fewer.
inline constexpr int kGemmProjectsPerBlock = 4, kGemmMaskedProjectsPerBlock = 2;
inline constexpr int kGemmProjectsPerMain = 2;  // in a main tile's time
// In main tiles of 4096 deep: a gradient job's time, without and with a mask to make, and its share of the memory's
// time where only gradients run.
inline constexpr double kGemmGradientTime = 0.29, kGemmMaskedGradientTime = 0.42, kGemmGradientMemory = 0.005;
inline constexpr int kGemmPrefetches = 12;  // boxes of gradients, by each producer of the last round

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

// Whether the kernels for ranks up to kR, of all layers together, hold fused jobs.
constexpr bool gemm_may_fuse(int kR, int layers) {
  return kR <= layers * kGemmMaxFusedRank;
}

constexpr int gemm_fused_blocks(int64_t M, int64_t outs) {
  const int half = static_cast<int>(gemm_ceil(kGemmFusedBlocksOuts, outs));
  const int blocks = half > kGemmMinFusedBlocks ? gemm_min(half, kGemmMaxFusedBlocks) : kGemmMinFusedBlocks;
  return gemm_min(static_cast<int>(gemm_ceil(M, kGemmFusedTiles * kGemmTokens)), blocks);
}

// Whether a backward pass whose layers have at most this rank, and whose dB have `features` rows in all, makes them in
// its project jobs. outs: dx's columns.
constexpr bool gemm_fuses(int64_t M, int64_t outs, int rank, int64_t features) {
  const int64_t blocks = gemm_min(gemm_fused_blocks(M, outs), kGemmMinFusedBlocks);
  return rank <= kGemmMaxFusedRank && blocks * features * kGemmMaxFusedRank * 4 <= kGemmMaxFusedBytes;
}

enum GemmJobKind { kGemmFinish, kGemmProject, kGemmMain, kGemmGradientB, kGemmGradientA, kGemmSum };
enum GemmQueue { kProjects, kMains, kGradients };

struct GemmJob {
  GemmJobKind kind;
  int tile;   // of tokens (two of them in a fused project job), or of features
  int other;  // out tile, part of the tokens, or how many of its layer's project jobs its block has done before
  int layer = 0;
};

// A size of each layer, or of all as one.
struct GemmSizes {
  int64_t of[kGemmMaxLayers]{};
  int count = 0;
  constexpr GemmSizes() = default;
  constexpr GemmSizes(int64_t size) : of{size}, count(1) {}  // NOLINT: a size is a list of one
  constexpr void add(int64_t size) { of[count++] = size; }
};

struct GemmWork {
  int64_t M;
  GemmSizes outs;        // of the main tiles; 0: none
  int64_t depth;         // of their contraction
  int projects;          // project jobs for the same tokens: 1, or one a layer; 0: none
  GemmSizes features_b;  // of the gradients; 0: none
  int64_t features_a;
  bool masked_projects, masked_a;  // dropout's mask is made for what they read
  bool fused = false;              // project jobs make the gradient of B, too
};

// Tiles of several layers, numbered through.
struct GemmTiles {
  int ends[kGemmMaxLayers]{};
  int all = 0;
};

struct GemmPlace {
  int layer, tile;
};

// Block b of the first project_blocks starts with every project_blocks-th projection, those after lead_blocks with a
// main tile. Then every block draws from its queues: main tiles, then gradients; the first skinny_blocks take gradients
// before main tiles. Projections wait for nothing, and blocks start in order: all others may wait for them.
//
// Gradients that come after the last main tiles find their features in the L2 cache: the producers of the last round
// fetch kGemmPrefetches boxes each.
struct GemmSchedule {
  int token_tiles;
  GemmTiles outs;  // none: no main tiles
  GemmTiles features_b;
  int features_a;
  int parts, part_tiles;  // token tiles in a part
  int projects;           // project jobs for the same tokens
  int project_tiles;      // jobs' token tiles, in pairs if they are fused
  bool fused;
  int jobs[3];  // of each queue
  int blocks, project_blocks, skinny_blocks;
  int lead_blocks, static_mains;  // blocks that do not start with a main tile; those of the others
};

constexpr GemmTiles gemm_tiles(const GemmSizes& sizes, int tile) {
  GemmTiles tiles{};
  for (int i = 0; i < kGemmMaxLayers; ++i) {
    if (i < sizes.count) tiles.all += static_cast<int>(gemm_ceil(sizes.of[i], tile));
    tiles.ends[i] = tiles.all;
  }
  return tiles;
}

constexpr GemmPlace gemm_place(const GemmTiles& tiles, int number) {
  int layer = 0, first = 0;
  for (int i = 0; i + 1 < kGemmMaxLayers; ++i) {
    if (number < tiles.ends[i]) break;
    layer = i + 1;
    first = tiles.ends[i];
  }
  return {layer, number - first};
}

// Blocks that take gradients before main tiles: as many as the rounds of main tiles leave free, or one round more where
// that is shorter than the gradients left over.
constexpr int gemm_skinny_blocks(const GemmSchedule& s, const GemmWork& w) {
  if (s.jobs[kGradients] == 0) return 0;
  const int per_main = s.projects * (s.fused ? 1 : kGemmProjectsPerMain);
  const int work = s.jobs[kMains] + (per_main == 0 ? 0 : static_cast<int>(gemm_ceil(s.jobs[kProjects], per_main)));
  const int first = static_cast<int>(gemm_ceil(work, s.blocks));
  const double scale = 4096.0 / static_cast<double>(w.depth);
  const double a_time = w.masked_a ? kGemmMaskedGradientTime : kGemmGradientTime;
  const double b_time = s.fused ? 0 : s.features_b.all * kGemmGradientTime;
  const double all = s.parts * (b_time + s.features_a * a_time);
  const double time_each = all / s.jobs[kGradients];
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

// As few as keep up with the main tiles; unmasked, so many that those of the first group find theirs done, and where
// main tiles leave most blocks idle, all at once.
constexpr int gemm_project_blocks(const GemmSchedule& s, const GemmWork& w) {
  const int projects = s.jobs[kProjects], mains = s.jobs[kMains];
  if (s.fused) return gemm_fused_blocks(w.M, w.outs.of[0]);
  if (mains == 0 || (!w.masked_projects && 2 * mains <= s.blocks)) return projects;
  if (w.masked_projects) return static_cast<int>(gemm_ceil(projects, kGemmMaskedProjectsPerBlock));
  const int keep_up = static_cast<int>(gemm_ceil(s.project_tiles, kGemmProjectsPerBlock));
  const int first = static_cast<int>(gemm_ceil(gemm_min(s.project_tiles, kGemmGroup), kGemmProjectsPerMain));
  return keep_up > first ? keep_up : first;
}

constexpr GemmSchedule gemm_schedule(const GemmWork& w, int max_blocks) {
  GemmSchedule s{};
  s.token_tiles = static_cast<int>(gemm_ceil(w.M, kGemmTokens));
  s.outs = gemm_tiles(w.outs, kGemmOuts);
  s.features_b = gemm_tiles(w.features_b, kGemmFeatures);
  s.features_a = static_cast<int>(gemm_ceil(w.features_a, kGemmFeatures));
  s.part_tiles = static_cast<int>(gemm_ceil(s.token_tiles, gemm_parts(w.M)));
  s.parts = static_cast<int>(gemm_ceil(s.token_tiles, s.part_tiles));
  s.fused = w.fused;
  s.projects = w.projects;
  s.project_tiles = static_cast<int>(gemm_ceil(s.token_tiles, s.fused ? kGemmFusedTiles : 1));
  s.jobs[kProjects] = s.projects * s.project_tiles;
  s.jobs[kMains] = s.token_tiles * s.outs.all;
  s.jobs[kGradients] = (s.fused ? 1 : s.parts) * s.features_b.all + s.parts * s.features_a;
  s.blocks = gemm_min(max_blocks, s.jobs[kProjects] + s.jobs[kMains] + s.jobs[kGradients]);
  const int projects = s.jobs[kProjects], mains = s.jobs[kMains];
  s.project_blocks = gemm_project_blocks(s, w);
  if (s.blocks == 0) return s;
  if (s.project_blocks == 0) s.project_blocks = 1;
  s.project_blocks = gemm_min(gemm_min(s.project_blocks, projects), s.blocks);
  s.skinny_blocks = gemm_min(gemm_skinny_blocks(s, w), s.blocks);
  s.lead_blocks = s.project_blocks > s.skinny_blocks ? s.project_blocks : s.skinny_blocks;
  s.static_mains = gemm_min(s.blocks - s.lead_blocks, mains);
  return s;
}

// Block `number` % project_blocks does project job `number`. A fused one's block does all layers of its tokens, so that
// each block leaves a sum of every layer's dB.
constexpr GemmJob gemm_project(const GemmSchedule& s, int number) {
  if (!s.fused) {
    if (number >= s.jobs[kProjects]) return {kGemmFinish, 0, 0};
    return {kGemmProject, number / s.projects, 0, number % s.projects};
  }
  const int turn = number / s.project_blocks, round = turn / s.projects;
  const int tile = round * s.project_blocks + number % s.project_blocks;
  if (tile >= s.project_tiles) return {kGemmFinish, 0, 0};
  return {kGemmProject, tile, round, turn % s.projects};
}

// Main tile `number` of those in order.
constexpr GemmJob gemm_main(const GemmSchedule& s, int number) {
  const int per_group = kGemmGroup * s.outs.all, group = number / per_group, first = group * kGemmGroup;
  const int height = gemm_min(s.token_tiles - first, kGemmGroup), within = number - group * per_group;
  const GemmPlace out = gemm_place(s.outs, within / height);
  return {kGemmMain, first + within % height, out.tile, out.layer};
}

constexpr GemmJob gemm_gradient(const GemmSchedule& s, int number) {
  const int b = s.features_b.all, a = s.features_a;
  if (s.fused) {
    const int sum = number - s.parts * a;
    if (sum < 0) return {kGemmGradientA, number % a, number / a};
    const GemmPlace place = gemm_place(s.features_b, sum);
    return {kGemmSum, place.tile, 0, place.layer};
  }
  const int part = number / (a + b), within = number % (a + b);
  if (within < a) return {kGemmGradientA, within, part};
  const GemmPlace place = gemm_place(s.features_b, within - a);
  return {kGemmGradientB, place.tile, part, place.layer};
}

// Job `count` of a queue's counter; of projects, the one after job `count` in its block.
constexpr GemmJob gemm_job(const GemmSchedule& s, int queue, int count) {
  if (queue == kProjects) return gemm_project(s, count + s.project_blocks);
  const int number = count + (queue == kMains ? s.static_mains : 0);
  if (number >= s.jobs[queue]) return {kGemmFinish, 0, 0};
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
  // extension: steps of 64 along the rank; of several layers, as many products as their ranks need
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
  // P1 as it is stored, in a backward pass: boxes of kWidth columns for each 64 of the contraction
  static constexpr int kP1Box = 64 * kWidth * 2;
  // fused project: 64 columns of X for all its tokens, then of P1
  static constexpr bool kFuses = kR <= kGemmMaxFusedRank;
  static constexpr int kFusedX = kGemmFusedTiles * kGemmTokens * 128;
  static constexpr int kFusedBytes = kFusedX + kP1Box;
  static constexpr int kFusedProduct = kGemmFusedTiles * kBoxBytes;  // S of its tokens
  static_assert(!kFuses || kFusedBytes <= kGemmStageBytes);
};

// Where column k of P1 lies for masked projections: thread q of four multiplies columns 16 q to 16 q + 15 of a box of
// X, four in each of four steps, there as columns 2 q, 2 q + 1, 8 + 2 q and 9 + 2 q of the step's 16.
constexpr int gemm_fragment_column(int k) {
  return k / 64 * 64 + k / 4 % 4 * 16 + k / 2 % 2 * 8 + k / 16 % 4 * 2 + k % 2;
}

}  // namespace peftkern
