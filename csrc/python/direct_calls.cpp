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
#include <ATen/EmptyTensor.h>
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
PyObject* THPVariable_Wrap(const at::TensorBase& x);
namespace torch {
void translate_exception_to_python(const std::exception_ptr& error);
}

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The beginning of torch's THPVariable, which PyInit__direct_calls makes sure of.
struct TensorObject {
  PyObject_HEAD
  Tensor tensor;
};
bool layout_is_known = false;

// Null for all but tensors and parameters: torch.ops asks subclasses what is to be done.
const Tensor* plain_tensor(PyObject* x) {
  if (x == nullptr || !layout_is_known) return nullptr;
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
  const bool plain = type == THPVariableClass || type == ParameterClass;
  return plain ? &reinterpret_cast<TensorObject*>(x)->tensor : nullptr;
}

// Into `to`; false where the object is neither None nor plain.
bool read(PyObject* x, OptionalTensor& to) {
  if (x == Py_None) return true;
  const Tensor* tensor = plain_tensor(x);
  if (tensor == nullptr) return false;
  to = *tensor;
  return true;
}

// As _why_not_cpu of rnnfast/backends.py.
bool has_cpu_kernels(const Tensor* x) {
  if (x == nullptr || !x->is_cpu()) return false;
  const auto dtype = x->scalar_type();
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

bool is_observed() {
  return at::impl::torch_function_mode_enabled() || c10::impl::dispatch_mode_enabled() ||
         at::tracer::impl::is_dispatch_enabled();
}

PyObject* name_of(const char* attribute) { return PyUnicode_InternFromString(attribute); }

struct Names {
  PyObject* const parameters = name_of("_parameters");
  PyObject* const flat_weights = name_of("_flat_weights");
  PyObject* const flat_weights_names = name_of("_flat_weights_names");
  PyObject* const mode = name_of("mode");
  PyObject* const nonlinearity = name_of("nonlinearity");
  PyObject* const bias = name_of("bias");
  PyObject* const num_layers = name_of("num_layers");
  PyObject* const dropout = name_of("dropout");
  PyObject* const training = name_of("training");
  PyObject* const bidirectional = name_of("bidirectional");
  PyObject* const batch_first = name_of("batch_first");
  PyObject* const cell_weights[4] = {name_of("weight_ih"), name_of("weight_hh"), name_of("bias_ih"),
                                     name_of("bias_hh")};
};

const Names& names() {
  static const Names all;
  return all;
}

// A module's dictionary; the caller has seen to it that its class has nothing to say about it.
// References are borrowed; null, or no value, stands for what is absent or of another kind.
class Attributes {
 public:
  explicit Attributes(PyObject* module) : held_(PyObject_GenericGetDict(module, nullptr)) {}
  ~Attributes() { Py_XDECREF(held_); }
  Attributes(const Attributes&) = delete;

  PyObject* get(PyObject* name) const {
    return held_ == nullptr ? nullptr : PyDict_GetItemWithError(held_, name);
  }
  PyObject* dict(PyObject* name) const {
    PyObject* x = get(name);
    return x != nullptr && PyDict_CheckExact(x) ? x : nullptr;
  }
  PyObject* list(PyObject* name) const {
    PyObject* x = get(name);
    return x != nullptr && PyList_CheckExact(x) ? x : nullptr;
  }
  std::optional<bool> flag(PyObject* name) const {
    PyObject* x = get(name);
    if (x == Py_True) return true;
    if (x == Py_False) return false;
    return std::nullopt;
  }
  std::optional<int64_t> integer(PyObject* name) const {
    PyObject* x = get(name);
    if (x == nullptr || !PyLong_Check(x)) return std::nullopt;
    const int64_t value = PyLong_AsLongLong(x);
    return value == -1 && PyErr_Occurred() ? std::nullopt : std::optional<int64_t>(value);
  }
  std::optional<double> number(PyObject* name) const {
    PyObject* x = get(name);
    if (x == nullptr || !(PyFloat_Check(x) || PyLong_Check(x))) return std::nullopt;
    const double value = PyFloat_AsDouble(x);
    return value == -1 && PyErr_Occurred() ? std::nullopt : std::optional<double>(value);
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
bool read_weights(const Attributes& module, Weights& to) {
  PyObject* const parameters = module.dict(names().parameters);
  PyObject* const keys = module.list(names().flat_weights_names);
  PyObject* const flat = module.list(names().flat_weights);
  if (parameters == nullptr || keys == nullptr || flat == nullptr) return false;
  const Py_ssize_t n = PyList_Size(keys);
  if (PyList_Size(flat) != n) return false;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject *const w = PyList_GetItem(flat, i), *const key = PyList_GetItem(keys, i);
    const Tensor* weight = plain_tensor(w);
    if (weight == nullptr || key == nullptr || !PyUnicode_CheckExact(key)) return false;
    if (PyDict_GetItemWithError(parameters, key) != w) return false;
    to.push_back(*weight);
  }
  return true;
}

struct ReleasedGil {
  PyThreadState* const state = PyEval_SaveThread();
  ~ReleasedGil() { PyEval_RestoreThread(state); }
};

// Whatever a lookup raised, Python's way will find again.
PyObject* not_plain() {
  PyErr_Clear();
  Py_RETURN_NONE;
}

template <class Call>
PyObject* with_errors_translated(const Call& call) {
  try {
    return call();
  } catch (const std::exception&) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

// rnn(module, input, hx, batch_sizes) -> (output, h_n) or None
PyObject* rnn(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  using Signature = std::tuple<Tensor, Tensor>(
      const Tensor&, const OptionalTensor&, at::TensorList, const OptionalTensor&, c10::string_view,
      bool, int64_t, double, bool, bool);
  if (count != 4 || is_observed()) return not_plain();
  const Attributes module(arguments[0]);
  const Tensor* x = plain_tensor(arguments[1]);
  OptionalTensor hx, batch_sizes;
  Weights weights;
  if (!has_cpu_kernels(x) || !read(arguments[2], hx) || !read(arguments[3], batch_sizes) ||
      !read_weights(module, weights)) {
    return not_plain();
  }
  const Names& name = names();
  const char* nonlinearity = module.one_of(name.mode, "RNN_TANH", "RNN_RELU");
  const auto num_layers = module.integer(name.num_layers);
  const auto dropout = module.number(name.dropout);
  const auto bias = module.flag(name.bias), training = module.flag(name.training);
  const auto bidirectional = module.flag(name.bidirectional);
  const auto batch_first = module.flag(name.batch_first);
  if (nonlinearity == nullptr || !num_layers || !dropout || !bias || !training || !bidirectional ||
      !batch_first) {
    return not_plain();
  }
  return with_errors_translated([&]() -> PyObject* {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rnnfast::rnn", "")
                               .typed<Signature>();
    const Tensor input = *x;
    std::tuple<Tensor, Tensor> results;
    {
      const ReleasedGil released;
      results = op.call(input, hx, weights, batch_sizes, nonlinearity, *bias, *num_layers,
                        *training ? *dropout : 0.0, *bidirectional, *batch_first);
    }
    PyObject* const output = THPVariable_Wrap(std::move(std::get<0>(results)));
    PyObject* const h_n = output ? THPVariable_Wrap(std::move(std::get<1>(results))) : nullptr;
    PyObject* const pair = h_n ? PyTuple_Pack(2, output, h_n) : nullptr;
    Py_XDECREF(output);
    Py_XDECREF(h_n);
    return pair;
  });
}

// rnn_cell(module, input, hx) -> h or None
PyObject* rnn_cell(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  using Signature = Tensor(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
                           const OptionalTensor&, const OptionalTensor&, c10::string_view);
  if (count != 3 || is_observed()) return not_plain();
  const Attributes module(arguments[0]);
  const Tensor* x = plain_tensor(arguments[1]);
  OptionalTensor hx, weights[4];
  const char* nonlinearity = module.one_of(names().nonlinearity, "tanh", "relu");
  PyObject* const parameters = module.dict(names().parameters);
  if (!has_cpu_kernels(x) || !read(arguments[2], hx) || nonlinearity == nullptr ||
      parameters == nullptr) {
    return not_plain();
  }
  for (int i = 0; i < 4; ++i) {
    PyObject* const w = PyDict_GetItemWithError(parameters, names().cell_weights[i]);
    if (w == nullptr || !read(w, weights[i])) return not_plain();
  }
  if (!weights[0] || !weights[1]) return not_plain();
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
    const Tensor x = at::detail::empty_cpu({0}, at::kFloat);  // whatever mode is on
    PyObject* const object = THPVariable_Wrap(x);
    if (object == nullptr) return nullptr;
    const auto& read = reinterpret_cast<TensorObject*>(object)->tensor;
    layout_is_known = read.unsafeGetTensorImpl() == x.unsafeGetTensorImpl();
    Py_DECREF(object);
    return PyModule_Create(&definition);
  });
}
