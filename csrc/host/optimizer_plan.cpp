#include "host/optimizer_plan.h"

#include <stdexcept>
#include <unordered_map>

namespace py = pybind11;

namespace peftkern {
namespace {

constexpr int kStateTensors = 4;
constexpr int kTouched = kStateTensors + 2;  // of a row: the gradient, the parameter, the states

// A step's objects are cold, and each is a chain of pointers: rows, and dicts, are asked for so many ahead.
constexpr size_t kRowsAhead = 8, kDictsAhead = 20;

void prefetch_lines(const void* from, int lines) {
  for (int i = 0; i < lines; ++i) __builtin_prefetch(static_cast<const char*>(from) + 64 * i);
}

// Where a dict's keys and values lie.
const void* table_of(py::handle dict) {
  return reinterpret_cast<const PyDictObject*>(dict.ptr())->ma_keys;
}

// None where there is none; null after an error, which is cleared.
py::object gradient_of(PyObject* param) {
  static PyObject* const name = PyUnicode_InternFromString("grad");
  PyObject* const grad = PyObject_GetAttr(param, name);
  if (grad == nullptr) PyErr_Clear();
  return py::reinterpret_steal<py::object>(grad);
}

}  // namespace

void Touched::prefetch() const {
  __builtin_prefetch(object);
  prefetch_lines(tensor, 4);
  prefetch_lines(storage, 2);
}

void OptimizerPlan::prefetch(int64_t row, int first, int count) const {
  if (row < 0) return;
  for (int i = first; i < first + count; ++i) touched_[row * kTouched + i].prefetch();
}

// Of a type that a kernel takes: its AdamWType, or -1.
int OptimizerPlan::float_type(AtenTensorHandle tensor) const {
  const int32_t type = scalar_type(tensor);
  for (int i = 0; i < 3; ++i) {
    if (float_types_[i] == type) return i;
  }
  return -1;
}

// A gradient that a kernel can take as it is: of its parameter's size and device, contiguous, of a float dtype.
bool OptimizerPlan::read_gradient(PyObject* param, int64_t* row, Touched* seen) const {
  const py::object grad = gradient_of(param);
  if (!grad || !reader_.takes(grad.ptr())) return false;
  *seen = {grad.ptr(), reader_.implementation(grad.ptr()), nullptr};
  const AtenTensorHandle g = reader_.handle(grad.ptr());
  const int type = float_type(g);
  if (!is_strided(g) || type < 0 || numel(g) != row[6] || !is_contiguous(g) || !(TensorDevice(g) == device_)) {
    return false;
  }
  row[1] = address(g);
  row[7] = float_type(reader_.handle(param)) | type << 8;
  return row[1] >= 0;
}

bool OptimizerPlan::same_parameter(PyObject* param, const int64_t* row) const {
  if (!reader_.takes(param)) return false;
  const AtenTensorHandle p = reader_.handle(param);
  return address(p) == row[0] && numel(p) == row[6] && is_contiguous(p) && float_type(p) >= 0;
}

Touched OptimizerPlan::touched(py::handle tensor) const {
  const py::object storage = py::getattr(tensor.attr("untyped_storage")(), "_cdata", py::int_(0));
  return {tensor.ptr(), reader_.implementation(tensor.ptr()), reinterpret_cast<const void*>(storage.cast<uintptr_t>())};
}

OptimizerPlan::OptimizerPlan(const py::list& groups, const py::dict& states, const py::list& rows,
                             const py::tuple& names, uint64_t table)
    : reader_(py::tuple(rows[0])[0]),
      float_types_{aoti_torch_dtype_float32(), aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16()},
      table_(reinterpret_cast<int64_t*>(table)) {
  std::unordered_map<PyObject*, int64_t> place;
  int64_t index = 0;
  for (const py::handle row : rows) {
    const py::tuple pair = py::reinterpret_borrow<py::tuple>(row);
    const py::handle param = pair[0];
    const py::dict state = pair[1];
    place[param.ptr()] = index;
    int64_t* out = table_ + kColumns * index++;
    if (!reader_.takes(param.ptr())) throw std::invalid_argument("a parameter is of a tensor type of its own");
    const AtenTensorHandle p = reader_.handle(param.ptr());
    if (!is_strided(p) || !is_contiguous(p) || float_type(p) < 0) {
      throw std::invalid_argument("a parameter is not a contiguous float tensor");
    }
    if (out == table_) device_ = TensorDevice(p);
    if (!(TensorDevice(p) == device_)) throw std::invalid_argument("parameters are on several devices");
    out[0] = address(p);
    out[6] = numel(p);
    touched_.push_back({});  // the gradient
    touched_.push_back(touched(param));
    for (int k = 0; k < kStateTensors; ++k) {
      const py::object tensor = state[names[k]];
      if (!reader_.takes(tensor.ptr()) || !is_contiguous(reader_.handle(tensor.ptr()))) {
        throw std::invalid_argument("a state is not a contiguous tensor");
      }
      out[2 + k] = address(reader_.handle(tensor.ptr()));
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
        const AtenTensorHandle t = reader_.handle(value.second.ptr());
        known = {2 + k, {}, numel(t), scalar_type(t)};
      }
      if (known.column == 0) known.held = py::reinterpret_borrow<py::object>(value.second);
      values_.push_back(known);
    }
  }
}

// Whether a value of a row's state is what it was: one of the four where it lay and of its size, the others themselves.
bool OptimizerPlan::same_value(const Value& known, PyObject* value, const int64_t* row) const {
  if (known.column == 0) return value == known.held.ptr();
  if (!reader_.takes(value)) return false;
  const AtenTensorHandle t = reader_.handle(value);
  return address(t) == row[known.column] && numel(t) == known.numel && scalar_type(t) == known.type;
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
        const py::object grad = gradient_of(param);
        if (!grad || !grad.is_none()) return false;
        continue;
      }
      int64_t* row = table_ + kColumns * member.row;
      if (!same_parameter(param, row) || !read_gradient(param, row, &touched_[member.row * kTouched])) return false;
    }
  }
  return true;
}

void define_optimizer_plan(py::module_& m) {
  py::class_<OptimizerPlan>(m, "OptimizerPlan",
                            "Pointers of an optimizer's parameters, gradients and states, kept from step to step.")
      .def(py::init<const py::list&, const py::dict&, const py::list&, const py::tuple&, uint64_t>(), py::arg("groups"),
           py::arg("states"), py::arg("rows"), py::arg("names"), py::arg("table"))
      .def("refresh", &OptimizerPlan::refresh, py::arg("groups"), py::arg("states"));
}

}  // namespace peftkern
