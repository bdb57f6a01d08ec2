// One NF4 matmul as its kernels take it, and the kernels' launchers. Free of torch.
#pragma once

#include <cuda_runtime.h>

#include "nf4/decode.cuh"
#include "nf4/low_rank.h"
#include "nf4/tile_config.h"

namespace peftkern {

enum class ActivationDtype { kBFloat16, kFloat16, kFloat32 };

// y [M, N] = x [M, K] @ weight [N, K].T + bias [N], or dX: y [M, K] = x [M, N] @ weight [N, K]. All row-major and
// contiguous, bias (or null) in x's dtype.
struct NF4Matmul {
  const void* x;
  NF4DeviceWeight weight;
  const void* bias;
  void* y;
  int64_t M, N, K;
  ActivationDtype dtype;
  bool settled;  // no earlier kernel that may still be running writes the weight: it may be read at once
};

// nf4/small_m.cu: up to 32 tokens, tensor cores (mma.sync, sm_80+). K % 64 == 0, block >= 64, 16-bit activations.
// low_rank: or null.
cudaError_t launch_nf4_small_m(const NF4Matmul& problem, const NF4LowRank* low_rank, int multiprocessors,
                               cudaStream_t stream);

// nf4/small_m_lora.cu: the same up to 16 tokens with low_rank, whose S it makes by `cluster` CTAs together. sm_90a.
cudaError_t launch_nf4_small_m_lora(const NF4Matmul& problem, const NF4LowRank& low_rank, int cluster,
                                    int multiprocessors, cudaStream_t stream);

// nf4/gemv.cu: any K, blocksize and dtype, a few tokens, no tensor cores.
cudaError_t launch_nf4_gemv(const NF4Matmul& problem, int multiprocessors, cudaStream_t stream);

// nf4/mid_m.cu: up to 128 tokens, wgmma (sm_90a). K % 64 == 0, N % 8 == 0, block >= 64, 16-bit activations, rows of x
// of 16 n bytes. low_rank: or null, up to 64 tokens.
cudaError_t launch_nf4_mid_m(const NF4Matmul& problem, const NF4LowRank* low_rank, int multiprocessors,
                             cudaStream_t stream);

// nf4/tile.cu: many tokens, wgmma (sm_90a). K % 64 == 0, block >= 64, 16-bit activations, rows of x of 16 n bytes.
cudaError_t launch_nf4_tile(const NF4Matmul& problem, bool dx, const TileConfig& config, int multiprocessors,
                            cudaStream_t stream);

}  // namespace peftkern
