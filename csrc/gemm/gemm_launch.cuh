// Launches lora_prepare and lora_gemm: tensor maps, operands in the workspace. Free of torch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "common/tensor_map.h"
#include "gemm/gemm.cuh"
#include "gemm/gemm.h"
#include "gemm/prepare.cuh"

namespace peftkern {

// Cuts the workspace into 256-byte aligned pieces.
class Workspace {
 public:
  explicit Workspace(void* memory) : at_(static_cast<uint8_t*>(memory)) {}
  void* take(int64_t bytes) {
    void* piece = at_;
    at_ += gemm_ceil(bytes, 256) * 256;
    return piece;
  }

 private:
  uint8_t* at_;
};

// Memory for the gradients' parts.
inline float* take_sums(Workspace& workspace, int64_t M, int64_t features, int rank, bool fused = false) {
  return static_cast<float*>(workspace.take(lora_sum_bytes(M, features, rank, fused)));
}

inline void set_flags(GemmProblem& p, int* zeros, int64_t M, int64_t N) {
  p.counters = zeros;
  p.summed = p.counters + 3;
  p.done = p.counters + 4;
  p.flags = p.done + kGemmMaxParts;
  p.gradients[0].arrivals = p.flags + gemm_ceil(M, kGemmTokens);
  p.gradients[1].arrivals = p.gradients[0].arrivals + gemm_ceil(N, kGemmFeatures);
}

inline PrepareMatrix prepare_matrix(const void* from, FloatType type, void* to, int64_t rows, int64_t columns,
                                    bool transposed, float factor, bool fragments = false) {
  const int64_t blocks = gemm_ceil(rows, 32) * (fragments ? 2 * gemm_ceil(columns, 64) : gemm_ceil(columns, 32));
  return {from,       type,      to,     static_cast<int>(rows),  static_cast<int>(columns),
          transposed, fragments, factor, static_cast<int>(blocks)};
}

template <typename T>
cudaError_t launch_prepare(const PrepareProblem& p, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(std::max(1, p.matrices[0].blocks + p.matrices[1].blocks)));
  launch.blockDim = dim3(256);
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  return cudaLaunchKernelEx(&launch, lora_prepare_kernel<T>, p);
}

template <typename T, int kR, bool kDx, bool kDropout>
cudaError_t launch_gemm(const GemmMaps& maps, const GemmProblem& p, int device, cudaStream_t stream) {
  const auto kernel = lora_gemm_kernel<T, kR, kDx, kDropout>;
  constexpr int kShared = sizeof(GemmShared);
  static std::atomic<uint64_t> allowed{0};  // devices where the kernel may have its shared memory
  const uint64_t bit = uint64_t{1} << (device % 64);
  if ((allowed.load(std::memory_order_relaxed) & bit) == 0) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (error != cudaSuccess) return error;
    if (device < 64) allowed.fetch_or(bit, std::memory_order_relaxed);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  launch.gridDim = dim3(static_cast<unsigned>(p.schedule.blocks));
  launch.blockDim = dim3(kGemmThreads);
  launch.dynamicSmemBytes = kShared;
  launch.stream = stream;
  launch.attrs = &attribute;
  launch.numAttrs = 1;
  return cudaLaunchKernelEx(&launch, kernel, maps, p);
}

// One operand's boxes of box_columns x box_rows under the swizzle that is as wide as a box's rows.
template <typename T>
cudaError_t gemm_map(CUtensorMap* map, const void* data, int64_t rows, int64_t columns, int box_columns, int box_rows) {
  const auto type = std::is_same<T, __half>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto swizzle = box_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                       : box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                           : CU_TENSOR_MAP_SWIZZLE_32B;
  return make_tensor_map(map, {data, rows, columns, type, 2}, box_columns, box_rows, swizzle);
}

// What both directions have in common. x [M, depth], main weight as stored, p1 [rank, depth] (of masked projections in
// fragment order: prepare.cuh), p2 [outs, rank].
struct GemmOperands {
  const void *x, *weight, *p1, *p2;
  void *y, *product;
  const void *z[2], *q[2];  // of dB, of dA: features [M, features] and product [M, rank]
  int64_t M, outs, depth, features[2];
};

