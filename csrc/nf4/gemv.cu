// Launches of the generic NF4 matrix-vector product: config -> launch.
#include <algorithm>

#include "nf4/gemv.cuh"
#include "nf4/matmul.h"

namespace peftkern {
namespace {

bool aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <typename T, bool kNested, int kTokens>
cudaError_t launch(const NF4Matmul& p, cudaStream_t stream) {
  const bool vector = p.K % 8 == 0 && aligned(p.x, 16);
  const auto kernel = vector ? nf4_gemv_kernel<T, kNested, kTokens, true> : nf4_gemv_kernel<T, kNested, kTokens, false>;
  const dim3 grid(static_cast<unsigned>((p.N + kGemvWarps - 1) / kGemvWarps),
                  static_cast<unsigned>((p.M + kTokens - 1) / kTokens));
  kernel<<<grid, kGemvWarps * 32, 0, stream>>>(
      NF4GemvArguments{p.x, p.weight, p.bias, p.y, p.M, p.N, p.K, aligned(p.weight.packed, 4)});
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const NF4Matmul& p, cudaStream_t stream) {
  const bool nested = p.weight.absmax_codes != nullptr;
  if (p.M == 1) return nested ? launch<T, true, 1>(p, stream) : launch<T, false, 1>(p, stream);
  return nested ? launch<T, true, kGemvTokens>(p, stream) : launch<T, false, kGemvTokens>(p, stream);
}

}  // namespace

cudaError_t launch_nf4_gemv(const NF4Matmul& problem, int /*multiprocessors*/, cudaStream_t stream) {
  if (problem.M == 0 || problem.N == 0) return cudaSuccess;
  // The grid's second dimension holds the tokens.
  if ((problem.M + kGemvTokens - 1) / kGemvTokens > 65535) return cudaErrorInvalidValue;
  switch (problem.dtype) {
    case ActivationDtype::kBFloat16:
      return launch<__nv_bfloat16>(problem, stream);
    case ActivationDtype::kFloat16:
      return launch<__half>(problem, stream);
    default:
      return launch<float>(problem, stream);
  }
}

}  // namespace peftkern
