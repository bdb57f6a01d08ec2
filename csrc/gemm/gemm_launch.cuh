// Launches lora_prepare and lora_gemm: tensor maps, operands in the workspace. Free of torch.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include "common/kernel_launch.h"
#include "gemm/gemm.cuh"
#include "gemm/gemm.h"
#include "gemm/matrix_mapper.h"
#include "gemm/prepare_launch.cuh"

namespace peftkern {

template <typename T, int kR, bool kDx, bool kDropout, int kLayers>
cudaError_t launch_gemm(const GemmMaps<kLayers>& maps, const GemmProblem<kLayers>& p, int device, cudaStream_t stream) {
  const auto kernel = lora_gemm_kernel<T, kR, kDx, kDropout, kLayers>;
  constexpr int kShared = sizeof(GemmShared);
  static std::atomic<uint64_t> allowed{0};
  const cudaError_t error = allow_shared_memory(kernel, kShared, device, allowed);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, {dim3(static_cast<unsigned>(p.schedule.blocks)), kGemmThreads, kShared}, stream, maps,
                       p);
}

// Columns from `column` on of a 16-bit matrix.
inline const void* from_column(const void* data, int column) {
  return static_cast<const uint16_t*>(data) + column;
}

// Products of a main tile's extension: of one layer, all that its kernel is compiled for.
template <int kR, int kLayers>
int gemm_products(int rank) {
  if (rank == 0) return 0;
  return static_cast<int>(gemm_ceil(kLayers == 1 ? kR : rank, 16));
}

template <int kLayers, typename Problem>
GemmProblem<kLayers> gemm_problem(const Problem& f, const LoraMemory& m) {
  GemmProblem<kLayers> p{};
  p.tokens = static_cast<int>(f.M);
  p.columns = f.columns;
  p.threshold = f.threshold * 0x10001u;
  p.seed = f.seed;
  p.counters = m.zeros;
  p.summed = p.counters + 3;
  p.done = p.counters + 4;
  p.flags = p.done + kGemmMaxParts;
  p.a.arrivals = p.flags + gemm_ceil(f.M, kGemmTokens);
  int* arrivals = p.a.arrivals + gemm_ceil(f.K, kGemmFeatures);
  for (int i = 0; i < f.count; ++i) {
    const LoraLayer& layer = f.layers[i];
    p.layers[i].rank = layer.rank;
    p.layers[i].column = layer.column;
    p.layers[i].factor = layer.factor;
    p.layers[i].b.arrivals = arrivals;
    arrivals += gemm_ceil(layer.N, kGemmFeatures);
  }
  return p;
}

template <typename T, int kR, bool kDropout, int kLayers>
cudaError_t launch_forward(const LoraForward& f, int multiprocessors, int device, cudaStream_t stream) {
  using Skinny = GemmSkinny<kR>;
  const LoraMemory m = lora_memory(f);
  GemmProblem<kLayers> p = gemm_problem<kLayers>(f, m);
  GemmMaps<kLayers> maps{};
  MatrixMapper<T> map;
  PrepareProblem prepare(m.zeros, m.zero_bytes);
  GemmSizes outs;
  map(&maps.x[0], f.x, f.M, f.K, 64, kGemmTokens);
  const int64_t project_steps = gemm_ceil(f.K, Skinny::kProjectColumns * 64);
  int adapted = 0;
  for (int i = 0; i < f.count; ++i) {
    const LoraLayer& layer = f.layers[i];
    GemmLayer& own = p.layers[i];
    own.project_steps = static_cast<int>(project_steps);
    if (layer.y != nullptr) {
      outs.add(layer.N);
      own.outs = static_cast<int>(layer.N);
      own.bias = layer.bias;
      p.extension = std::max(p.extension, gemm_products<kR, kLayers>(layer.rank));
      map.strided(&maps.w[i], layer.weight, layer.N, f.K, layer.weight_stride, 64, kGemmOuts);
      map(&maps.y[i], layer.y, f.M, layer.N, 64, 64);
    }
    if (layer.rank == 0) continue;
    if (layer.y != nullptr) {
      adapted = i;
      prepare.add({layer.B, f.B_type, m.p2[i], layer.N, layer.rank, layer.factor});
      map.strided(&maps.p[i], from_column(f.S, layer.column), f.M, layer.rank, f.columns, 64, kGemmTokens);
      map(&maps.p2[i], m.p2[i], layer.N, layer.rank, 64, kGemmOuts);
    }
    if (!f.project) continue;
    if (m.p1[i] != nullptr) {
      prepare.add({layer.A, f.A_type, m.p1[i], layer.rank, f.K, 1.0f}, false, kDropout);
      p.project_waits = true;
    }
    map(&maps.p1[i], m.p1[i] == nullptr ? layer.A : m.p1[i], layer.rank,
        kDropout ? gemm_ceil(f.K, kGemmDepth) * kGemmDepth : f.K, 64, kLayers == 1 ? Skinny::kProjectRows : layer.rank);
  }
  for (int i = 0; i < f.count; ++i) {
    if (f.layers[i].rank > 0) continue;
    maps.p[i] = maps.p[adapted];  // read beyond its columns: 0
    maps.p2[i] = maps.p2[adapted];
  }
  if (map.error() != cudaSuccess) return map.error();
  const bool project = f.project && f.columns > 0;
  p.schedule = gemm_schedule({f.M, outs, f.K, project, 0, 0, kDropout, false}, multiprocessors);
  p.steps = static_cast<int>(gemm_ceil(f.K, kGemmDepth));
  p.project_bytes = Skinny::kProjectX + Skinny::kProjectColumns * f.columns * 128;
  p.projects = project ? 2 : 0;
  p.product = f.S;
  const cudaError_t error = launch_prepare<T>(prepare, stream);
  return error == cudaSuccess ? launch_gemm<T, kR, false, kDropout>(maps, p, device, stream) : error;
}

