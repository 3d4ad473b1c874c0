// Lists of tensors from Python: columns of addresses, sizes and dtypes, one entry a tensor.
#pragma once

#include "bindings/checks.h"
#include "multi_tensor.h"

namespace pgolf::bindings {

using Addresses = std::vector<Address>;
using Sizes = std::vector<int64_t>;
using Codes = std::vector<int>;

template <typename Column>
void check_length(const std::string& name, const Column& column, size_t length) {
  if (column.size() != length) {
    refuse("the length of " + name, column.size(), "it has to be " + std::to_string(length));
  }
}

// An address of elements of fp32 or bf16, as `code` says.
inline Dtype checked_element(const std::string& name, Address address, int64_t count, int code) {
  const Dtype dtype = checked_float_dtype(name + "_dtypes", code);
  check_pointer(name, address, count);
  if (address.value % (dtype == Dtype::bf16 ? 2 : 4) != 0) {
    refuse(name, address.value, "it has to be aligned to an element");
  }
  return dtype;
}

// Chunks of a tensor that follow on `before`.
inline int64_t checked_chunks(int64_t before, int64_t count) {
  if (count < 0) refuse("counts", count, "a size is not negative");
  const int64_t chunks = before + chunks_of(count);
  if (chunks > INT32_MAX) refuse("counts", count, "there are too many elements in one call");
  return chunks;
}

}  // namespace pgolf::bindings
