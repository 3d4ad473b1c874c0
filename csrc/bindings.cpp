// pgolf._C: the functions that the files of bindings/ define, for Python.
//
// Pointers arrive as integers (tensor.data_ptr()), so that nothing here depends on torch. The size of
// a buffer follows from the shape beside it, or is given and checked.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <climits>
#include <deque>
#include <new>

#include "bindings/python.h"
#include "build_reason.h"  // written by setup.py: why it built what it built

namespace pgolf::bindings {

namespace {

PyObject* object_of(void* pointer) { return static_cast<PyObject*>(pointer); }

// Of a tuple or list, which are what PySequence_Fast_GET_ITEM takes.
bool is_sequence(PyObject* object) { return PyList_Check(object) || PyTuple_Check(object); }

}  // namespace

void Argument::refuse_type(const char* wanted) const {
  const char* const type = Py_TYPE(object_of(object_))->tp_name;
  throw WrongType(std::string(name_) + " is of type " + type + ": it has to be " + wanted);
}

void Argument::read(int64_t& to) const {
  if (!PyLong_Check(object_of(object_))) refuse_type("an int");
  int overflow = 0;
  to = PyLong_AsLongLongAndOverflow(object_of(object_), &overflow);
  if (overflow) throw std::invalid_argument(std::string(name_) + " does not fit 64 bits");
}

void Argument::read(int& to) const {
  const int64_t value = as<int64_t>();
  if (value < INT_MIN || value > INT_MAX) {
    throw std::invalid_argument(std::string(name_) + " is " + std::to_string(value) +
                                ": it does not fit 32 bits");
  }
  to = static_cast<int>(value);
}

void Argument::read(bool& to) const {
  if (!PyBool_Check(object_of(object_))) refuse_type("a bool");
  to = object_of(object_) == Py_True;
}

void Argument::read(double& to) const {
  if (!PyFloat_Check(object_of(object_)) && !PyLong_Check(object_of(object_))) {
    refuse_type("a float");
  }
  to = PyFloat_AsDouble(object_of(object_));
  if (PyErr_Occurred()) {
    PyErr_Clear();
    throw std::invalid_argument(std::string(name_) + " does not fit a float");
  }
}

void Argument::read(float& to) const { to = static_cast<float>(as<double>()); }

void Argument::read(Address& to) const {
  if (!PyLong_Check(object_of(object_))) refuse_type("an int");
  to.value = static_cast<std::uintptr_t>(PyLong_AsUnsignedLongLong(object_of(object_)));
  if (PyErr_Occurred()) {
    PyErr_Clear();
    throw std::invalid_argument(std::string(name_) + " is no address: it does not fit 64 bits");
  }
}

void Argument::read(Threads& to) const {
  read(to.count);
  if (to.count < 1) {
    throw std::invalid_argument(std::string(name_) + " is " + std::to_string(to.count) +
                                ": it has to be at least 1");
  }
}

void Argument::read(Stream& to) const { to.handle = as<Address>(); }

size_t Argument::length() const {
  if (!is_sequence(object_of(object_))) refuse_type("a list or a tuple");
  return static_cast<size_t>(PySequence_Fast_GET_SIZE(object_of(object_)));
}

void Argument::check_length(size_t wanted) const {
  if (length() != wanted) {
    throw std::invalid_argument("the length of " + std::string(name_) + " is " +
                                std::to_string(length()) + ": it has to be " +
                                std::to_string(wanted));
  }
}

Argument Argument::item(size_t index) const {
  return {name_, PySequence_Fast_GET_ITEM(object_of(object_), index)};
}

Unlocked::Unlocked() : state_(PyEval_SaveThread()) {}
Unlocked::~Unlocked() { PyEval_RestoreThread(static_cast<PyThreadState*>(state_)); }

namespace {

// A function with what Python needs to know of it. Lives as long as the process.
struct Definition {
  Function function;
  std::vector<std::string> names;
  std::string doc;  // "name(a, b)\n--\n\n", which inspect.signature understands
  PyMethodDef method;

  explicit Definition(const Function& f);

  void start(PyObject* const* values, size_t positional, PyObject* keywords) const {
    if (positional > names.size()) {
      throw WrongType("it takes " + std::to_string(names.size()) + " arguments, not " +
                      std::to_string(positional));
    }
    std::vector<Argument> arguments;
    arguments.reserve(names.size());
    for (size_t i = 0; i < names.size(); ++i) {
      arguments.emplace_back(names[i].c_str(), i < positional ? values[i] : nullptr);
    }
    const Py_ssize_t named = keywords ? PyTuple_GET_SIZE(keywords) : 0;
    for (Py_ssize_t i = 0; i < named; ++i) {
      Argument& argument = find(arguments, PyTuple_GET_ITEM(keywords, i));
      if (!argument.missing()) throw WrongType(std::string(argument.name()) + " is given twice");
      argument = {argument.name(), values[positional + static_cast<size_t>(i)]};
    }
    for (const Argument& argument : arguments) {
      if (argument.missing()) throw WrongType(std::string(argument.name()) + " is missing");
    }
    function.call(arguments.data());
  }

