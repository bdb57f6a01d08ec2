// 8-bit AdamW on CUDA: check -> config -> launch. A call of more tensors than fit into a launch takes several.
#include <cmath>

#include "adamw8bit/launches.h"
#include "adamw8bit/places.h"
#include "common/cuda.h"
#include "common/stable.h"

namespace peftkern {
namespace {

using Tensors = std::vector<Tensor>;

constexpr const char* kStep = "adamw8bit_step_";
constexpr const char* kLook = "adamw8bit_found_inf_";

AdamWType float_type(const char* op, const char* name, size_t i, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kAdamWFloat;
    case ScalarType::Half:
      return kAdamWHalf;
    case ScalarType::BFloat16:
      return kAdamWBFloat16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, "[", i, "] must be float32, float16 or bfloat16; cast it");
  }
  return kAdamWFloat;
}

const float* one_float(const char* op, const char* name, const std::optional<Tensor>& t) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == 1 && t->is_cuda(), op, ": ", name,
                  " must hold one float32 on the parameters' device");
  return data<float>(*t);
}

AdamWNumber number(const char* name, double value, const std::optional<Tensor>& t) {
  if (!t.has_value()) return {value, nullptr, AdamWNumber::kHost};
  STD_TORCH_CHECK(t->numel() == 1 && t->is_cuda(), kStep, ": ", name,
                  " must hold one element on the parameters' device");
  switch (t->scalar_type()) {
    case ScalarType::Float:
      return {0.0, t->const_data_ptr(), AdamWNumber::kFloat};
    case ScalarType::Double:
      return {0.0, t->const_data_ptr(), AdamWNumber::kDouble};
    case ScalarType::Long:
      return {0.0, t->const_data_ptr(), AdamWNumber::kLong};
    default:
      STD_TORCH_CHECK(false, kStep, ": ", name, " must be float32, float64 or int64");
  }
  return {};
}

// The tables as given, or made for this call.
Tensor code_tables(const Tensor& first, const Tensor& second, const std::optional<Tensor>& tables,
                   cudaStream_t stream) {
  for (const Tensor& book : {first, second}) {
    STD_TORCH_CHECK(book.scalar_type() == ScalarType::Float && book.numel() == 256 && book.is_contiguous(), kStep,
                    ": exp_avg_qmap and exp_avg_sq_qmap must be contiguous float32 tensors of 256 values");
  }
  if (tables.has_value()) {
    STD_TORCH_CHECK(tables->scalar_type() == ScalarType::Int && tables->numel() == kTableSize, kStep,
                    ": code_tables must come from adamw8bit_code_tables");
    return *tables;
  }
  Tensor made = torch::stable::new_empty(first, {kTableSize}, ScalarType::Int);
  PEFTKERN_CUDA_CHECK(launch_code_tables(data<float>(first), data<float>(second),
                                         static_cast<uint32_t*>(made.mutable_data_ptr()), stream));
  return made;
}

Tensor make_code_tables(Tensor first, Tensor second) {
  const Launch launch(first);
  return code_tables(first, second, std::nullopt, launch.stream());
}

