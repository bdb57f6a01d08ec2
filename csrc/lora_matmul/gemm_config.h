// The LoRA matmul on wgmma: its tiles, and the order of its jobs. Pure functions, tested on the CPU.
//
// One launch does three kinds of job, taken from a counter in this order:
//   project   128 tokens of P = X P1^T, the low-rank product that the main tiles of those tokens end with
//   main      128 tokens x 256 outs of Y = X W^T + P P2^T
//   gradient  64 features of G = Z^T P over all tokens
// Projections come a group of tokens ahead of its main tiles: they are bound by memory, which the few that run at a
// time do not saturate, and leave their tokens in the L2 cache. Gradients come last: short, they fill the last round.
#pragma once

#include <cstdint>

namespace peftkern {

inline constexpr int kGemmTokens = 128;   // of a project or main tile: 64 per consumer warpgroup
inline constexpr int kGemmOuts = 256;     // of a main tile
inline constexpr int kGemmFeatures = 64;  // of a gradient tile
inline constexpr int kGemmDepth = 64;     // of the contraction per step
inline constexpr int kGemmThreads = 384;  // one producer and two consumer warpgroups
inline constexpr int kGemmStages = 4;
inline constexpr int kGemmStageBytes = (kGemmTokens + kGemmOuts) * kGemmDepth * 2;
inline constexpr int kGemmGroup = 8;  // token tiles whose main tiles share their outs, and so the L2 cache

constexpr int64_t gemm_ceil(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

enum GemmJobKind { kGemmFinish, kGemmProject, kGemmMain, kGemmGradientB, kGemmGradientA };

// What a cluster does at once; its blocks take neighbouring token tiles or feature tiles.
struct GemmJob {
  GemmJobKind kind;
  int unit;  // of token tiles, or of feature tiles
  int out_tile;
};

// Cluster c starts with main tile c - dynamic_clusters, before the operands of the low-rank terms are there; the first
// clusters and everything after go by the counter. Nobody waits for a main tile, and a counted job waits only for jobs
// counted before: progress does not depend on how many blocks are resident.
struct GemmSchedule {
  int token_units, out_tiles, group;  // units of token tiles; out_tiles 0: no main tiles
  int project;                        // 0 or 1
  int gradient_units[2];              // of B, of A
  int clusters, dynamic_clusters, static_mains;
  int lead_projects, lead_jobs;  // of the groups that the static tiles belong to
  int token_jobs;                // project and main
};

constexpr int gemm_min(int a, int b) {
  return a < b ? a : b;
}

constexpr GemmSchedule gemm_schedule(int64_t M, int64_t outs, bool project, int64_t features_b, int64_t features_a,
                                     int cluster_size, int max_clusters, int group = kGemmGroup) {
  GemmSchedule s{};
  s.token_units = static_cast<int>(gemm_ceil(M, kGemmTokens * cluster_size));
  s.out_tiles = static_cast<int>(gemm_ceil(outs, kGemmOuts));
  s.group = group / cluster_size;
  s.project = project;
  s.gradient_units[0] = static_cast<int>(gemm_ceil(features_b, kGemmFeatures * cluster_size));
  s.gradient_units[1] = static_cast<int>(gemm_ceil(features_a, kGemmFeatures * cluster_size));
  const int mains = s.token_units * s.out_tiles;
  s.token_jobs = mains + (project ? s.token_units : 0);
  s.clusters = gemm_min(max_clusters, s.token_jobs + s.gradient_units[0] + s.gradient_units[1]);
  s.dynamic_clusters = project ? gemm_min(gemm_min(s.group, s.token_units), s.clusters) : 0;
  s.static_mains = gemm_min(s.clusters - s.dynamic_clusters, mains);
  if (s.static_mains > 0) {
    const int groups = (s.static_mains - 1) / (s.group * s.out_tiles) + 1;
    const int units = gemm_min(groups * s.group, s.token_units);
    s.lead_projects = project ? units : 0;
    s.lead_jobs = s.lead_projects + units * s.out_tiles;
  }
  return s;
}

// Main tile `number` of those in order.
constexpr GemmJob gemm_main(const GemmSchedule& s, int number) {
  const int per_group = s.group * s.out_tiles, group = number / per_group, first = group * s.group;
  const int height = gemm_min(s.token_units - first, s.group), within = number - group * per_group;
  return {kGemmMain, first + within % height, within / height};
}

// Job `count` of the counter.
constexpr GemmJob gemm_job(const GemmSchedule& s, int count) {
  if (count < s.lead_projects) return {kGemmProject, count, 0};
  int at = count + s.static_mains;
  if (at < s.lead_jobs) return gemm_main(s, at - s.lead_projects);
  if (at < s.token_jobs) {
    const int per_group = s.group * (s.project + s.out_tiles), group = at / per_group, first = group * s.group;
    const int height = gemm_min(s.token_units - first, s.group), within = at - group * per_group;
    if (s.project != 0 && within < height) return {kGemmProject, first + within, 0};
    return gemm_main(s, group * s.group * s.out_tiles + within - s.project * height);
  }
  at -= s.token_jobs;
  if (at < s.gradient_units[0]) return {kGemmGradientB, at, 0};
  at -= s.gradient_units[0];
  if (at < s.gradient_units[1]) return {kGemmGradientA, at, 0};
  return {kGemmFinish, 0, 0};
}

// The skinny operands in a stage, for rank kR: their boxes, half of which each block of a cluster of two loads for
// both.
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
  // gradient: kUnits times 64 tokens of Z, then the same of P in boxes of kWidth columns
  static constexpr int kUnits = kR <= 32 ? 4 : kR <= 128 ? 2 : 1;
  static constexpr int kWidth = kR < 64 ? kR : 64;
  static constexpr int kBoxes = kR / kWidth;
  static constexpr int kBoxBytes = 64 * kWidth * 2;
  static constexpr int kGradientZ = kUnits * 64 * 128;
  static constexpr int kGradientBytes = kGradientZ + kUnits * kBoxes * kBoxBytes;
  static_assert(kProjectBytes <= kGemmStageBytes && kGradientBytes <= kGemmStageBytes && kUnits * kBoxes % 2 == 0);
};

}  // namespace peftkern
