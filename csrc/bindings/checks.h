// Checks of arguments that come from Python. Each throws std::invalid_argument (a ValueError there),
// which names the argument, its value and what would be right. They guard memory; numbers that
// cannot hurt it are for pgolf/ops/ to check.
#pragma once

#include "bindings/python.h"

namespace pgolf::bindings {

template <typename Value>
[[noreturn]] void refuse(const std::string& name, Value value, const std::string& remedy) {
  throw std::invalid_argument(name + " is " + std::to_string(value) + ": " + remedy);
}

inline Dtype checked_dtype(const std::string& name, int code) {
  if (code < 0 || code > 2) refuse(name, code, "it has to be 0 (fp32), 1 (bf16) or 2 (fp64)");
  return static_cast<Dtype>(code);
}

// Of kernels that have no fp64.
inline Dtype checked_float_dtype(const std::string& name, int code) {
  if (code < 0 || code > 1) refuse(name, code, "it has to be 0 (fp32) or 1 (bf16)");
  return static_cast<Dtype>(code);
}

// Of kernels that have it on the CPU only.
template <typename On>
Dtype checked_dtype(const std::string& name, int code) {
  return On::on_cpu ? checked_dtype(name, code) : checked_float_dtype(name, code);
}

// The product of sizes that are not negative, which is the number of elements.
inline int64_t count_of(std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  int64_t count = 1;
  bool fits = true, empty = false;
  for (const auto& [name, size] : sizes) {
    if (size < 0) refuse(name, size, "a size is not negative");
    empty |= size == 0;
    fits &= !__builtin_mul_overflow(count, size, &count);
  }
  if (empty) return 0;
  // (Eight bytes an element, and room to add such sizes up.)
  if (!fits || count > INT64_MAX / 64) {
    const auto& [name, size] = *sizes.begin();
    refuse(name, size, "with the other sizes it makes more elements than can be addressed");
  }
  return count;
}

inline void check_pointer(const std::string& name, Address address, int64_t count) {
  if (!address && count != 0) {
    throw std::invalid_argument(name + " is a null pointer: it has to hold " +
                                std::to_string(count) + " elements");
  }
}

// Strides in elements. Zero repeats (an expanded tensor); the last element must be addressable.
inline void check_strides(const std::string& name,
                          std::initializer_list<std::pair<int64_t, int64_t>> sizes_and_strides) {
  int64_t last = 0;
  for (const auto& [size, stride] : sizes_and_strides) {
    if (stride < 0) refuse(name, stride, "a stride is not negative");
    int64_t offset = 0;
    if (size > 1 && (__builtin_mul_overflow(size - 1, stride, &offset) ||
                     __builtin_add_overflow(last, offset, &last) || last > INT64_MAX / 64)) {
      refuse(name, stride, "it leads beyond what can be addressed");
    }
  }
}

// On the CPU, where they can be looked at.
inline void check_ids(const std::string& name, const int64_t* ids, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= rows) {
      refuse(name + "[" + std::to_string(i) + "]", ids[i],
             "the table has " + std::to_string(rows) + " rows");
    }
  }
}

}  // namespace pgolf::bindings
