// Host-side helpers over PyTorch's stable ABI: everything that registers an op includes this and nothing else of torch.
// Device code (.cuh) never does: a torch-free .cu compiles in seconds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

namespace peftkern {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// PEFTKERN_DISABLE=cuda,cpp hands an op over to the next backend; it is read once, when the library is loaded.
inline bool backend_disabled(const char* backend) {
  const char* list = std::getenv("PEFTKERN_DISABLE");
  const size_t length = std::strlen(backend);
  while (list != nullptr && *list != '\0') {
    while (*list == ',' || *list == ' ') ++list;
    const size_t word = std::strcspn(list, ", ");
    if (word == length && std::strncmp(list, backend, length) == 0) return true;
    list += word;
  }
  return false;
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

inline std::string device_name(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : t.is_cpu() ? "cpu" : "another device";
}

inline void check_device(const char* op, const char* name, const Tensor& t, const char* other_name,
                         const Tensor& other) {
  STD_TORCH_CHECK(t.is_cuda() == other.is_cuda() && t.get_device_index() == other.get_device_index(), op, ": ", name,
                  " is on ", device_name(t), " but ", other_name, " is on ", device_name(other), "; move one of them");
}

}  // namespace peftkern

// Registers kernels of one backend under namespace peftkern. The schemas are defined in Python (peftkern/ops/*/op.py);
// either side may load first.
#define PEFTKERN_LIBRARY_IMPL(key, backend, m) PEFTKERN_LIBRARY_IMPL_(key, backend, m, C10_UID)
#define PEFTKERN_LIBRARY_IMPL_(key, backend, m, uid) PEFTKERN_LIBRARY_IMPL__(key, backend, m, uid)
#define PEFTKERN_LIBRARY_IMPL__(key, backend, m, uid)                                   \
  static void peftkern_register_##key##_##uid(torch::stable::detail::StableLibrary& m); \
  STABLE_TORCH_LIBRARY_IMPL(peftkern, key, library) {                                   \
    if (!peftkern::backend_disabled(backend)) peftkern_register_##key##_##uid(library); \
  }                                                                                     \
  static void peftkern_register_##key##_##uid(torch::stable::detail::StableLibrary& m)

// Calls f(T{}) with the C++ type of a float dtype.
#define PEFTKERN_DISPATCH_FLOAT(op, scalar_type, T, ...)                                                 \
  switch (scalar_type) {                                                                                 \
    case peftkern::ScalarType::Float: {                                                                  \
      using T = float;                                                                                   \
      __VA_ARGS__;                                                                                       \
      break;                                                                                             \
    }                                                                                                    \
    case peftkern::ScalarType::Half: {                                                                   \
      using T = peftkern::Half;                                                                          \
      __VA_ARGS__;                                                                                       \
      break;                                                                                             \
    }                                                                                                    \
    case peftkern::ScalarType::BFloat16: {                                                               \
      using T = peftkern::BFloat16;                                                                      \
      __VA_ARGS__;                                                                                       \
      break;                                                                                             \
    }                                                                                                    \
    default:                                                                                             \
      STD_TORCH_CHECK(false, op, ": dtype must be float32, float16 or bfloat16; cast the tensor first"); \
  }
