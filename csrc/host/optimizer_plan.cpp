#include "host/optimizer_plan.h"

#include <stdexcept>
#include <unordered_map>

namespace py = pybind11;

namespace peftkern {
namespace {

constexpr int kFloatCode = 2, kBFloatCode = 4;  // of DLPack
constexpr int kStateTensors = 4;
constexpr int kTouched = kStateTensors + 2;  // of a row: the gradient, the parameter, the states

// AdamWType of a dtype, or -1.
int float_type(const DLPackTensor& t) {
  if (t.dtype.lanes != 1) return -1;
  if (t.dtype.code == kFloatCode && t.dtype.bits == 32) return 0;
  if (t.dtype.code == kFloatCode && t.dtype.bits == 16) return 1;
  return t.dtype.code == kBFloatCode && t.dtype.bits == 16 ? 2 : -1;
}

int64_t numel(const DLPackTensor& t) {
  int64_t n = 1;
  for (int d = 0; d < t.ndim; ++d) n *= t.shape[d];
  return n;
}

bool is_contiguous(const DLPackTensor& t) {
  if (t.strides == nullptr) return true;
  int64_t expected = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] == 0) return true;
    if (t.shape[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

int64_t address(const DLPackTensor& t) {
  return static_cast<int64_t>(reinterpret_cast<uint64_t>(t.data) + t.byte_offset);
}

// A step's objects are cold, and each is a chain of pointers: rows, and dicts, are asked for so many ahead.
constexpr size_t kRowsAhead = 3, kDictsAhead = 8;

void prefetch_lines(const void* from, int lines) {
  for (int i = 0; i < lines; ++i) __builtin_prefetch(static_cast<const char*>(from) + 64 * i);
}

// A number that torch's Python objects have as `_cdata`: where the C++ object lies. 0 where there is none.
uintptr_t c_data(py::handle object) {
  const py::object value = py::getattr(object, "_cdata", py::int_(0));
  return py::isinstance<py::int_>(value) ? value.cast<uintptr_t>() : 0;
}

// Where a dict's keys and values lie.
const void* table_of(py::handle dict) {
  return reinterpret_cast<const PyDictObject*>(dict.ptr())->ma_keys;
}

PyObject* gradient_name() {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  return name;
}

}  // namespace

void Touched::prefetch() const {
  __builtin_prefetch(object);
  prefetch_lines(tensor, 4);
  prefetch_lines(storage, 2);
}

Touched touched(py::handle tensor) {
  return {tensor.ptr(), reinterpret_cast<const void*>(c_data(tensor)),
          reinterpret_cast<const void*>(c_data(tensor.attr("untyped_storage")()))};
}

void OptimizerPlan::prefetch(int64_t row, int first, int count) const {
  if (row < 0) return;
  for (int i = first; i < first + count; ++i) touched_[row * kTouched + i].prefetch();
}

bool OptimizerPlan::view(PyObject* object, DLPackTensor* out) const {
  if (exchange_->view(object, out) == 0) return true;
  PyErr_Clear();
  return false;
}

// A gradient that a kernel can take as it is: of its parameter's size and device, contiguous, of a float dtype.
bool OptimizerPlan::read_gradient(PyObject* param, const DLPackTensor& like, int64_t* row, Touched* seen) const {
  PyObject* grad = PyObject_GetAttr(param, gradient_name());
  if (grad == nullptr) PyErr_Clear();
  if (grad == nullptr || grad == Py_None) {
    Py_XDECREF(grad);
    return false;
  }
  DLPackTensor t;
  const bool viewed = view(grad, &t);
  seen->object = grad;
  Py_DECREF(grad);  // the parameter holds it
  if (!viewed) return false;
  seen->tensor = t.shape - 8;  // sizes are part of it
  const int type = float_type(t);
  if (type < 0 || t.device.type != like.device.type || t.device.id != like.device.id || numel(t) != row[6] ||
      !is_contiguous(t)) {
    return false;
  }
  row[1] = address(t);
  row[7] = float_type(like) | type << 8;
  return true;
}

OptimizerPlan::OptimizerPlan(const py::capsule& exchange, const py::list& groups, const py::dict& states,
                             const py::list& rows, const py::tuple& names, uint64_t table)
    : exchange_(static_cast<const DLPackExchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"))),
      table_(reinterpret_cast<int64_t*>(table)) {
  if (exchange_ == nullptr) throw py::error_already_set();
  if (exchange_->version.major != 1 || exchange_->view == nullptr) {
    throw std::invalid_argument("the exchange interface is not DLPack 1");
  }
  std::unordered_map<PyObject*, int64_t> place;
  int64_t index = 0;
  for (const py::handle row : rows) {
    const py::tuple pair = py::reinterpret_borrow<py::tuple>(row);
    const py::handle param = pair[0];
    const py::dict state = pair[1];
    place[param.ptr()] = index;
    int64_t* out = table_ + kColumns * index++;
    DLPackTensor t;
    if (!view(param.ptr(), &t) || !is_contiguous(t) || float_type(t) < 0) {
      throw std::invalid_argument("a parameter is not a contiguous float tensor");
    }
    out[0] = address(t);
    out[6] = numel(t);
    touched_.push_back({});  // the gradient
    touched_.push_back(touched(param));
    for (int k = 0; k < kStateTensors; ++k) {
      const py::object tensor = state[names[k]];
      if (!view(tensor.ptr(), &t) || !is_contiguous(t)) {
        throw std::invalid_argument("a state is not a contiguous tensor");
      }
      out[2 + k] = address(t);
      touched_.push_back(touched(tensor));
    }
  }
  for (const py::handle group : groups) {
    groups_.emplace_back();
    for (const py::handle param : py::reinterpret_borrow<py::list>(group)) {
      const auto found = place.find(param.ptr());
      groups_.back().push_back({param.ptr(), found == place.end() ? -1 : found->second});
    }
  }
  for (const auto& item : states) {
    const py::dict state = py::reinterpret_borrow<py::dict>(item.second);
    const auto found = place.find(item.first.ptr());
    const int64_t row = found == place.end() ? -1 : found->second;
    entries_.push_back(
        {item.first.ptr(), state.ptr(), table_of(state), values_.size(), row < 0 ? 0 : state.size(), row});
    if (row < 0) continue;
    for (const auto& value : state) {
      Value known{};
      for (int k = 0; k < kStateTensors; ++k) {
        if (!value.first.equal(names[k])) continue;
        DLPackTensor t;
        view(value.second.ptr(), &t);
        known = {2 + k, {}, numel(t), t.dtype.bits};
      }
      if (known.column == 0) known.held = py::reinterpret_borrow<py::object>(value.second);
      values_.push_back(known);
    }
  }
}

// Whether a value of a row's state is what it was: one of the four where it lay and of its size, the others themselves.
bool OptimizerPlan::same_value(const Value& known, PyObject* value, const int64_t* row) const {
  if (known.column == 0) return value == known.held.ptr();
  DLPackTensor t;
  return view(value, &t) && address(t) == row[known.column] && numel(t) == known.numel && t.dtype.bits == known.bits;
}

bool OptimizerPlan::same_states(const py::dict& states) const {
  if (states.size() != entries_.size()) return false;
  PyObject *key, *value, *name, *tensor;
  Py_ssize_t at = 0;
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (i + kDictsAhead < entries_.size()) {
      __builtin_prefetch(entries_[i + kDictsAhead].dict);
      prefetch_lines(entries_[i + kDictsAhead].keys, 4);
    }
    const Entry& entry = entries_[i];
    // A parameter in them is alive, so that its address means it and no other. A dict's address alone means nothing.
    if (!PyDict_Next(states.ptr(), &at, &key, &value) || key != entry.param) return false;
    if (entry.row < 0) continue;
    if (i + kRowsAhead < entries_.size()) prefetch(entries_[i + kRowsAhead].row, 2, kStateTensors);
    if (!PyDict_Check(value) || static_cast<size_t>(PyDict_Size(value)) != entry.count) return false;
    Py_ssize_t inner = 0;
    for (size_t k = entry.first; k < entry.first + entry.count; ++k) {
      if (!PyDict_Next(value, &inner, &name, &tensor) ||
          !same_value(values_[k], tensor, table_ + kColumns * entry.row)) {
        return false;
      }
    }
  }
  return true;
}

bool OptimizerPlan::refresh(const py::list& groups, const py::dict& states) {
  if (groups.size() != groups_.size() || !same_states(states)) return false;
  DLPackTensor t;
  for (size_t g = 0; g < groups_.size(); ++g) {
    PyObject* list = PyList_GET_ITEM(groups.ptr(), static_cast<Py_ssize_t>(g));
    const std::vector<Member>& members = groups_[g];
    if (!PyList_Check(list) || PyList_GET_SIZE(list) != static_cast<Py_ssize_t>(members.size())) return false;
    for (size_t i = 0; i < members.size(); ++i) {
      if (i + kRowsAhead < members.size()) prefetch(members[i + kRowsAhead].row, 0, 2);
      const Member& member = members[i];
      PyObject* param = PyList_GET_ITEM(list, static_cast<Py_ssize_t>(i));
      if (param != member.param) return false;
      if (member.row < 0) {
        PyObject* grad = PyObject_GetAttr(param, gradient_name());
        if (grad == nullptr) PyErr_Clear();
        const bool none = grad == Py_None;
        Py_XDECREF(grad);
        if (!none) return false;
        continue;
      }
      int64_t* row = table_ + kColumns * member.row;
      if (!view(param, &t) || address(t) != row[0] || numel(t) != row[6] || !is_contiguous(t) || float_type(t) < 0 ||
          !read_gradient(param, t, row, &touched_[member.row * kTouched])) {
        return false;
      }
    }
  }
  return true;
}

void define_optimizer_plan(py::module_& m) {
  py::class_<OptimizerPlan>(m, "OptimizerPlan",
                            "Pointers of an optimizer's parameters, gradients and states, kept from step to step.")
      .def(
          py::init<const py::capsule&, const py::list&, const py::dict&, const py::list&, const py::tuple&, uint64_t>(),
          py::arg("exchange"), py::arg("groups"), py::arg("states"), py::arg("rows"), py::arg("names"),
          py::arg("table"))
      .def("refresh", &OptimizerPlan::refresh, py::arg("groups"), py::arg("states"));
}

}  // namespace peftkern
