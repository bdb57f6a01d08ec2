// Several LoRA layers on one x on CUDA: check -> lora_gemm. Without dropout, and of what lora_group_covers.
#include <algorithm>
#include <tuple>
#include <vector>

#include "common/operands.h"
#include "gemm/gemm_ranks.h"
#include "lora_matmul/covers.h"
#include "lora_matmul/workspace.h"

namespace peftkern {
namespace {

using Tensors = std::vector<Tensor>;
using Optionals = std::vector<std::optional<Tensor>>;

void check_lists(const char* op, const Tensors& lora_A, const Tensors& lora_B, const std::vector<double>& scalings,
                 int64_t first, size_t count) {
  STD_TORCH_CHECK(lora_A.size() <= kGemmMaxLayers && lora_A.size() == lora_B.size() &&
                      lora_A.size() == scalings.size() && first >= 0 && count > 0 && first + count <= lora_A.size(),
                  op, ": needs lists of one length, up to ", kGemmMaxLayers, ", and layers of them");
}

// Every layer's adapter, contiguous; where its columns begin, and how many there are.
struct Adapters {
  Tensors A, B;
  std::vector<int> columns;
  int all = 0;
  FloatType A_type = FloatType::kFloat32, B_type = FloatType::kFloat32;
};

Adapters take_adapters(const char* op, const Tensor& x, int64_t K, const Tensors& lora_A, const Tensors& lora_B) {
  Adapters adapters;
  for (size_t i = 0; i < lora_A.size(); ++i) {
    check_matrix(op, "lora_A", lora_A[i], lora_A[i].size(0), K, x);
    check_matrix(op, "lora_B", lora_B[i], lora_B[i].size(0), lora_A[i].size(0), x);
    adapters.A.push_back(made_contiguous(lora_A[i]));
    adapters.B.push_back(made_contiguous(lora_B[i]));
    adapters.columns.push_back(adapters.all);
    const int rank = static_cast<int>(lora_A[i].size(0));
    if (rank == 0) continue;
    const FloatType A_type = float_type(lora_A[i]), B_type = float_type(lora_B[i]);
    STD_TORCH_CHECK(adapters.all == 0 || (A_type == adapters.A_type && B_type == adapters.B_type), op,
                    ": adapters must have one dtype");
    adapters.A_type = A_type;
    adapters.B_type = B_type;
    adapters.all += rank;
  }
  return adapters;
}

LoraLayer take_layer(const Adapters& adapters, const std::vector<double>& scalings, size_t i) {
  LoraLayer layer{};
  layer.A = adapters.A[i].const_data_ptr();
  layer.B = adapters.B[i].const_data_ptr();
  layer.N = adapters.B[i].size(0);
  layer.rank = static_cast<int>(adapters.A[i].size(0));
  layer.column = adapters.columns[i];
  layer.factor = static_cast<float>(scalings[i]);
  return layer;
}

template <typename Problem>
void check_covers(const char* op, const Problem& p, bool half, bool aligned, int compute_capability) {
  bool covers = half && aligned;
  for (int i = 0; i < p.count; ++i) {
    const LoraLayer& layer = p.layers[i];
    const int64_t rank = layer.rank == 0 ? 8 : layer.rank;
    covers = covers && lora_gemm_covers({p.M, layer.N, p.K, rank, true, true, compute_capability, 0});
  }
  STD_TORCH_CHECK(covers && p.columns <= kGemmMaxColumns, op, ": not for such operands; ask lora_group_covers");
}

// y of the layers from `first` on whose weights are given. The first call makes S of all layers, later ones read it.
Tensors forward(const Tensor& x, const Tensors& weights, const Tensors& lora_A, const Tensors& lora_B,
                const Optionals& biases, const std::vector<double>& scalings, int64_t first, const Tensor& S) {
  constexpr const char* op = "lora_group_fwd";
  check_lists(op, lora_A, lora_B, scalings, first, weights.size());
  STD_TORCH_CHECK(x.dim() == 2 && biases.size() == lora_A.size(), op, ": x must be a matrix, biases one a layer");
  const int64_t M = x.size(0), K = x.size(1);
  const Launch launch(x);
  const Device device = current_device();
  const Tensor rows = made_contiguous(x);
  const Adapters adapters = take_adapters(op, x, K, lora_A, lora_B);
  check_matrix(op, "S", S, M, adapters.all, x);
  const ScalarType type = x.scalar_type();
  bool half = is_half(type) && S.scalar_type() == type;
  bool aligned = is_usable(rows) && S.is_contiguous() && is_usable(S);
  LoraForward problem{};
  problem.x = rows.const_data_ptr();
  problem.S = S.mutable_data_ptr();
  problem.project = first == 0;
  problem.M = M;
  problem.K = K;
  problem.columns = adapters.all;
  problem.type = float_type(x);
  problem.A_type = adapters.A_type;
  problem.B_type = adapters.B_type;
  Tensors ys, kept;
  for (size_t i = 0; i < weights.size(); ++i) {
    LoraLayer layer = take_layer(adapters, scalings, first + i);
    check_matrix(op, "weight", weights[i], layer.N, K, x);
    half = half && weights[i].scalar_type() == type;
    aligned = aligned && weights[i].is_contiguous() && is_usable(weights[i]);
    layer.weight = weights[i].const_data_ptr();
    if (biases[first + i].has_value()) {
      Tensor bias = *biases[first + i];
      STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == layer.N, op, ": bias must be [", layer.N, "]");
      check_device(op, "bias", bias, "the activations", x);
      if (bias.scalar_type() != type) bias = torch::stable::to(bias, type);
      bias = made_contiguous(bias);
      if (!is_aligned(bias.const_data_ptr(), 16)) bias = torch::stable::clone(bias);
      layer.bias = bias.const_data_ptr();
      kept.push_back(bias);
    }
    ys.push_back(torch::stable::new_empty(x, {M, layer.N}));
    layer.y = ys.back().mutable_data_ptr();
    problem.layers[problem.count++] = layer;
  }
  for (size_t i = weights.size(); problem.project && i < lora_A.size(); ++i) {
    problem.layers[problem.count++] = take_layer(adapters, scalings, i);
  }
  check_covers(op, problem, half, aligned, device.compute_capability);
  const Tensor workspace = lora_workspace(x, problem);
  PEFTKERN_CUDA_CHECK(launch_lora(problem, {device.index, device.multiprocessors}, launch.stream()));
  return ys;
}

// Of the layers from `first` on whose dy are given: dx, or added to `sum`, and dB; D goes to `D` where that is given.
// dA of all layers where x is given, which needs every layer's D.
std::tuple<Tensor, Tensors, Tensors> backward(const Tensors& dys, std::optional<Tensor> x, const Tensors& weights,
                                              const Tensors& lora_A, const Tensors& lora_B, std::optional<Tensor> S,
                                              const std::vector<double>& scalings, int64_t first,
                                              std::optional<Tensor> D, std::optional<Tensor> sum, bool need_dx,
                                              const std::vector<bool>& need_dA, const std::vector<bool>& need_dB) {
  constexpr const char* op = "lora_group_bwd";
  check_lists(op, lora_A, lora_B, scalings, first, dys.size());
  const size_t count = lora_A.size();
  STD_TORCH_CHECK(need_dA.size() == count && need_dB.size() == count, op, ": needs one flag a layer");
  STD_TORCH_CHECK(!need_dx || weights.size() == dys.size(), op, ": dx needs the weights");
  STD_TORCH_CHECK(!x.has_value() || dys.size() == count || D.has_value(), op, ": dA needs every layer's D");
  const Tensor& like = dys[0];
  STD_TORCH_CHECK(like.dim() == 2, op, ": dy must be a matrix");
  const int64_t M = like.size(0), K = lora_A[0].size(1);
  const Launch launch(like);
  const Device device = current_device();
  const Adapters adapters = take_adapters(op, like, K, lora_A, lora_B);
  const ScalarType type = like.scalar_type();
  bool half = is_half(type), aligned = true;
  const auto take = [&](const char* name, std::optional<Tensor>& t, int64_t columns, bool written) {
    if (!t.has_value()) return;
    check_matrix(op, name, *t, M, columns, like);
    half = half && t->scalar_type() == type;
    aligned = aligned && is_usable(*t) && (!written || t->is_contiguous());
    t = made_contiguous(*t);
  };
  take("x", x, K, false);
  take("S", S, adapters.all, false);
  take("D", D, adapters.all, true);
  take("dx", sum, K, true);
  using Sizes = std::vector<int64_t>;
  const Tensor dx = sum.has_value() ? *sum : torch::stable::new_empty(like, need_dx ? Sizes{M, K} : Sizes{0});
  LoraBackward problem{};
  problem.x = x.has_value() ? x->const_data_ptr() : nullptr;
  problem.S = S.has_value() ? S->const_data_ptr() : nullptr;
  problem.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  problem.D = D.has_value() ? D->mutable_data_ptr() : nullptr;
  problem.add_to_dx = sum.has_value();
  problem.M = M;
  problem.K = K;
  problem.columns = adapters.all;
  problem.type = float_type(like);
  problem.A_type = adapters.A_type;
  problem.B_type = adapters.B_type;
  Tensors dA, dB, kept;
  std::vector<LoraLayer> frozen, others;  // without an adapter; without a dy
  for (size_t i = 0; i < count; ++i) {
    LoraLayer layer = take_layer(adapters, scalings, i);
    const bool here = i >= static_cast<size_t>(first) && i < first + dys.size(), adapted = layer.rank > 0;
    const bool own_dA = x.has_value() && need_dA[i] && adapted, own_dB = here && need_dB[i] && adapted;
    STD_TORCH_CHECK(!own_dB || S.has_value(), op, ": dB needs S");
    dA.push_back(torch::stable::new_empty(lora_A[i], own_dA ? Sizes{layer.rank, K} : Sizes{0}));
    dB.push_back(torch::stable::new_empty(lora_B[i], own_dB ? Sizes{layer.N, layer.rank} : Sizes{0}));
    if (own_dA) layer.dA = dA.back().mutable_data_ptr();
    if (own_dB) layer.dB = dB.back().mutable_data_ptr();
    if (!here) {
      if (own_dA) others.push_back(layer);
      continue;
    }
    const Tensor& dy = dys[i - first];
    check_matrix(op, "dy", dy, M, layer.N, like);
    kept.push_back(made_contiguous(dy));
    half = half && dy.scalar_type() == type;
    aligned = aligned && is_usable(dy);
    layer.dy = kept.back().const_data_ptr();
    if (need_dx) {
      const Tensor& weight = weights[i - first];
      check_matrix(op, "weight", weight, layer.N, K, like);
      half = half && weight.scalar_type() == type;
      aligned = aligned && weight.is_contiguous() && is_usable(weight);
      layer.weight = weight.const_data_ptr();
    }
    if (adapted) {
      problem.layers[problem.count++] = layer;
    } else {
      frozen.push_back(layer);
    }
  }
  for (const auto& list : {frozen, others}) {
    for (const LoraLayer& layer : list) problem.layers[problem.count++] = layer;
  }
  check_covers(op, problem, half, aligned, device.compute_capability);
  const Tensor workspace = lora_workspace(like, problem);
  PEFTKERN_CUDA_CHECK(launch_lora(problem, {device.index, device.multiprocessors}, launch.stream()));
  return {dx, dA, dB};
}

PEFTKERN_LIBRARY_IMPL(CUDA, "cuda", m) {
  m.impl("lora_group_fwd", TORCH_BOX(&forward));
  m.impl("lora_group_bwd", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace peftkern
