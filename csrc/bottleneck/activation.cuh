// The adapter's activations and their derivatives, in float32.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace peftkern {

enum class Activation { kGelu, kGeluTanh, kRelu, kSilu };

struct Activated {
  float value, slope;
};

__device__ __forceinline__ Activated activate(Activation kind, float h) {
  switch (kind) {
    case Activation::kGelu: {
      const float below = 0.5f * (1.0f + erff(h * 0.70710678f));
      return {h * below, below + h * 0.39894228f * expf(-0.5f * h * h)};
    }
    case Activation::kGeluTanh: {
      const float squared = h * h, t = tanhf(0.79788456f * (h + 0.044715f * squared * h));
      const float inner = 0.79788456f * (1.0f + 0.134145f * squared);
      return {0.5f * h * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * h * (1.0f - t * t) * inner};
    }
    case Activation::kRelu:
      return {h <= 0.0f ? 0.0f : h, h > 0.0f ? 1.0f : 0.0f};  // a NaN stays one
    default: {
      const float sigmoid = __fdividef(1.0f, 1.0f + expf(-h));
      return {h * sigmoid, sigmoid * (1.0f + h * (1.0f - sigmoid))};
    }
  }
}

// f(kind) with a constant: the choice is made once for all elements, whose instructions then run side by side.
template <typename F>
__device__ __forceinline__ void with_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    default:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

}  // namespace peftkern
