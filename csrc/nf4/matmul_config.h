// Which kernel makes an NF4 matmul: a pure function, tested on the CPU through peftkern._host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "gemm/gemm_config.h"
#include "nf4/mid_m_config.h"
#include "nf4/tile_config.h"

namespace peftkern {

enum class MatmulKernel : int {
  kGemv = 0,        // nf4/gemv.cuh: any shape and dtype, a few tokens
  kSmallM = 1,      // nf4/small_m.cuh: packed bytes through mma.sync
  kMidM = 2,        // nf4/mid_m.cuh: packed bytes through wgmma, up to 128 tokens
  kTile = 3,        // nf4/tile.cuh: packed bytes through wgmma
  kDequantize = 4,  // into a scratch, then the GEMM library
};

inline constexpr int64_t kGemvMaxTokens = 8;
inline constexpr int64_t kSmallMaxTokens = 32;
// Above it the GEMM library's lead on the tensor cores outweighs one dequantize; sooner in dX, which decodes more
// slowly.
inline constexpr int64_t kTileMaxTokens = 2048, kTileMaxTokensDx = 1024;
// Of the dequantized scratch; a larger weight is dequantized and multiplied in slices of its rows.
inline constexpr int64_t kScratchBytes = int64_t{512} << 20;

struct MatmulTraits {
  int64_t M, N, K, blocksize;
  bool half;               // 16-bit activations
  bool aligned;            // x, y and the packed bytes on 16 bytes, 8-bit scales on 4, rows of x 16 n bytes
  int compute_capability;  // 10 * major + minor
  bool dx;
};

inline MatmulKernel matmul_kernel(const MatmulTraits& t) {
  const bool blocks_in_rows = t.K % 64 == 0 && t.blocksize >= 64;
  const bool fast = t.half && blocks_in_rows && t.aligned && t.compute_capability >= 80;
  const bool whole_out_rows = (t.dx ? t.K : t.N) % 8 == 0;  // of 16 n bytes, as the copy engine stores them
  const bool wgmma = fast && whole_out_rows && t.compute_capability == 90;
  // Rows and blocks of 64 are counted in 32 bits.
  const bool mid_m = wgmma && !t.dx && t.N < int64_t{1} << 31 && t.N * (t.K / 64) < int64_t{1} << 32;
  if (mid_m && t.M >= kMidMinTokens && t.M <= kMidMaxTokens) return MatmulKernel::kMidM;
  if (!t.dx && fast && t.M <= kSmallMaxTokens) return MatmulKernel::kSmallM;
  if (wgmma && t.M <= (t.dx ? kTileMaxTokensDx : kTileMaxTokens)) return MatmulKernel::kTile;
  if (!t.dx && t.M <= kGemvMaxTokens) return MatmulKernel::kGemv;
  return MatmulKernel::kDequantize;
}

// Whether the package's own GEMM multiplies the dequantized weight: with several rounds of tiles it leads the
// library's.
inline bool own_gemm(const MatmulTraits& t, int multiprocessors) {
  const int64_t tiles = tile_ceil(t.M, kGemmTokens) * tile_ceil(t.dx ? t.K : t.N, kGemmOuts);
  return t.half && t.aligned && t.compute_capability == 90 && t.N % 8 == 0 && t.K % 8 == 0 &&
         tiles >= 7 * multiprocessors;
}

// Weight rows dequantized at a time: all of them, or as many whole nested blocks as the budget holds.
inline int64_t scratch_rows(int64_t N, int64_t K, int64_t element_size, int64_t blocksize, int64_t nested_blocksize) {
  if (N * K * element_size <= kScratchBytes) return N;
  const int64_t granule = std::max<int64_t>(blocksize * std::max<int64_t>(nested_blocksize, 1), 2);
  const int64_t rows = granule / std::gcd(granule, K);
  return std::min(N, std::max<int64_t>(kScratchBytes / (rows * K * element_size), 1) * rows);
}

}  // namespace peftkern
