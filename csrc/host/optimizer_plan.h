// The parameters, gradients and states of an optimizer whose shape stays from step to step, as a table of pointers for
// adamw8bit_step_table_: what a step needs of Python's objects, read in one pass.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "host/tensor_reader.h"

namespace peftkern {

// Where a tensor lay when it was last read, for a prefetch, which may be of anything.
struct Touched {
  const void *object, *tensor, *storage;  // of Python, and the two of C++

  void prefetch() const;
};

class OptimizerPlan {
 public:
  static constexpr int kColumns = 8;  // param, grad, four of the state, numel, types

  // groups: the lists of parameters of all groups. states: the optimizer's, from parameter to
  // its dict. rows: for every row of the table the parameter and its dict. names: of the four tensors of a row's state.
  // table: where the rows lie. Nothing holds on to a parameter, a gradient or these four, so that whoever moves them
  // elsewhere gets their memory back; the few small things that states share are held.
  //
  // Raises ValueError for tensors that the table cannot hold.
  OptimizerPlan(const pybind11::list& groups, const pybind11::dict& states, const pybind11::list& rows,
                const pybind11::tuple& names, uint64_t table);

  // Writes the gradients' pointers and dtypes. False where anything else is not as it was: the plan is then worth
  // nothing.
  bool refresh(const pybind11::list& groups, const pybind11::dict& states);

 private:
  struct Member {  // of a group
    PyObject* param;
    int64_t row;  // of the table, or -1: without a gradient
  };
  struct Entry {  // of the optimizer's states
    PyObject* param;
    const void *dict, *keys;  // of its state, for a prefetch
    size_t first, count;      // of its values, in its order
    int64_t row;              // of the table, or -1
  };
  struct Value {
    int column;             // of the table, for one of the four, or 0
    pybind11::object held;  // where column is 0
    int64_t numel;
    int32_t type;
  };

  void prefetch(int64_t row, int first, int count) const;
  bool same_states(const pybind11::dict& states) const;
  bool same_value(const Value& known, PyObject* value, const int64_t* row) const;
  Touched touched(pybind11::handle tensor) const;
  int float_type(AtenTensorHandle tensor) const;
  bool same_parameter(PyObject* param, const int64_t* row) const;
  bool read_gradient(PyObject* param, int64_t* row, Touched* seen) const;

  TensorReader reader_;
  int32_t float_types_[3];  // of torch, in the order of AdamWType
  TensorDevice device_;
  std::vector<std::vector<Member>> groups_;
  std::vector<Entry> entries_;
  std::vector<Value> values_;     // of the states' dicts
  std::vector<Touched> touched_;  // six a row: gradient, parameter, states
  int64_t* table_;
};

void define_optimizer_plan(pybind11::module_& m);

}  // namespace peftkern