template <typename T, int kR, bool kDx, bool kDropout>
cudaError_t launch_operands(const GemmOperands& o, GemmProblem p, bool project, int multiprocessors, int device,
                            cudaStream_t stream, const GemmOptions& options) {
  using Skinny = GemmSkinny<kR>;
  GemmMaps maps{};
  const auto map = [](CUtensorMap* to, const void* data, int64_t rows, int64_t columns, int box_columns, int box_rows) {
    return gemm_map<T>(to, data, rows, columns, box_columns, box_rows);
  };
  const bool main = o.y != nullptr;
  cudaError_t error = cudaSuccess;
  const auto check = [&](cudaError_t e) {
    if (error == cudaSuccess) error = e;
  };
  check(map(&maps.x, o.x, o.M, o.depth, 64, kGemmTokens));
  if (main) {
    if (kDx) {
      check(map(&maps.w, o.weight, o.depth, o.outs, 64, 64));
    } else {
      check(map(&maps.w, o.weight, o.outs, o.depth, 64, kGemmOuts));
    }
    check(map(&maps.y, o.y, o.M, o.outs, 64, 64));
  }
  const int64_t p1_columns = kDropout && !kDx ? gemm_ceil(o.depth, 64) * 64 : o.depth;
  if (project) {
    if (kDx) {
      check(map(&maps.p1, o.p1, o.depth, p.rank, Skinny::kWidth, 64));
    } else {
      check(map(&maps.p1, o.p1, p.rank, p1_columns, 64, Skinny::kProjectRows));
    }
  }
  if (main && p.extend) {
    check(map(&maps.p, o.product, o.M, p.rank, 64, kGemmTokens));
    check(map(&maps.p2, o.p2, o.outs, p.rank, 64, kGemmOuts));
  }
  for (int i = 0; i < 2; ++i) {
    if (o.features[i] == 0) continue;
    check(map(&maps.z[i], o.z[i], o.M, o.features[i], 64, Skinny::kTokens));
    check(map(&maps.q[i], o.q[i], o.M, p.rank, Skinny::kWidth, Skinny::kTokens));
  }
  if (error != cudaSuccess) return error;
  const GemmWork work{o.M,
                      main ? o.outs : 0,
                      o.depth,
                      project,
                      o.features[0],
                      o.features[1],
                      kDropout && !kDx,
                      kDropout && kDx,
                      kDx && Skinny::kFuses && main && o.features[0] > 0 && gemm_fuses(kR, o.features[0])};
  p.schedule = gemm_schedule(work, multiprocessors, options);
  p.tokens = static_cast<int>(o.M);
  p.outs = static_cast<int>(o.outs);
  p.steps = static_cast<int>(gemm_ceil(o.depth, kGemmDepth));
  p.project_steps = static_cast<int>(gemm_ceil(o.depth, p.schedule.fused ? 64 : Skinny::kProjectColumns * 64));
  p.gradient_steps = p.schedule.part_tiles * kGemmTokens / Skinny::kTokens;
  p.product = o.product;
  return launch_gemm<T, kR, kDx, kDropout>(maps, p, device, stream);
}

template <typename T, int kR>
cudaError_t launch_forward(const LoraForward& f, int multiprocessors, int device, cudaStream_t stream,
                           const GemmOptions& options = {}, GemmProblem p = {}) {
  constexpr FloatType kType = std::is_same<T, __half>::value ? FloatType::kFloat16 : FloatType::kBFloat16;
  const bool low_rank = f.rank > 0, dropout = low_rank && f.seed != nullptr && f.threshold > 0;
  if (f.threshold > kLoraMaxThreshold) return cudaErrorInvalidValue;
  Workspace workspace(f.workspace);
  PrepareProblem prepare{};
  prepare.zeros = static_cast<int*>(workspace.take(lora_flag_bytes(f.M, f.N, f.K)));
  prepare.zero_count = static_cast<int>(lora_flag_bytes(f.M, f.N, f.K) / 4);
  GemmOperands o{};
  o.x = f.x;
  o.weight = f.weight;
  o.y = f.y;
  o.product = f.S;
  o.M = f.M;
  o.outs = f.N;
  o.depth = f.K;
  if (low_rank) {
    void* p2 = workspace.take(2 * f.N * f.rank);
    prepare.matrices[1] = prepare_matrix(f.B, f.B_type, p2, f.N, f.rank, false, f.factor);
    o.p2 = p2;
    o.p1 = f.A;
    if (dropout || f.A_type != kType) {
      void* p1 = workspace.take(2 * gemm_ceil(f.K, 64) * 64 * f.rank);
      prepare.matrices[0] = prepare_matrix(f.A, f.A_type, p1, f.rank, f.K, false, 1.0f, dropout);
      o.p1 = p1;
      p.project_waits = true;
    }
  }
  const cudaError_t error = launch_prepare<T>(prepare, stream);
  if (error != cudaSuccess) return error;
  p.rank = f.rank;
  p.extend = low_rank;
  p.bias = f.bias;
  set_flags(p, prepare.zeros, f.M, f.N);
  p.threshold = f.threshold * 0x10001u;
  p.seed = f.seed;
  return dropout ? launch_operands<T, kR, false, true>(o, p, low_rank, multiprocessors, device, stream, options)
                 : launch_operands<T, kR, false, false>(o, p, low_rank, multiprocessors, device, stream, options);
}