AdamWItem make_item(const Tensors& params, const Tensors& grads, const Tensors& exp_avg, const Tensors& exp_avg_sq,
                    const Tensors& exp_avg_absmax, const Tensors& exp_avg_sq_absmax, int64_t blocksize, size_t i) {
  AdamWItem item;
  item.numel = params[i].numel();
  item.param_type = float_type(kStep, "params", i, params[i]);
  item.grad_type = float_type(kStep, "grads", i, grads[i]);
  STD_TORCH_CHECK(params[i].is_contiguous() && grads[i].is_contiguous() && grads[i].numel() == item.numel, kStep,
                  ": params[", i, "] and its gradient must be contiguous and of one size");
  check_device(kStep, "a gradient", grads[i], "its parameter", params[i]);
  for (const Tensor* code : {&exp_avg[i], &exp_avg_sq[i]}) {
    STD_TORCH_CHECK(code->scalar_type() == ScalarType::Byte && code->is_contiguous() && code->numel() == item.numel,
                    kStep, ": the states of params[", i, "] must be contiguous uint8 of its size");
    check_device(kStep, "a state", *code, "its parameter", params[i]);
  }
  const int64_t blocks = (item.numel + blocksize - 1) / blocksize;
  for (const Tensor* absmax : {&exp_avg_absmax[i], &exp_avg_sq_absmax[i]}) {
    STD_TORCH_CHECK(absmax->scalar_type() == ScalarType::Float && absmax->is_contiguous() && absmax->numel() == blocks,
                    kStep, ": params[", i, "] needs ", blocks, " contiguous float32 scales for blocks of ", blocksize,
                    "; is the blocksize right?");
    check_device(kStep, "a scale", *absmax, "its parameter", params[i]);
  }
  item.param = params[i].mutable_data_ptr();
  item.grad = grads[i].const_data_ptr();
  item.m_code = mutable_data<uint8_t>(exp_avg[i]);
  item.v_code = mutable_data<uint8_t>(exp_avg_sq[i]);
  item.m_absmax = mutable_data<float>(exp_avg_absmax[i]);
  item.v_absmax = mutable_data<float>(exp_avg_sq_absmax[i]);
  return item;
}

// What all forms of the op share: the numbers of a call.
AdamWCall make_call(const Tensor& tables, double lr, const std::optional<Tensor>& lr_tensor, double step,
                    const std::optional<Tensor>& step_tensor, double beta1, double beta2, double eps,
                    double weight_decay, int64_t blocksize, const std::optional<Tensor>& grad_scale,
                    const std::optional<Tensor>& found_inf, bool maximize, double max_norm,
                    const std::optional<Tensor>& grad_norm, std::optional<int64_t> seed) {
  STD_TORCH_CHECK(blocksize >= 64 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0, kStep,
                  ": blocksize must be a power of two from 64 to 4096, got ", blocksize);
  AdamWCall call{};
  call.lr = number("lr", lr, lr_tensor);
  call.step = number("step", step, step_tensor);
  if (call.lr.type == AdamWNumber::kHost && call.step.type == AdamWNumber::kHost) {
    call.rates = {static_cast<float>(1.0 - lr * weight_decay), static_cast<float>(lr / (1.0 - std::pow(beta1, step))),
                  static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, step)))};
  }
  call.beta1 = beta1;
  call.beta2 = beta2;
  call.weight_decay = weight_decay;
  call.max_norm = max_norm;
  call.beta1_rounded = static_cast<float>(beta1);
  call.one_minus_beta1 = static_cast<float>(1.0 - beta1);
  call.beta2_rounded = static_cast<float>(beta2);
  call.one_minus_beta2 = static_cast<float>(1.0 - beta2);
  call.eps = static_cast<float>(eps);
  call.inverse_eps = std::nextafter(static_cast<float>(1.0 / call.eps), INFINITY);
  call.grad_scale = one_float(kStep, "grad_scale", grad_scale);
  call.found_inf = one_float(kStep, "found_inf", found_inf);
  call.norm = one_float(kStep, "grad_norm", grad_norm);
  call.code_tables = static_cast<const uint32_t*>(tables.const_data_ptr());
  call.seed = static_cast<uint64_t>(seed.value_or(0));
  while ((int64_t{1} << call.log2_blocksize) < blocksize) ++call.log2_blocksize;
  call.maximize = maximize;
  return call;
}

