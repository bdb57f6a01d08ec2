// NF4 quantize and dequantize on CUDA: check -> config -> launch. The kernels are in the .cuh files beside this.
#include "common/cuda.h"
#include "common/stable.h"
#include "nf4/convert.h"
#include "nf4/convert_config.h"
#include "nf4/dequantize.cuh"
#include "nf4/device_weight.h"
#include "nf4/quantize.cuh"
#include "nf4/quantize_absmax.cuh"
#include "nf4/weight.h"

namespace peftkern {
namespace {

template <typename T>
void launch_dequantize(const NF4Pointers& w, T* out, int64_t numel, cudaStream_t stream) {
  const ConvertConfig config = nf4_dequantize_config(numel, sizeof(T));
  const bool aligned = is_aligned(w.packed, 4) && is_aligned(out, 16);
  const auto kernel = w.nested()
                          ? (aligned ? nf4_dequantize_kernel<T, true, true> : nf4_dequantize_kernel<T, true, false>)
                          : (aligned ? nf4_dequantize_kernel<T, false, true> : nf4_dequantize_kernel<T, false, false>);
  kernel<<<static_cast<unsigned>(config.ctas), config.threads, 0, stream>>>(device_weight(w), out, numel);
  PEFTKERN_CUDA_CHECK(cudaGetLastError());
}

template <typename T>
void launch_dequantize_slice(const NF4Pointers& w, const NF4Slice& slice, T* out, int64_t numel, cudaStream_t stream) {
  constexpr int64_t kUnit = DenseUnit<T>::kWeights;
  const ConvertConfig config = nf4_dequantize_config(numel, sizeof(T));
  const bool aligned = is_aligned(w.packed, 4) && is_aligned(out, 16) && slice.first % kUnit == 0 &&
                       slice.stride % kUnit == 0 && slice.columns % kUnit == 0;
  const auto kernel =
      w.nested()
          ? (aligned ? nf4_dequantize_slice_kernel<T, true, true> : nf4_dequantize_slice_kernel<T, true, false>)
          : (aligned ? nf4_dequantize_slice_kernel<T, false, true> : nf4_dequantize_slice_kernel<T, false, false>);
  kernel<<<static_cast<unsigned>(config.ctas), config.threads, 0, stream>>>(device_weight(w), slice, out, numel);
  PEFTKERN_CUDA_CHECK(cudaGetLastError());
}

// Calls f with a pointer to out's elements.
template <typename F>
void with_elements(const char* op, const Tensor& out, F f) {
  switch (out.scalar_type()) {
    case ScalarType::Float:
      return f(mutable_data<float>(out));
    case ScalarType::Double:
      return f(mutable_data<double>(out));
    case ScalarType::Half:
      return f(mutable_data<__half>(out));
    case ScalarType::BFloat16:
      return f(mutable_data<__nv_bfloat16>(out));
    default:
      STD_TORCH_CHECK(false, op, ": out must be float32, float64, float16 or bfloat16");
  }
}

void dequantize_slice_out(const Tensor& packed, const Tensor& absmax, std::optional<Tensor> nested_absmax,
                          std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
                          int64_t nested_blocksize, int64_t out_features, int64_t in_features, int64_t row,
                          int64_t column, Tensor out) {
  constexpr const char* op = "nf4_dequantize_slice_out";
  check_slice(op, out, out_features, in_features, row, column);
  const NF4Pointers w = nf4_pointers(op, out_features * in_features, packed, absmax, nested_absmax, nested_code,
                                     nested_offset, blocksize, nested_blocksize);
  check_device(op, "packed", packed, "out", out);
  const Launch launch(out);
  const int64_t numel = out.numel();
  if (numel == 0) return;
  const NF4Slice slice{row * in_features + column, in_features, out.size(1)};
  // Whole rows lie together: where blocks begin with them, they are a weight of their own.
  const int64_t blocks = w.nested() ? blocksize * nested_blocksize : blocksize;
  if (slice.columns == in_features && slice.first % blocks == 0) {
    return nf4_dequantize(w.from(slice.first), out, launch.stream());
  }
  with_elements(op, out, [&](auto* target) { launch_dequantize_slice(w, slice, target, numel, launch.stream()); });
}

void dequantize_out(const Tensor& packed, const Tensor& absmax, std::optional<Tensor> nested_absmax,
                    std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
                    int64_t nested_blocksize, Tensor out) {
  constexpr const char* op = "nf4_dequantize_out";
  STD_TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous");
  const int64_t numel = out.numel();
  const NF4Pointers w =
      nf4_pointers(op, numel, packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize);
  check_device(op, "packed", packed, "out", out);
  const Launch launch(out);
  nf4_dequantize(w, out, launch.stream());
}

template <typename T, int kLanes>
void launch_quantize_lanes(const T* weight, uint8_t* packed, float* absmax, int64_t numel, int log2_blocksize,
                           cudaStream_t stream) {
  const ConvertConfig config = nf4_quantize_config(numel);
  const bool aligned = is_aligned(weight, kDenseUnitBytes) && is_aligned(packed, 4);
  nf4_quantize_kernel<T, kLanes><<<static_cast<unsigned>(config.ctas), config.threads, 0, stream>>>(
      weight, packed, absmax, numel, log2_blocksize, aligned);
  PEFTKERN_CUDA_CHECK(cudaGetLastError());
}

template <typename T>
void launch_quantize(const T* weight, uint8_t* packed, float* absmax, int64_t numel, int64_t blocksize,
                     cudaStream_t stream) {
  const auto launch = [&](auto lanes) {
    launch_quantize_lanes<T, decltype(lanes)::value>(weight, packed, absmax, numel, log2_of(blocksize), stream);
  };
  switch (blocksize / WeightUnit<T>::kWeights) {
    case 4:
      return launch(std::integral_constant<int, 4>());
    case 8:
      return launch(std::integral_constant<int, 8>());
    case 16:
      return launch(std::integral_constant<int, 16>());
    case 32:
      return launch(std::integral_constant<int, 32>());
    default:  // larger than a warp's unit
      return launch(std::integral_constant<int, 0>());
  }
}

std::tuple<Tensor, Tensor> quantize(const Tensor& weight, int64_t blocksize) {
  constexpr const char* op = "nf4_quantize";
  STD_TORCH_CHECK(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0, op,
                  ": blocksize must be a power of two from 32 to 4096, got ", blocksize);
  const Launch on_device(weight);
  const Tensor source = torch::stable::contiguous(weight);
  const int64_t numel = source.numel();
  Tensor packed = torch::stable::new_empty(source, {(numel + 1) / 2, 1}, ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(source, {ceil_div(numel, blocksize)}, ScalarType::Float);
  const auto launch = [&](auto element) {
    using T = decltype(element);
    if (numel == 0) return;
    launch_quantize(data<T>(source), mutable_data<uint8_t>(packed), mutable_data<float>(absmax), numel, blocksize,
                    on_device.stream());
  };
  switch (source.scalar_type()) {
    case ScalarType::Float:
      launch(float());
      break;
    case ScalarType::Half:
      launch(__half());
      break;
    case ScalarType::BFloat16:
      launch(__nv_bfloat16());
      break;
    default:
      STD_TORCH_CHECK(false, op, ": weight must be float32, float16 or bfloat16; cast the tensor first");
  }
  return {packed, absmax};
}

std::tuple<Tensor, Tensor> quantize_absmax(const Tensor& absmax, const Tensor& offset, const Tensor& code,
                                           int64_t blocksize) {
  constexpr const char* op = "nf4_quantize_absmax";
  STD_TORCH_CHECK(absmax.scalar_type() == ScalarType::Float && offset.scalar_type() == ScalarType::Float &&
                      code.scalar_type() == ScalarType::Float && code.numel() == 256 && offset.numel() == 1,
                  op, ": absmax [b], offset [1] and code [256] must be float32");
  STD_TORCH_CHECK(blocksize > 0 && blocksize <= 4096, op, ": blocksize must be 1 to 4096, got ", blocksize);
  STD_TORCH_CHECK(
      offset.get_device_index() == absmax.get_device_index() && code.get_device_index() == absmax.get_device_index(),
      op, ": absmax, offset and code must be on one device");
  const Launch on_device(absmax);
  const Tensor source = torch::stable::contiguous(absmax);
  const Tensor code_source = torch::stable::contiguous(code);
  const int64_t numel = source.numel();
  Tensor codes = torch::stable::new_empty(source, {numel}, ScalarType::Byte);
  Tensor nested = torch::stable::new_empty(source, {ceil_div(numel, blocksize)}, ScalarType::Float);
  if (numel == 0) return {codes, nested};
  int multiprocessors = 0;
  PEFTKERN_CUDA_CHECK(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, absmax.get_device_index()));
  const ConvertConfig config = nf4_quantize_absmax_config(numel, blocksize, multiprocessors);
  const float* values = data<float>(source);
  uint8_t* target = mutable_data<uint8_t>(codes);
  nf4_quantize_absmax_kernel<<<static_cast<unsigned>(config.ctas), config.threads, 0, on_device.stream()>>>(
      values, data<float>(offset), data<float>(code_source), target, mutable_data<float>(nested), numel, blocksize,
      is_aligned(values, 16) && is_aligned(target, 8));
  PEFTKERN_CUDA_CHECK(cudaGetLastError());
  return {codes, nested};
}

PEFTKERN_LIBRARY_IMPL(CUDA, "cuda", m) {
  m.impl("nf4_quantize", TORCH_BOX(&quantize));
  m.impl("nf4_quantize_absmax", TORCH_BOX(&quantize_absmax));
  m.impl("nf4_dequantize_out", TORCH_BOX(&dequantize_out));
  m.impl("nf4_dequantize_slice_out", TORCH_BOX(&dequantize_slice_out));
}

}  // namespace

void nf4_dequantize(const NF4Pointers& w, const Tensor& out, cudaStream_t stream) {
  const int64_t numel = out.numel();
  if (numel == 0) return;
  with_elements("nf4_dequantize_out", out, [&](auto* target) { launch_dequantize(w, target, numel, stream); });
}

}  // namespace peftkern