template <typename T, int kR, bool kDropout, int kLayers>
cudaError_t launch_backward(const LoraBackward& b, int multiprocessors, int device, cudaStream_t stream) {
  using Skinny = GemmSkinny<kR>;
  const LoraMemory m = lora_memory(b);
  const bool fused = lora_fuses(b);
  const int width = fused ? kGemmMaxFusedRank : Skinny::kWidth;  // of P1's and S's boxes
  GemmProblem<kLayers> p = gemm_problem<kLayers>(b, m);
  GemmMaps<kLayers> maps{};
  MatrixMapper<T> map;
  PrepareProblem prepare(m.zeros, m.zero_bytes);
  int64_t depth = 0, steps = 0;
  int adapted = 0, columns = 0;  // layers with an adapter, and their ranks, of those with dy
  bool gradient_a = false;
  for (int i = 0; i < b.count; ++i) {
    const LoraLayer& layer = b.layers[i];
    p.layers[i].dA = layer.dA;
    gradient_a = gradient_a || (layer.rank > 0 && layer.dA != nullptr);
    if (layer.dy == nullptr) continue;
    adapted += layer.rank > 0;
    columns += layer.rank;
  }
  const int first = b.layers[0].column;
  const bool project = adapted > 0 && (b.dx != nullptr || gradient_a || b.D != nullptr);
  GemmSizes features_b;
  for (int i = 0; i < b.count && b.layers[i].dy != nullptr; ++i) {
    const LoraLayer& layer = b.layers[i];
    GemmLayer& own = p.layers[i];
    own.steps = static_cast<int>(gemm_ceil(layer.N, kGemmDepth));
    own.project_steps = static_cast<int>(gemm_ceil(layer.N, fused ? 64 : Skinny::kProjectColumns * 64));
    depth += layer.N;
    steps += own.steps;
    map(&maps.x[i], layer.dy, b.M, layer.N, 64, kGemmTokens);
    if (b.dx != nullptr) map.strided(&maps.w[i], layer.weight, layer.N, b.K, layer.weight_stride, 64, 64);
    features_b.add(layer.rank > 0 && layer.dB != nullptr ? layer.N : 0);
    if (layer.rank == 0) continue;
    if (project) {
      if (m.p1[i] != nullptr) {
        prepare.add({layer.B, b.B_type, m.p1[i], layer.N, layer.rank, 1.0f});
        p.project_waits = true;
      }
      map(&maps.p1[i], m.p1[i] == nullptr ? layer.B : m.p1[i], layer.N, layer.rank, width, 64);
    }
    if (b.dx != nullptr) {
      const int column = layer.column - first;
      prepare.add({layer.A, b.A_type, static_cast<T*>(m.p2[0]) + column, layer.rank, b.K, layer.factor, columns}, true);
    }
    if (layer.dB == nullptr) continue;
    own.dB = layer.dB;
    own.b.type = b.B_type;
    own.b.features = static_cast<int>(layer.N);
    own.b.sums = m.b_sums[i];
    map(&maps.z_b[i], layer.dy, b.M, layer.N, 64, Skinny::kTokens);
    map.strided(&maps.q_b[i], from_column(b.S, layer.column), b.M, layer.rank, b.columns, width, Skinny::kTokens);
  }
  if (b.dx != nullptr) {
    map(&maps.y[0], b.dx, b.M, b.K, 64, 64);
    if (adapted > 0) {
      map.strided(&maps.p[0], from_column(m.D, first), b.M, columns, b.columns, 64, kGemmTokens);
      map(&maps.p2[0], m.p2[0], b.K, columns, 64, kGemmOuts);
    }
  }
  if (gradient_a) {
    map(&maps.z_a, b.x, b.M, b.K, 64, Skinny::kTokens);
    map(&maps.q_a, m.D, b.M, b.columns, Skinny::kWidth, Skinny::kTokens);
    p.a.type = b.A_type;
    p.a.features = static_cast<int>(b.K);
    p.a.sums = m.a_sums;
  }
  if (map.error() != cudaSuccess) return map.error();
  const int64_t outs = b.dx != nullptr ? b.K : 0, features_a = gradient_a ? b.K : 0;
  p.schedule = gemm_schedule({b.M, outs, depth, project ? adapted : 0, features_b, features_a, false, kDropout, fused},
                             multiprocessors);
  p.layers[0].outs = static_cast<int>(outs);
  p.extension = gemm_products<kR, kLayers>(columns);
  p.steps = static_cast<int>(steps);
  p.gradient_steps = p.schedule.part_tiles * kGemmTokens / Skinny::kTokens;
  p.project_bytes = Skinny::kProjectBytes;
  p.projects = project ? 2 * adapted : 0;
  p.add = b.add_to_dx;
  p.product = m.D;
  const cudaError_t error = launch_prepare<T>(prepare, stream);
  return error == cudaSuccess ? launch_gemm<T, kR, true, kDropout>(maps, p, device, stream) : error;
}

}  // namespace peftkern
