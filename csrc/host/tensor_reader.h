// Tensors read out of their Python objects through torch's C shims: some nanoseconds each, where Python's interfaces
// take a hundred.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdint>

namespace peftkern {

class TensorReader {
 public:
  // Raises ValueError where a Python tensor is not as expected. sample: a tensor.
  explicit TensorReader(pybind11::handle sample);

  // Whether the object is a tensor that can be read: a torch.Tensor or Parameter itself, as subclasses may have no
  // memory of their own.
  bool takes(PyObject* object) const { return Py_TYPE(object) == tensor_ || Py_TYPE(object) == parameter_; }

  // Of those. A handle lives as long as the object.
  AtenTensorHandle handle(PyObject* object) const {
    return reinterpret_cast<AtenTensorHandle>(reinterpret_cast<char*>(object) + offset_);
  }

  // Where the C++ object lies.
  const void* implementation(PyObject* object) const {
    return *reinterpret_cast<const void* const*>(reinterpret_cast<char*>(object) + offset_);
  }

 private:
  PyTypeObject *tensor_, *parameter_;
  int offset_ = 0;
};

// The address of the first element; -1 where there is none to be had.
inline int64_t address(AtenTensorHandle tensor) {
  void* data;
  return aoti_torch_get_data_ptr(tensor, &data) == AOTI_TORCH_SUCCESS ? reinterpret_cast<int64_t>(data) : -1;
}

inline int64_t numel(AtenTensorHandle tensor) {
  int64_t n;
  return aoti_torch_get_numel(tensor, &n) == AOTI_TORCH_SUCCESS ? n : -1;
}

inline int32_t scalar_type(AtenTensorHandle tensor) {
  int32_t type;
  return aoti_torch_get_dtype(tensor, &type) == AOTI_TORCH_SUCCESS ? type : -1;
}

inline bool is_contiguous(AtenTensorHandle tensor) {
  bool contiguous;
  return aoti_torch_is_contiguous(tensor, &contiguous) == AOTI_TORCH_SUCCESS && contiguous;
}

// Whether it has memory that strides describe.
inline bool is_strided(AtenTensorHandle tensor) {
  int32_t layout;
  return aoti_torch_get_layout(tensor, &layout) == AOTI_TORCH_SUCCESS && layout == aoti_torch_layout_strided();
}

struct TensorDevice {
  int32_t type = -1, index = -1;

  TensorDevice() = default;
  explicit TensorDevice(AtenTensorHandle tensor) {
    if (aoti_torch_get_device_type(tensor, &type) != AOTI_TORCH_SUCCESS ||
        aoti_torch_get_device_index(tensor, &index) != AOTI_TORCH_SUCCESS) {
      type = -1;
    }
  }
  bool operator==(const TensorDevice& o) const { return type >= 0 && type == o.type && index == o.index; }
};

}  // namespace peftkern
