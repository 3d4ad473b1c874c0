// How a file of this folder gives functions to Python. The C API of Python stays in bindings.cpp:
// what stands here is compiled with every binding.
//
// A binding is a function, or one template for both devices over `On`, its last parameter: Threads
// for `NAME`, Stream for `NAME_cuda`. It checks its arguments (checks.h) and starts a launcher:
//
//   template <typename On>
//   void xsa(Address y, Address z, int dtype, int64_t n, On on) {
//     ...
//     launch::xsa(on, shape, y, z);
//   }
//
//   const Functions functions = {PGOLF_BOTH(xsa, "y z dtype n")};
//
// The string names the arguments but the last. They are converted with the GIL, and the function
// runs without it; what it throws becomes an exception of Python.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "build_info.h"  // written by setup.py: PGOLF_CUDA says whether there are CUDA kernels
#include "kernels.h"

namespace pgolf::bindings {

// Where a tensor's data lie; 0 is a null pointer.
struct Address {
  std::uintptr_t value;

  explicit operator bool() const { return value != 0; }
  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

// The device that a binding is for.
struct Threads {
  static constexpr bool on_cpu = true;
  int count;  // the most to use
};
struct Stream {
  static constexpr bool on_cpu = false;
  void* handle;
};

// launch::NAME(on, arguments of the launcher but its last); throws std::runtime_error with the text
// of a CUDA error.
namespace launch {

inline void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA error: ") + error);
}

#define PGOLF_CPU_LAUNCHER(name, ...)                  \
  template <typename... Arguments>                     \
  void name(Threads on, const Arguments&... arguments) { \
    cpu::kernels().name(arguments..., on.count);       \
  }
#define PGOLF_LAUNCHER(name, ...)                     \
  PGOLF_CPU_LAUNCHER(name, __VA_ARGS__)               \
  template <typename... Arguments>                    \
  void name(Stream on, const Arguments&... arguments) { \
    check(cuda::name(arguments..., on.handle));       \
  }
#include "launchers.def"

}  // namespace launch

// An argument as Python passed it. What cannot be converted throws WrongType, and a number that does
// not fit std::invalid_argument, with the argument's name.
struct WrongType : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

class Argument {
 public:
  Argument(const char* name, void* object) : name_(name), object_(object) {}

  template <typename T>
  T as() const {
    T value{};
    read(value);
    return value;
  }
  bool missing() const { return object_ == nullptr; }
  const char* name() const { return name_; }

 private:
  void read(int64_t& to) const;
  void read(int& to) const;
  void read(bool& to) const;
  void read(double& to) const;
  void read(float& to) const;
  void read(Address& to) const;
  void read(Threads& to) const;
  void read(Stream& to) const;
  // A list or tuple.
  template <typename T>
  void read(std::vector<T>& to) const {
    to.reserve(length());
    for (size_t i = 0; i < length(); ++i) to.push_back(item(i).as<T>());
  }
  template <typename T, size_t kLength>
  void read(std::array<T, kLength>& to) const {
    check_length(kLength);
    for (size_t i = 0; i < kLength; ++i) to[i] = item(i).as<T>();
  }
  template <typename... T>
  void read(std::tuple<T...>& to) const {
    check_length(sizeof...(T));
    size_t i = 0;
    std::apply([&](auto&... values) { (item(i++).read(values), ...); }, to);
  }
  size_t length() const;
  void check_length(size_t length) const;
  Argument item(size_t index) const;
  [[noreturn]] void refuse_type(const char* wanted) const;

  const char* name_;
  void* object_;  // PyObject*, borrowed; null where it is missing
};

// Another thread of Python may run while it lives.
class Unlocked {
 public:
  Unlocked();
  ~Unlocked();
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  void* state_;
};

struct Function {
  const char* name;
  const char* arguments;  // their names, separated by spaces
  void (*call)(const Argument* arguments);
};

template <auto function>
struct Caller;
template <typename... Parameters, void (*function)(Parameters...)>
struct Caller<function> {
  static constexpr size_t kCount = sizeof...(Parameters);

  static void call(const Argument* arguments) {
    convert(arguments, std::index_sequence_for<Parameters...>{});
  }
  template <size_t... kIndex>
  static void convert(const Argument* arguments, std::index_sequence<kIndex...>) {
    run(arguments[kIndex].as<std::decay_t<Parameters>>()...);
  }
  static void run(const std::decay_t<Parameters>&... values) {
    const Unlocked unlocked;
    function(values...);
  }
};

constexpr size_t count_words(const char* text) {
  size_t count = 1;
  for (; *text; ++text) count += *text == ' ';
  return count;
}

template <auto function, size_t kNames>
constexpr Function named(const char* name, const char* arguments) {
  static_assert(kNames == Caller<function>::kCount, "each argument has a name");
  return {name, arguments, &Caller<function>::call};
}

#define PGOLF_NAMED(name, function, arguments) \
  named<function, count_words(arguments)>(name, arguments)
#define PGOLF_CPU(function, arguments) PGOLF_NAMED(#function, function, arguments " threads")
#if PGOLF_CUDA
#define PGOLF_BOTH(function, arguments)                                 \
  PGOLF_NAMED(#function, function<Threads>, arguments " threads"),      \
      PGOLF_NAMED(#function "_cuda", function<Stream>, arguments " stream")
#else
#define PGOLF_BOTH(function, arguments) \
  PGOLF_NAMED(#function, function<Threads>, arguments " threads")
#endif

// What pgolf/ops/ has too: "xsa.SIZE_LIMITS.cuda" is SIZE_LIMITS["cuda"] of xsa.py. Of a tuple of names it
// is where a name stands. A test compares them all.
struct Constant {
  const char* path;
  int64_t value;
};

// What a file adds to the module: a static variable is enough, bindings.cpp finds it.
class Functions {
 public:
  Functions(std::initializer_list<Function> functions,
            std::initializer_list<Constant> constants = {})
      : functions(functions), constants(constants), next(newest) {
    newest = this;
  }

  const std::vector<Function> functions;
  const std::vector<Constant> constants;
  const Functions* const next;

  static inline const Functions* newest = nullptr;
};

}  // namespace pgolf::bindings
