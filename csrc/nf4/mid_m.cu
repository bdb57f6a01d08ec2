// Launches the wgmma kernel of nf4/mid_m.cuh: tensor maps, configuration, cluster. Free of torch.
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/kernel_launch.h"
#include "common/tensor_map.h"
#include "nf4/matmul.h"
#include "nf4/mid_m.cuh"

namespace peftkern {
namespace {

template <typename T, class Shape, bool kCluster, class Problem>
cudaError_t launch(const NF4Matmul& m, const NF4LowRank* low_rank, const MidMConfig& config, int device,
                   int multiprocessors, cudaStream_t stream) {
  const auto kernel = nf4_mid_m_kernel<T, Shape, kCluster, Problem>;
  constexpr int kShared = sizeof(MidShared<Shape>);
  constexpr int kSystemShared = 1024, kMultiprocessorShared = 228 * 1024;
  static_assert(Shape::kBlocks * (kShared + kSystemShared) <= kMultiprocessorShared, "shared memory");
  // The sums of a cluster's blocks meet where rings and table were.
  constexpr int kSums = (Shape::kTokens / 8 + Shape::kSlices * (kMidMaxSplit - 1)) * Shape::kRows * 32;
  static_assert(kSums <= offsetof(MidShared<Shape>, scales), "shared memory");
  static std::atomic<uint64_t> allowed{0};
  cudaError_t error = allow_shared_memory(kernel, kShared, device, allowed, SharedMemory::kWhole);
  if (error != cudaSuccess) return error;
  CUtensorMap x_map, code_map;
  const auto type = std::is_same<T, __half>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  // The box ends with the tokens: the copy engine takes longer to fill a row with zeros than to copy one.
  error =
      make_tensor_map(&x_map, {m.x, m.M, m.K, type, 2}, kMidDepth, static_cast<int>(m.M), CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(&code_map, {m.weight.packed, m.N, m.K / 2, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1},
                          kMidChunk * kMidDepth / 2, config.rows, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != cudaSuccess) return error;
  Problem p{};
  p.weight = m.weight;
  p.N = m.N;
  p.K = m.K;
  p.bias = m.bias;
  p.y = m.y;
  p.M = static_cast<int>(m.M);
  p.rows = config.rows;
  p.chunks = static_cast<int>(mid_m_ceil(m.K, kMidChunk * kMidDepth));
  p.split = config.split;
  p.early = m.settled && Shape::kEarly;
  p.whole_words = m.weight.absmax_codes != nullptr && m.weight.log2_blocksize == 6 &&
                  m.K % (kMidChunk * kMidDepth) == 0 && m.weight.log2_nested_blocksize >= 2;
  int blocks = config.tiles * config.split;
  if constexpr (std::is_same<Problem, MidLowRankProblem>::value) {
    p.low_rank = *low_rank;
    p.x = m.x;
    p.parts = nf4_mid_m_parts(config, m.K, low_rank->padded, multiprocessors);
    p.makers = static_cast<int>(mid_m_ceil(p.parts * (low_rank->padded / kPartRows), config.split) * config.split);
    blocks += p.makers;
  }
  const KernelLaunch launch{dim3(static_cast<unsigned>(blocks)), Shape::kThreads, kShared, kCluster ? config.split : 0};
  return launch_kernel(kernel, launch, stream, x_map, code_map, p);
}

template <typename T, const MidMShape& kShape>
cudaError_t launch(const NF4Matmul& m, const NF4LowRank* low_rank, const MidMConfig& config, int device,
                   int multiprocessors, cudaStream_t stream) {
  using Shape = MidShape<kShape>;
  if constexpr (kShape.tokens <= kMidLowRankMaxTokens) {
    if (low_rank != nullptr) {
      return config.split > 1
                 ? launch<T, Shape, true, MidLowRankProblem>(m, low_rank, config, device, multiprocessors, stream)
                 : launch<T, Shape, false, MidLowRankProblem>(m, low_rank, config, device, multiprocessors, stream);
    }
  } else if (low_rank != nullptr) {
    return cudaErrorInvalidValue;
  }
  return config.split > 1 ? launch<T, Shape, true, MidProblem>(m, nullptr, config, device, multiprocessors, stream)
                          : launch<T, Shape, false, MidProblem>(m, nullptr, config, device, multiprocessors, stream);
}

template <typename T>
cudaError_t launch(const NF4Matmul& m, const NF4LowRank* low_rank, const MidMConfig& config, int device,
                   int multiprocessors, cudaStream_t stream) {
  if (config.shape == &kMidM32Low) return launch<T, kMidM32Low>(m, low_rank, config, device, multiprocessors, stream);
  if (config.shape == &kMidM64Low) return launch<T, kMidM64Low>(m, low_rank, config, device, multiprocessors, stream);
  if (config.shape == &kMidM32) return launch<T, kMidM32>(m, low_rank, config, device, multiprocessors, stream);
  if (config.shape == &kMidM64) return launch<T, kMidM64>(m, low_rank, config, device, multiprocessors, stream);
  if (config.shape == &kMidM128) return launch<T, kMidM128>(m, low_rank, config, device, multiprocessors, stream);
  return launch<T, kMidM128High>(m, low_rank, config, device, multiprocessors, stream);
}

}  // namespace

cudaError_t launch_nf4_mid_m(const NF4Matmul& m, const NF4LowRank* low_rank, int multiprocessors, cudaStream_t stream) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = prepare_thread(device);
  if (error != cudaSuccess) return error;
  const MidMConfig config = nf4_mid_m_config(m.M, m.N, m.K, multiprocessors);
  return m.dtype == ActivationDtype::kBFloat16
             ? launch<__nv_bfloat16>(m, low_rank, config, device, multiprocessors, stream)
             : launch<__half>(m, low_rank, config, device, multiprocessors, stream);
}

}  // namespace peftkern
