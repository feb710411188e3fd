// rnnfast._direct_calls: RNN.forward and RNNCell.forward where nothing about the call is special, which
// cost less this way. The smallest calls spend more time on the way to the op than in it: torch.ops makes
// values of all arguments by the op's schema, and looking up in Python what a module holds takes as
// long (notes/cpu.md, "Calls"). Whatever else may be the case, from a subclass of Tensor to a trace, is
// left to rnnfast/modules.py: the functions return None, and have done nothing.
//
// A library of its own, so that the one of the ops needs no Python. It keeps to Python's stable ABI, which
// torch's headers for Python do not: the little that is taken from libtorch_python is declared here.
#undef Py_LIMITED_API  // some versions of torch ask for more than they need
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <ATen/ATen.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <exception>
#include <optional>
#include <tuple>
#include <utility>

// torch/csrc/autograd/python_variable.h and torch/csrc/Exceptions.h
extern PyObject* THPVariableClass;
extern PyObject* ParameterClass;
PyObject* THPVariable_Wrap(at::TensorBase&& x);
namespace torch {
void translate_exception_to_python(const std::exception_ptr& error);
}

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The beginning of torch's THPVariable; PyInit__direct_calls makes sure of it.
struct TensorObject {
  PyObject_HEAD
  Tensor tensor;
};

// Null for all but tensors and parameters: torch.ops asks subclasses what is to be done.
const Tensor* plain_tensor(PyObject* x) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
  const bool plain = type == THPVariableClass || type == ParameterClass;
  return plain ? &reinterpret_cast<TensorObject*>(x)->tensor : nullptr;
}

