// Launches the wgmma kernels of nf4/tile.cuh: tensor maps, configuration, cluster. Free of torch.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "common/kernel_launch.h"
#include "common/tensor_map.h"
#include "nf4/matmul.h"
#include "nf4/tile.cuh"

namespace peftkern {
namespace {

struct TileMaps {
  CUtensorMap x, codes, y;
};

template <typename T, bool kDx, int kTokens, bool kSplit>
cudaError_t launch(const TileMaps& maps, const TileProblem& p, int multiprocessors, int device, cudaStream_t stream) {
  const auto kernel = nf4_tile_kernel<T, kDx, kTokens, kSplit>;
  constexpr int kShared = sizeof(TileShared<kTokens>);
  static std::atomic<uint64_t> allowed{0};
  const cudaError_t error = allow_shared_memory(kernel, kShared, device, allowed);
  if (error != cudaSuccess) return error;
  const int tiles = p.last_tile - p.first_tile;
  const int blocks = kSplit ? tiles * p.split : std::min(tiles, multiprocessors);
  const KernelLaunch launch{dim3(static_cast<unsigned>(blocks)), kTileThreads, kShared, kSplit ? p.split : 0};
  return launch_kernel(kernel, launch, stream, maps.x, maps.codes, maps.y, p);
}

template <typename T, bool kDx, int kTokens>
cudaError_t launch(const NF4Matmul& m, const TileConfig& config, int multiprocessors, int device, cudaStream_t stream) {
  const int64_t outs = kDx ? m.K : m.N, contraction = kDx ? m.N : m.K;
  TileMaps maps;
  const auto type = std::is_same<T, __half>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  cudaError_t error =
      make_tensor_map(&maps.x, {m.x, m.M, contraction, type, 2}, kTileDepth, kTokens, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(&maps.codes, {m.weight.packed, m.N, m.K / 2, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1},
                          kDx ? kTileOuts / 2 : kTileChunk * kTileDepth / 2, kDx ? kTileChunk * kTileDepth : kTileOuts,
                          kDx ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(&maps.y, {m.y, m.M, outs, type, 2}, kTileOuts / 2, kTileBatch, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  TileProblem p{m.weight,
                m.N,
                m.K,
                m.bias,
                m.M,
                outs,
                config.token_tiles,
                config.out_tiles,
                0,
                config.whole,
                static_cast<int>(tile_ceil(contraction, kTileDepth)),
                1};
  if (config.whole > 0) error = launch<T, kDx, kTokens, false>(maps, p, multiprocessors, device, stream);
  if (error != cudaSuccess || config.whole == config.tiles()) return error;
  p.first_tile = config.whole;
  p.last_tile = config.tiles();
  p.split = config.split;
  return launch<T, kDx, kTokens, true>(maps, p, multiprocessors, device, stream);
}

template <typename T, bool kDx>
cudaError_t launch(const NF4Matmul& m, const TileConfig& config, int multiprocessors, int device, cudaStream_t stream) {
  switch (config.tokens) {
    case 64:
      return launch<T, kDx, 64>(m, config, multiprocessors, device, stream);
    case 128:
      return launch<T, kDx, 128>(m, config, multiprocessors, device, stream);
    default:
      return launch<T, kDx, 256>(m, config, multiprocessors, device, stream);
  }
}

}  // namespace

cudaError_t launch_nf4_tile(const NF4Matmul& m, bool dx, const TileConfig& config, int multiprocessors,
                            cudaStream_t stream) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = prepare_thread(device);
  if (error != cudaSuccess) return error;
  if (m.dtype == ActivationDtype::kBFloat16) {
    return dx ? launch<__nv_bfloat16, true>(m, config, multiprocessors, device, stream)
              : launch<__nv_bfloat16, false>(m, config, multiprocessors, device, stream);
  }
  return dx ? launch<__half, true>(m, config, multiprocessors, device, stream)
            : launch<__half, false>(m, config, multiprocessors, device, stream);
}

}  // namespace peftkern
