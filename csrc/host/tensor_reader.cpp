#include "host/tensor_reader.h"

#include <stdexcept>

namespace py = pybind11;

namespace peftkern {

// A Python tensor holds an at::Tensor, which is a pointer to its implementation, whose address `_cdata` is. A handle of
// the shims is the address of an at::Tensor.
TensorReader::TensorReader(py::handle sample) {
  const py::module_ torch = py::module_::import("torch");
  const py::object tensor = torch.attr("Tensor");
  tensor_ = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  parameter_ = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("nn").attr("Parameter")).ptr());
  const auto base = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("_C").attr("TensorBase")).ptr());
  const auto data = py::getattr(sample, "_cdata", py::int_(0)).cast<uintptr_t>();
  constexpr int kWord = sizeof(uintptr_t);
  for (int at = sizeof(PyObject); at + kWord <= base->tp_basicsize; at += kWord) {
    if (*reinterpret_cast<const uintptr_t*>(reinterpret_cast<const char*>(sample.ptr()) + at) == data) offset_ = at;
  }
  if (data == 0 || offset_ == 0) throw std::invalid_argument("a Python tensor does not hold its C++ object's address");
}

}  // namespace peftkern
