// Launch configuration of the NF4 matmul for up to 32 tokens: a pure function of the problem, tested on the CPU through
// peftkern._host. The kernel (nf4/small_m.cuh) says what the pieces are.
#pragma once

#include <algorithm>
#include <cstdint>

namespace peftkern {

inline constexpr int kSmallMMaxTokens = 32;
inline constexpr int kSmallMTableBytes = 32768;    // one bf16x2 or half2 pair per byte value and bank
inline constexpr int kSmallMMapBytes = 1024;       // the 256 fp32 values that 8-bit scale codes stand for
inline constexpr int kSmallMTileRows = 16;         // rows of one mma
inline constexpr int kSmallMQuadBytes = 2048;      // codes of a tile's rows in one quad
inline constexpr int kSmallMQuadScaleBytes = 256;  // and what their scales are made from

// Shared memory of a multiprocessor of Hopper, and what the system takes of it per CTA.
inline constexpr int kSmallMMultiprocessorBytes = 228 * 1024, kSmallMSystemBytes = 1024;
// Where S is made in the matmul: a barrier, then the parts of S. A warp has 16 rows of A.
inline constexpr int kSmallMPartsOffset = 16;
inline constexpr int kSmallMLoraMaxTokens = 16, kSmallMLoraMaxRank = 128;
inline constexpr int64_t kSmallMLoraMaxShare = 65536;  // of A, in elements, that a CTA reads

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
  int ctas_per_sm;  // of one launch: with 1 the next launch's fit beside them
  int ctas;         // each with an even share of the rows
  int passes;       // turns over the rows of a CTA, each with its own part of K
  int tiles;        // of shape.rows() rows, per CTA, at most
  int cluster;      // CTAs that make a LoRA layer's S together; 0: nobody does
  int64_t smem;

  constexpr int64_t parked_bytes() const { return passes > 1 ? 4 * int64_t{tiles} * shape.cells() : 0; }
};

constexpr int64_t small_m_ceil(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// CTAs of one a multiprocessor that run at once, in clusters: larger ones leave multiprocessors of a GPC idle. Shares
// as an H100 reports them.
constexpr int64_t small_m_places(int cluster, int multiprocessors) {
  return cluster <= 2   ? multiprocessors / std::max(cluster, 1) * std::max(cluster, 1)
         : cluster == 4 ? multiprocessors * 32 / 132 * 4
                        : multiprocessors * 16 / 132 * 8;
}

// Everything that follows from shape, ctas_per_sm and cluster. part_bytes: of a CTA's part of S.
inline SmallMConfig small_m_layout(SmallMShape shape, int ctas_per_sm, int64_t N, int64_t K, int multiprocessors,
                                   int64_t smem_limit, int cluster, int64_t part_bytes) {
  SmallMConfig c{shape, ctas_per_sm, 1, 1, 1, cluster, 0};
  const int together = std::max(cluster, 1);
  const int64_t most = ctas_per_sm * small_m_places(cluster, multiprocessors);
  c.ctas = static_cast<int>(std::min(most, small_m_ceil(small_m_ceil(N, kSmallMTileRows / 4), together) * together));
  c.passes = static_cast<int>(small_m_ceil(K, int64_t{shape.slices()} * shape.quads * 256));
  while (true) {
    c.tiles = static_cast<int>(small_m_ceil(small_m_ceil(N, c.ctas), shape.rows()));
    c.smem = kSmallMTableBytes + kSmallMMapBytes + int64_t{shape.warps} * shape.stages * shape.stage_bytes() +
             8 * int64_t{shape.sum_floats()} + c.parked_bytes();
    if (cluster > 0) c.smem += kSmallMPartsOffset + cluster * part_bytes;
    if (c.smem <= smem_limit || c.tiles == 1) return c;
    c.ctas *= 2;  // very tall weights: the parked sums must fit, so CTAs take turns
  }
}

// Measured on an H100. Registers of the first two let two CTAs share a multiprocessor. The last is for devices with
// less shared memory per CTA.
inline constexpr SmallMShape kSmallM8{1, 1, 8, 1, 3, 2};
inline constexpr SmallMShape kSmallM16{2, 1, 8, 1, 2, 2};
inline constexpr SmallMShape kSmallM32{4, 1, 8, 1, 4, 1};
inline constexpr SmallMShape kSmallM32Compact{4, 1, 4, 1, 3, 1};

// smem_limit: bytes a CTA may ask for. cluster: as in SmallMConfig; part_bytes: of a CTA's part of S.
inline SmallMConfig nf4_small_m_config(int64_t M, int64_t N, int64_t K, int multiprocessors, int64_t smem_limit,
                                       int cluster = 0, int64_t part_bytes = 0) {
  // Short launches leave room for the next one to get ready beside them, long ones want all warps of a multiprocessor.
  const int ctas_per_sm = N * K <= int64_t{1} << 24 ? 1 : 2;
  const auto fits = [&](SmallMShape shape, SmallMConfig& c) {
    c = small_m_layout(shape, std::min(ctas_per_sm, shape.min_ctas), N, K, multiprocessors, smem_limit, cluster,
                       part_bytes);
    return c.smem <= smem_limit;
  };
  SmallMConfig c{};
  if (!fits(M <= 8 ? kSmallM8 : M <= 16 ? kSmallM16 : kSmallM32, c)) fits(kSmallM32Compact, c);
  return c;
}

// How many CTAs make S together where small_m does: more read less of A each, but leave multiprocessors idle. 0: S
// comes from a kernel of its own.
inline int small_m_cluster(int64_t M, int64_t N, int64_t K, int padded, int compute_capability, int multiprocessors) {
  if (compute_capability != 90 || M > kSmallMLoraMaxTokens || padded > kSmallMLoraMaxRank) return 0;
  constexpr int64_t smem_limit = kSmallMMultiprocessorBytes - 2 * kSmallMSystemBytes;
  const int64_t part_bytes = 4 * M * padded;
  for (const int cluster : {8, 4, 2}) {
    if (padded * K > cluster * kSmallMLoraMaxShare) return 0;
    const SmallMConfig c = nf4_small_m_config(M, N, K, multiprocessors, smem_limit, cluster, part_bytes);
    // The next launch's CTAs shall fit beside this one's, or two of them on a multiprocessor.
    if (2 * (c.smem + kSmallMSystemBytes) <= kSmallMMultiprocessorBytes) return cluster;
  }
  return 0;
}

}  // namespace peftkern
