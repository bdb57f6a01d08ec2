// NF4 quantize and dequantize on CUDA: check -> config -> launch. The kernels are in the .cuh files beside this.
#include "common/cuda.h"
#include "common/stable.h"
#include "nf4/convert.h"
#include "nf4/convert_config.h"
#include "nf4/dequantize.cuh"
#include "nf4/device_weight.h"
#include "nf4/weight.h"

namespace peftkern {
namespace {

template <typename T>
void launch_dequantize(const NF4Pointers& w, T* out, int64_t numel, cudaStream_t stream) {
  const DequantizeConfig config = nf4_dequantize_config(numel);
  const bool aligned = is_aligned(w.packed, 4) && is_aligned(out, 16);
  const auto kernel = w.nested()
                          ? (aligned ? nf4_dequantize_kernel<T, true, true> : nf4_dequantize_kernel<T, true, false>)
                          : (aligned ? nf4_dequantize_kernel<T, false, true> : nf4_dequantize_kernel<T, false, false>);
  kernel<<<static_cast<unsigned>(config.ctas), config.threads, 0, stream>>>(device_weight(w), out, numel);
  PEFTKERN_CUDA_CHECK(cudaGetLastError());
}

void dequantize_out(const Tensor& packed, const Tensor& absmax, std::optional<Tensor> nested_absmax,
                    std::optional<Tensor> nested_code, std::optional<Tensor> nested_offset, int64_t blocksize,
                    int64_t nested_blocksize, Tensor out) {
  constexpr const char* op = "nf4_dequantize_out";
  STD_TORCH_CHECK(out.is_contiguous(), op, ": out must be contiguous");
  const int64_t numel = out.numel();
  const NF4Pointers w =
      nf4_pointers(op, numel, packed, absmax, nested_absmax, nested_code, nested_offset, blocksize, nested_blocksize);
  STD_TORCH_CHECK(packed.get_device_index() == out.get_device_index(), op,
                  ": packed is on cuda:", packed.get_device_index(), " but out is on cuda:", out.get_device_index());
  STD_TORCH_CHECK((nested_blocksize & (nested_blocksize - 1)) == 0, op,
                  ": nested_blocksize must be a power of two, got ", nested_blocksize);
  const Launch launch(out);
  nf4_dequantize(w, out, launch.stream());
}

PEFTKERN_LIBRARY_IMPL(CUDA, "cuda", m) {
  m.impl("nf4_dequantize_out", TORCH_BOX(&dequantize_out));
}

}  // namespace

void nf4_dequantize(const NF4Pointers& w, const Tensor& out, cudaStream_t stream) {
  const int64_t numel = out.numel();
  if (numel == 0) return;
  switch (out.scalar_type()) {
    case ScalarType::Float:
      return launch_dequantize(w, mutable_data<float>(out), numel, stream);
    case ScalarType::Double:
      return launch_dequantize(w, mutable_data<double>(out), numel, stream);
    case ScalarType::Half:
      return launch_dequantize(w, mutable_data<__half>(out), numel, stream);
    case ScalarType::BFloat16:
      return launch_dequantize(w, mutable_data<__nv_bfloat16>(out), numel, stream);
    default:
      STD_TORCH_CHECK(false, "nf4_dequantize_out: out must be float32, float64, float16 or bfloat16");
  }
}

}  // namespace peftkern