template <typename T, int kR>
cudaError_t launch_backward(const LoraBackward& b, int multiprocessors, int device, cudaStream_t stream,
                            const GemmOptions& options = {}, GemmProblem p = {}) {
  constexpr FloatType kType = std::is_same<T, __half>::value ? FloatType::kFloat16 : FloatType::kBFloat16;
  const bool low_rank = b.rank > 0, project = low_rank && (b.dx != nullptr || b.dA != nullptr);
  if (b.threshold > kLoraMaxThreshold) return cudaErrorInvalidValue;
  Workspace workspace(b.workspace);
  PrepareProblem prepare{};
  prepare.zeros = static_cast<int*>(workspace.take(lora_flag_bytes(b.M, b.N, b.K)));
  prepare.zero_count = static_cast<int>(lora_flag_bytes(b.M, b.N, b.K) / 4);
  GemmOperands o{};
  o.x = b.dy;
  o.weight = b.weight;
  o.y = b.dx;
  o.M = b.M;
  o.outs = b.K;
  o.depth = b.N;
  if (project) {
    o.product = workspace.take(2 * b.M * b.rank);
    o.p1 = b.B;
    if (b.B_type != kType) {
      void* p1 = workspace.take(2 * b.N * b.rank);
      prepare.matrices[0] = prepare_matrix(b.B, b.B_type, p1, b.N, b.rank, false, 1.0f);
      o.p1 = p1;
      p.project_waits = true;
    }
    if (b.dx != nullptr) {
      void* p2 = workspace.take(2 * b.K * b.rank);
      prepare.matrices[1] = prepare_matrix(b.A, b.A_type, p2, b.rank, b.K, true, b.factor);
      o.p2 = p2;
    }
  }
  if (low_rank && b.dB != nullptr) {
    o.z[0] = b.dy;
    o.q[0] = b.S;
    o.features[0] = b.N;
    p.gradients[0] = {b.dB, b.B_type, static_cast<int>(b.N), take_sums(workspace, b.M, b.N, kR, gemm_fuses(kR, b.N)),
                      nullptr};
  }
  if (low_rank && b.dA != nullptr) {
    o.z[1] = b.x;
    o.q[1] = o.product;
    o.features[1] = b.K;
    p.gradients[1] = {b.dA, b.A_type, static_cast<int>(b.K), take_sums(workspace, b.M, b.K, kR), nullptr};
  }
  const cudaError_t error = launch_prepare<T>(prepare, stream);
  if (error != cudaSuccess) return error;
  p.rank = b.rank;
  p.extend = low_rank;
  p.add = b.add_to_dx;
  p.factor = b.factor;
  set_flags(p, prepare.zeros, b.M, b.N);
  const bool dropout = low_rank && b.seed != nullptr && b.threshold > 0;
  p.threshold = b.threshold * 0x10001u;
  p.seed = b.seed;
  return dropout ? launch_operands<T, kR, true, true>(o, p, project, multiprocessors, device, stream, options)
                 : launch_operands<T, kR, true, false>(o, p, project, multiprocessors, device, stream, options);
}

}  // namespace peftkern