 private:
  static Argument& find(std::vector<Argument>& arguments, PyObject* name) {
    for (Argument& argument : arguments) {
      if (PyUnicode_CompareWithASCIIString(name, argument.name()) == 0) return argument;
    }
    const char* const text = PyUnicode_AsUTF8(name);
    if (text == nullptr) PyErr_Clear();
    throw WrongType(std::string("it has no argument ") + (text ? text : "of that name"));
  }
};

PyObject* raise(PyObject* type, const char* message) {
  PyErr_SetString(type, message);
  return nullptr;
}

// What body() returns, or nullptr with an exception of Python for what it throws.
template <typename Body>
PyObject* translated(const std::string& where, const Body& body) {
  try {
    return body();
  } catch (const WrongType& e) {
    return raise(PyExc_TypeError, (where + ": " + e.what()).c_str());
  } catch (const std::invalid_argument& e) {
    return raise(PyExc_ValueError, e.what());
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& e) {
    return raise(PyExc_RuntimeError, e.what());
  }
}

PyObject* call(PyObject* self, PyObject* const* values, Py_ssize_t count, PyObject* keywords) {
  const auto* const definition =
      static_cast<const Definition*>(PyCapsule_GetPointer(self, nullptr));
  if (definition == nullptr) return nullptr;
  return translated(definition->function.name, [&]() -> PyObject* {
    definition->start(values, static_cast<size_t>(count), keywords);
    Py_RETURN_NONE;
  });
}

Definition::Definition(const Function& f) : function(f) {
  std::string word;
  for (const char* c = f.arguments;; ++c) {
    if (*c != ' ' && *c != '\0') {
      word += *c;
      continue;
    }
    names.push_back(word);
    word.clear();
    if (*c == '\0') break;
  }
  doc = f.name + std::string("(");
  for (size_t i = 0; i < names.size(); ++i) doc += (i ? ", " : "") + names[i];
  doc += ")\n--\n\n";
  const auto with_keywords = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call));
  method = {f.name, with_keywords, METH_FASTCALL | METH_KEYWORDS, doc.c_str()};
}

// All of them, made once.
std::deque<Definition>& definitions() {
  static std::deque<Definition>* const all = [] {
    auto* const made = new std::deque<Definition>;
    for (const Functions* f = Functions::newest; f; f = f->next) {
      for (const Function& function : f->functions) made->emplace_back(function);
    }
    return made;
  }();
  return *all;
}

// Adds a new reference to a module or dictionary and lets go of it; false with an exception.
bool add(PyObject* module, const char* name, PyObject* value) {
  const bool added = value && PyModule_AddObjectRef(module, name, value) == 0;
  Py_XDECREF(value);
  return added;
}

bool set(PyObject* dictionary, const char* name, PyObject* value) {
  const bool added = value && PyDict_SetItemString(dictionary, name, value) == 0;
  Py_XDECREF(value);
  return added;
}

PyObject* build_info(PyObject*, PyObject*) {
  PyObject* const info =
      Py_BuildValue("{s:s,s:O,s:s,s:s,s:s}", "compiler", PGOLF_COMPILER, "cuda",
                    PGOLF_CUDA ? Py_True : Py_False, "nvcc", PGOLF_NVCC, "cudart", PGOLF_CUDART,
                    "reason", PGOLF_REASON);
  if (info == nullptr) return nullptr;
  PyObject* const archs = PyUnicode_FromString(PGOLF_ARCHS);
  const bool done = archs && set(info, "archs", PyUnicode_Split(archs, nullptr, -1));
  Py_XDECREF(archs);
  if (done) return info;
  Py_DECREF(info);
  return nullptr;
}

PyObject* cpu_isa(PyObject*, PyObject*) {
  return translated("cpu_isa", [] { return PyUnicode_FromString(cpu::isa()); });
}

PyMethodDef methods[] = {
    {"build_info", &build_info, METH_NOARGS, "What this module was built with, and why."},
    {"cpu_isa", &cpu_isa, METH_NOARGS, "The instruction set of the CPU kernels in this process."},
    {nullptr, nullptr, 0, nullptr},
};

bool add_functions(PyObject* module) {
  for (Definition& definition : definitions()) {
    PyObject* const self = PyCapsule_New(&definition, nullptr, nullptr);
    if (self == nullptr) return false;
    PyObject* const function = PyCFunction_New(&definition.method, self);
    Py_DECREF(self);
    if (!add(module, definition.function.name, function)) return false;
  }
  return true;
}

bool add_constants(PyObject* module) {
  PyObject* const constants = PyDict_New();
  if (constants == nullptr) return false;
  bool good = true;
  for (const Functions* f = Functions::newest; f && good; f = f->next) {
    for (const Constant& c : f->constants) {
      good = good && set(constants, c.path, PyLong_FromLongLong(c.value));
    }
  }
  return add(module, "constants", constants) && good;
}

int fill(PyObject* module) { return add_functions(module) && add_constants(module) ? 0 : -1; }

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(&fill)},
    {0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "pgolf's C++ and CUDA kernels; use them through pgolf.ops",
    0,
    methods,
    slots,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace
}  // namespace pgolf::bindings

PyMODINIT_FUNC PyInit__C() { return PyModuleDef_Init(&pgolf::bindings::definition); }