void step(Tensors params, Tensors grads, Tensors exp_avg, Tensors exp_avg_sq, Tensors exp_avg_absmax,
          Tensors exp_avg_sq_absmax, Tensor exp_avg_qmap, Tensor exp_avg_sq_qmap, double lr,
          std::optional<Tensor> lr_tensor, double step, std::optional<Tensor> step_tensor, double beta1, double beta2,
          double eps, double weight_decay, int64_t blocksize, std::optional<Tensor> grad_scale,
          std::optional<Tensor> found_inf, bool maximize, double max_norm, std::optional<Tensor> grad_norm,
          std::optional<int64_t> seed, std::optional<Tensor> tables, std::optional<std::vector<int64_t>> given_places) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avg.size() == count && exp_avg_sq.size() == count &&
                      exp_avg_absmax.size() == count && exp_avg_sq_absmax.size() == count,
                  kStep, ": params, grads and states must be lists of one length");
  if (count == 0) return;
  check_device(kStep, "exp_avg_qmap", exp_avg_qmap, "params[0]", params[0]);
  check_device(kStep, "exp_avg_sq_qmap", exp_avg_sq_qmap, "params[0]", params[0]);
  const Launch launch(params[0]);
  const Tensor used = code_tables(exp_avg_qmap, exp_avg_sq_qmap, tables, launch.stream());
  const AdamWCall call = make_call(used, lr, lr_tensor, step, step_tensor, beta1, beta2, eps, weight_decay, blocksize,
                                   grad_scale, found_inf, maximize, max_norm, grad_norm, seed);
  AdamWStepLaunches launches(call, seed.has_value(), launch.stream());
  AdamWPlaces places(given_places, count);
  for (size_t i = 0; i < count; ++i) {
    check_device(kStep, "a parameter", params[i], "params[0]", params[0]);
    launches.add(make_item(params, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, blocksize, i),
                 places.next(params[i].numel()));
  }
  launches.flush();
}

// A row of the table that an OptimizerPlan keeps (csrc/host/optimizer_plan.h).
AdamWItem table_item(const int64_t* row) {
  const auto pointer = [&](int column) { return reinterpret_cast<void*>(row[column]); };
  return {pointer(0),
          pointer(1),
          static_cast<uint8_t*>(pointer(2)),
          static_cast<uint8_t*>(pointer(3)),
          static_cast<float*>(pointer(4)),
          static_cast<float*>(pointer(5)),
          row[6],
          static_cast<int>(row[7] & 0xff),
          static_cast<int>(row[7] >> 8)};
}

constexpr int64_t kTableColumns = 8;

const int64_t* table_rows(const char* op, const Tensor& table, int64_t first, int64_t count) {
  STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::Long && table.is_contiguous() && first >= 0 &&
                      count >= 0 && (first + count) * kTableColumns <= table.numel(),
                  op, ": the table must be int64 on the CPU and hold the rows asked for");
  return data<int64_t>(table) + first * kTableColumns;
}

void step_table(Tensor table, int64_t first, int64_t count, Tensor tables, double lr, std::optional<Tensor> lr_tensor,
                Tensor step, double beta1, double beta2, double eps, double weight_decay, int64_t blocksize,
                std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf, bool maximize, double max_norm,
                std::optional<Tensor> grad_norm, std::optional<int64_t> seed) {
  const int64_t* rows = table_rows("adamw8bit_step_table_", table, first, count);
  const Launch launch(step);
  const AdamWCall call = make_call(tables, lr, lr_tensor, 0.0, step, beta1, beta2, eps, weight_decay, blocksize,
                                   grad_scale, found_inf, maximize, max_norm, grad_norm, seed);
  AdamWStepLaunches launches(call, seed.has_value(), launch.stream());
  AdamWPlaces places(std::nullopt, static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const AdamWItem item = table_item(rows + i * kTableColumns);
    launches.add(item, places.next(item.numel));
  }
  launches.flush();
}

struct Gradient {
  const void* pointer;
  int64_t numel;
  int type;
};