bool has_cpu_kernels(const Tensor* x) {
  if (x == nullptr || !x->is_cpu()) return false;
  const auto dtype = x->scalar_type();
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

// Into `to`; false where the object is neither None nor plain.
bool read(PyObject* x, OptionalTensor& to) {
  if (x == Py_None) return true;
  const Tensor* tensor = plain_tensor(x);
  if (tensor == nullptr) return false;
  to = *tensor;
  return true;
}

bool is_observed() {
  return at::impl::torch_function_mode_enabled() || c10::impl::dispatch_mode_enabled() ||
         at::tracer::impl::is_dispatch_enabled();
}

struct ReleasedGil {
  PyThreadState* const state = PyEval_SaveThread();
  ~ReleasedGil() { PyEval_RestoreThread(state); }
};

PyObject* no_result() { Py_RETURN_NONE; }

// Its errors become Python's, but for that of a derivative that the op does not have.
template <class Call>
PyObject* with_errors_translated(const Call& call) {
  try {
    return call();
  } catch (const c10::NotImplementedError&) {
    return no_result();
  } catch (const std::exception&) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

#define RNNFAST_NAMES(f)                                                                   \
  f(_parameters) f(_flat_weights) f(_flat_weights_names) f(mode) f(nonlinearity) f(bias)   \
  f(num_layers) f(dropout) f(training) f(bidirectional) f(batch_first) f(weight_ih)        \
  f(weight_hh) f(bias_ih) f(bias_hh)

struct Names {
#define RNNFAST_NAME(name) PyObject* name = PyUnicode_InternFromString(#name);
  RNNFAST_NAMES(RNNFAST_NAME)
#undef RNNFAST_NAME
};

const Names& names() {
  static const Names all;
  return all;
}

// What a module holds, without its __getattr__. References are borrowed; null is for what is not there
// or is no such thing.
class Module {
 public:
  explicit Module(PyObject* module) : held_(PyObject_GenericGetDict(module, nullptr)) {
    if (held_ == nullptr) PyErr_Clear();
  }
  ~Module() { Py_XDECREF(held_); }
  Module(const Module&) = delete;

  PyObject* get(PyObject* name) const {
    return held_ == nullptr ? nullptr : PyDict_GetItemWithError(held_, name);  // a string has none
  }
  PyObject* dict(PyObject* name) const {
    PyObject* x = get(name);
    return x != nullptr && PyDict_Check(x) ? x : nullptr;
  }
  PyObject* list(PyObject* name) const {
    PyObject* x = get(name);
    return x != nullptr && PyList_Check(x) ? x : nullptr;
  }
  std::optional<bool> flag(PyObject* name) const {
    PyObject* x = get(name);
    if (x == Py_True) return true;
    if (x == Py_False) return false;
    return std::nullopt;
  }
  std::optional<double> number(PyObject* name) const {
    PyObject* x = get(name);
    if (x == nullptr || !(PyFloat_Check(x) || PyLong_Check(x))) return std::nullopt;
    const double value = PyFloat_AsDouble(x);
    if (value == -1 && PyErr_Occurred() != nullptr) {
      PyErr_Clear();
      return std::nullopt;
    }
    return value;
  }
  // "tanh" or "relu"; null for neither.
  const char* one_of(PyObject* name, const char* tanh, const char* relu) const {
    PyObject* x = get(name);
    if (x == nullptr || !PyUnicode_Check(x)) return nullptr;
    if (PyUnicode_CompareWithASCIIString(x, tanh) == 0) return "tanh";
    if (PyUnicode_CompareWithASCIIString(x, relu) == 0) return "relu";
    return nullptr;
  }

 private:
  PyObject* held_;
};

using Weights = c10::SmallVector<Tensor, 8>;

// The weights of an RNN, if they are the registered parameters, as nn.RNN makes sure before each call.
bool read_weights(const Module& module, Weights& to) {
  PyObject* const parameters = module.dict(names()._parameters);
  PyObject* const keys = module.list(names()._flat_weights_names);
  PyObject* const flat = module.list(names()._flat_weights);
  if (parameters == nullptr || keys == nullptr || flat == nullptr) return false;
  const Py_ssize_t n = PyList_Size(keys);
  if (PyList_Size(flat) != n) return false;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* const w = PyList_GetItem(flat, i);
    PyObject* const key = PyList_GetItem(keys, i);
    const Tensor* weight = plain_tensor(w);
    if (weight == nullptr || !PyUnicode_Check(key)) return false;
    if (PyDict_GetItemWithError(parameters, key) != w) return false;
    to.push_back(*weight);
  }
  return true;
}

// rnn(module, input, hx, batch_sizes) -> (output, h_n) or None
PyObject* rnn(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  using Signature = std::tuple<Tensor, Tensor>(
      const Tensor&, const OptionalTensor&, at::TensorList, const OptionalTensor&, c10::string_view,
      bool, int64_t, double, bool, bool);
  if (count != 4 || is_observed()) return no_result();
  const Module module(arguments[0]);
  const Tensor* x = plain_tensor(arguments[1]);
  OptionalTensor hx, batch_sizes;
  Weights weights;
  if (!has_cpu_kernels(x) || !read(arguments[2], hx) || !read(arguments[3], batch_sizes) ||
      !read_weights(module, weights)) {
    return no_result();
  }
  const Names& name = names();
  const char* nonlinearity = module.one_of(name.mode, "RNN_TANH", "RNN_RELU");
  const auto layers = module.number(name.num_layers), dropout = module.number(name.dropout);
  const auto bias = module.flag(name.bias), training = module.flag(name.training);
  const auto bidirectional = module.flag(name.bidirectional);
  const auto batch_first = module.flag(name.batch_first);
  if (nonlinearity == nullptr || !layers || !dropout || !bias || !training || !bidirectional ||
      !batch_first) {
    return no_result();
  }
  return with_errors_translated([&]() -> PyObject* {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rnnfast::rnn", "")
                               .typed<Signature>();
    const Tensor input = *x;
    std::tuple<Tensor, Tensor> results;
    {
      const ReleasedGil released;
      results = op.call(input, hx, weights, batch_sizes, nonlinearity, *bias, int64_t(*layers),
                        *training ? *dropout : 0.0, *bidirectional, *batch_first);
    }
    PyObject* const output = THPVariable_Wrap(std::move(std::get<0>(results)));
    PyObject* const h_n = THPVariable_Wrap(std::move(std::get<1>(results)));
    PyObject* const pair = output && h_n ? PyTuple_Pack(2, output, h_n) : nullptr;
    Py_XDECREF(output);
    Py_XDECREF(h_n);
    return pair;
  });
}

// rnn_cell(module, input, hx) -> h or None
PyObject* rnn_cell(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  using Signature = Tensor(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                           const OptionalTensor&, const OptionalTensor&, c10::string_view);
  if (count != 3 || is_observed()) return no_result();
  const Module module(arguments[0]);
  const Tensor* x = plain_tensor(arguments[1]);
  OptionalTensor hx;
  const Names& name = names();
  const char* nonlinearity = module.one_of(name.nonlinearity, "tanh", "relu");
  PyObject* const parameters = module.dict(name._parameters);
  if (!has_cpu_kernels(x) || !read(arguments[2], hx) || nonlinearity == nullptr ||
      parameters == nullptr) {
    return no_result();
  }
  OptionalTensor weights[4];
  PyObject* const keys[4] = {name.weight_ih, name.weight_hh, name.bias_ih, name.bias_hh};
  for (int i = 0; i < 4; ++i) {
    PyObject* const w = PyDict_GetItemWithError(parameters, keys[i]);
    if (w == nullptr || !read(w, weights[i])) return no_result();
  }
  if (!weights[0] || !weights[1]) return no_result();
  return with_errors_translated([&] {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rnnfast::rnn_cell", "")
                               .typed<Signature>();
    const Tensor input = *x;
    Tensor h;
    {
      const ReleasedGil released;
      h = op.call(input, hx, *weights[0], *weights[1], weights[2], weights[3], nonlinearity);
    }
    return THPVariable_Wrap(std::move(h));
  });
}

PyMethodDef functions[] = {
    {"rnn", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(rnn)), METH_FASTCALL,
     "rnn(module, input, hx, batch_sizes): what RNN.forward returns, or None if not plain."},
    {"rnn_cell", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(rnn_cell)), METH_FASTCALL,
     "rnn_cell(module, input, hx): what RNNCell.forward returns, or None if not plain."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "rnnfast._direct_calls",
                          "Plain calls of the modules, straight to the ops.", -1, functions};

}  // namespace

PyMODINIT_FUNC PyInit__direct_calls() {
  return with_errors_translated([]() -> PyObject* {
    const Tensor x = at::empty({0});
    PyObject* const object = THPVariable_Wrap(Tensor(x));
    if (object == nullptr) return nullptr;
    const Tensor* read = plain_tensor(object);
    const bool known = read != nullptr && read->unsafeGetTensorImpl() == x.unsafeGetTensorImpl();
    Py_DECREF(object);
    if (!known) {
      PyErr_SetString(PyExc_ImportError, "this torch lays out its tensors' Python objects otherwise");
      return nullptr;
    }
    return PyModule_Create(&definition);
  });
}
