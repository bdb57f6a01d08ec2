// Launch configuration of the NF4 matmul for up to 64 tokens: a pure function of the problem, tested on the CPU through
// peftkern._host. The kernel (nf4/small_m.cuh) says what the pieces are.
#pragma once

#include <algorithm>
#include <cstdint>

namespace peftkern {

inline constexpr int kSmallMMaxTokens = 64;
inline constexpr int kSmallMTableBytes = 32768;    // one bf16x2 or half2 pair per byte value and bank
inline constexpr int kSmallMMapBytes = 1024;       // the 256 fp32 values that 8-bit scale codes stand for
inline constexpr int kSmallMTileRows = 16;         // rows of one mma
inline constexpr int kSmallMQuadBytes = 2048;      // codes of a tile's rows in one quad
inline constexpr int kSmallMQuadScaleBytes = 256;  // and what their scales are made from

// What a kernel is compiled for. A quad is 4 blocks of 64 weights along K: 128 bytes of a row.
struct SmallMShape {
  int token_tiles;  // of 8 tokens, whose activations stay in registers
  int quads;        // quads of K per warp and pass: a chunk is these in one tile
  int warps;        // of a CTA
  int warp_rows;    // warps side by side along the rows; the others split K
  int stages;       // chunks in flight per warp
  int min_ctas;     // per multiprocessor: limits the registers

  constexpr bool operator==(const SmallMShape& o) const {
    return token_tiles == o.token_tiles && quads == o.quads && warps == o.warps && warp_rows == o.warp_rows &&
           stages == o.stages && min_ctas == o.min_ctas;
  }
  constexpr int threads() const { return warps * 32; }
  constexpr int slices() const { return warps / warp_rows; }
  constexpr int rows() const { return kSmallMTileRows * warp_rows; }
  constexpr int tokens() const { return 8 * token_tiles; }
  constexpr int cells() const { return rows() * tokens(); }
  constexpr int stage_bytes() const { return quads * (kSmallMQuadBytes + kSmallMQuadScaleBytes); }
  constexpr int sum_floats() const { return warps * tokens() * kSmallMTileRows; }
};

struct SmallMConfig {
  SmallMShape shape;
  int cluster;       // CTAs that split K between them and meet in distributed shared memory
  int ctas_per_sm;   // of one launch: with 1 the next launch's fit beside them
  int run_ahead;     // chunks per warp fetched into L2 beyond those in flight
  int row_groups;    // clusters side by side along N, each with an even share of the rows
  int token_groups;  // of shape.tokens() tokens
  int passes;        // turns over the rows of a group, each with its own part of K
  int tiles;         // of shape.rows() rows, per group, at most
  int64_t smem;

  int64_t ctas() const { return int64_t{cluster} * row_groups * token_groups; }
};

constexpr int64_t small_m_ceil(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Everything that follows from shape, cluster, ctas_per_sm and run_ahead.
inline SmallMConfig small_m_layout(SmallMShape shape, int cluster, int ctas_per_sm, int run_ahead, int64_t M, int64_t N,
                                   int64_t K, int multiprocessors, int64_t smem_limit) {
  SmallMConfig c{shape, cluster, ctas_per_sm, run_ahead, 1, 1, 1, 1, 0};
  c.token_groups = static_cast<int>(small_m_ceil(M, shape.tokens()));
  // A Hopper GPC has 16 or 18 multiprocessors: clusters of 4 and 8 fill 16.
  const int clusters = ctas_per_sm * (cluster <= 2 ? multiprocessors / cluster : multiprocessors / 16 * (16 / cluster));
  const int64_t most_groups = small_m_ceil(N, kSmallMTileRows / 4);
  c.row_groups = static_cast<int>(std::min<int64_t>(std::max(clusters / c.token_groups, 1), most_groups));
  c.passes = static_cast<int>(small_m_ceil(K, int64_t{cluster} * shape.slices() * shape.quads * 256));
  while (true) {
    c.tiles = static_cast<int>(small_m_ceil(small_m_ceil(N, c.row_groups), shape.rows()));
    c.smem = kSmallMTableBytes + kSmallMMapBytes + int64_t{shape.warps} * shape.stages * shape.stage_bytes() +
             8 * int64_t{shape.sum_floats()};
    const int64_t tile_bytes = 4 * int64_t{shape.cells()};
    if (c.passes > 1) c.smem += c.tiles * tile_bytes;
    if (cluster > 1) c.smem += small_m_ceil(c.tiles, cluster) * cluster * tile_bytes;
    if (c.smem <= smem_limit || c.tiles == 1) return c;
    c.row_groups *= 2;  // very tall weights: the parked sums must fit, so groups take turns
  }
}

// Registers of all but the third let two CTAs share a multiprocessor of Hopper. The last is for devices with less
// shared memory per CTA than the choice by tokens wants.
inline constexpr SmallMShape kSmallM8{1, 2, 8, 1, 2, 2};
inline constexpr SmallMShape kSmallM16{2, 1, 8, 1, 3, 2};
inline constexpr SmallMShape kSmallM32{4, 1, 8, 1, 4, 1};
inline constexpr SmallMShape kSmallMCompact{2, 1, 8, 1, 2, 2};

// clusters: whether the device has them (compute capability 9.0 and up). smem_limit: bytes a CTA may ask for.
inline SmallMConfig nf4_small_m_config(int64_t M, int64_t N, int64_t K, int multiprocessors, bool clusters,
                                       int64_t smem_limit) {
  const SmallMShape shape = M <= 8 ? kSmallM8 : M <= 16 ? kSmallM16 : kSmallM32;
  // A CTA reads M * K / cluster activations of 2 bytes and about N * K / 264 bytes of weights: splitting K keeps the
  // former below the latter where rows are few.
  const int cluster = clusters && M > 8 && K > 2048 && N <= 128 * int64_t{multiprocessors} ? 2 : 1;
  // Short launches leave room for the next one to get ready; long ones want all warps of a multiprocessor.
  const bool long_launch = N * K > (int64_t{1} << 26);
  const int run_ahead = 8;
  const SmallMConfig best =
      small_m_layout(shape, cluster, long_launch ? shape.min_ctas : 1, run_ahead, M, N, K, multiprocessors, smem_limit);
  if (best.smem <= smem_limit) return best;
  return small_m_layout(kSmallMCompact, 1, 1, run_ahead, M, N, K, multiprocessors, smem_limit);
}

}  // namespace peftkern