void look_and_count(const std::vector<Gradient>& grads, const std::optional<Tensor>& grad_scale, const float* known,
                    const Tensor& found_inf, const std::optional<Tensor>& norm, const Tensors& steps,
                    const std::optional<Tensor>& skipped) {
  STD_TORCH_CHECK(found_inf.scalar_type() == ScalarType::Float && found_inf.numel() == 1, kLook,
                  ": found_inf must hold one float32");
  STD_TORCH_CHECK(!skipped.has_value() || (skipped->scalar_type() == ScalarType::Long && skipped->numel() == 1), kLook,
                  ": skipped must hold one int64");
  const Launch launch(found_inf);
  int64_t entries = 0, chunks = 0;
  for (const Gradient& grad : grads) {
    entries += adamw_entries(grad.numel);
    chunks += adamw_chunks(grad.numel);
  }
  const Device device = current_device();
  const int multiprocessors = device.multiprocessors;
  const bool early = device.compute_capability >= 90;
  const int64_t flags = AdamWLookLaunches::launches(entries) * multiprocessors * kLookCtas;
  const int64_t sums = norm.has_value() ? chunks * kAdamWPieces : 0;
  std::optional<Tensor> scratch;
  if (flags + sums > 0) scratch = torch::stable::new_empty(found_inf, {flags + sums}, ScalarType::Float);
  float* words = scratch.has_value() ? mutable_data<float>(*scratch) : nullptr;
  AdamWLookLaunches look(one_float(kLook, "grad_scale", grad_scale), reinterpret_cast<uint32_t*>(words),
                         norm.has_value() ? words + flags : nullptr, multiprocessors, launch.stream());
  for (const Gradient& grad : grads) look.add(grad.pointer, grad.numel, grad.type);
  look.flush();
  AdamWVerdict verdict{};
  verdict.flags = reinterpret_cast<uint32_t*>(words);
  verdict.flag_count = look.flag_count();
  verdict.piece_sums = words + flags;
  verdict.piece_count = look.piece_count();
  verdict.known = known;
  verdict.found_inf = mutable_data<float>(found_inf);
  verdict.norm = norm.has_value() ? mutable_data<float>(*norm) : nullptr;
  verdict.skipped = skipped.has_value() ? mutable_data<int64_t>(*skipped) : nullptr;
  for (const Tensor& count : steps) {
    STD_TORCH_CHECK(count.scalar_type() == ScalarType::Float && count.numel() == 1, kLook,
                    ": steps must each hold one float32");
    check_device(kLook, "a count of steps", count, "found_inf", found_inf);
    if (verdict.step_count == kMaxSteps) {
      PEFTKERN_CUDA_CHECK(launch_adamw_verdict(verdict, early, launch.stream()));
      verdict.known = verdict.found_inf;
      verdict.flag_count = 0;
      verdict.norm = nullptr;
      verdict.skipped = nullptr;
      verdict.step_count = 0;
    }
    verdict.steps[verdict.step_count++] = mutable_data<float>(count);
  }
  PEFTKERN_CUDA_CHECK(launch_adamw_verdict(verdict, early, launch.stream()));
}

void find_inf(Tensors grads, std::optional<Tensor> grad_scale, Tensor found_inf, std::optional<Tensor> norm,
              Tensors steps, std::optional<Tensor> skipped) {
  std::vector<Gradient> list;
  list.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    STD_TORCH_CHECK(grads[i].is_contiguous(), kLook, ": grads[", i, "] must be contiguous");
    check_device(kLook, "a gradient", grads[i], "found_inf", found_inf);
    list.push_back({grads[i].const_data_ptr(), grads[i].numel(), float_type(kLook, "grads", i, grads[i])});
  }
  look_and_count(list, grad_scale, one_float(kLook, "found_inf", found_inf), found_inf, norm, steps, skipped);
}

void find_inf_table(Tensor table, int64_t count, std::optional<Tensor> grad_scale, std::optional<Tensor> known,
                    Tensor found_inf, std::optional<Tensor> norm, Tensors steps, std::optional<Tensor> skipped) {
  const int64_t* rows = table_rows("adamw8bit_found_inf_table_", table, 0, count);
  std::vector<Gradient> list;
  list.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const AdamWItem item = table_item(rows + i * kTableColumns);
    list.push_back({item.grad, item.numel, item.grad_type});
  }
  look_and_count(list, grad_scale, one_float(kLook, "known", known), found_inf, norm, steps, skipped);
}

PEFTKERN_LIBRARY_IMPL(CUDA, "cuda", m) {
  m.impl("adamw8bit_step_", TORCH_BOX(&step));
  m.impl("adamw8bit_found_inf_", TORCH_BOX(&find_inf));
  m.impl("adamw8bit_code_tables", TORCH_BOX(&make_code_tables));
  m.impl("adamw8bit_step_table_", TORCH_BOX(&step_table));
  m.impl("adamw8bit_found_inf_table_", TORCH_BOX(&find_inf_table));
}

}  // namespace
}  // namespace peftkern
