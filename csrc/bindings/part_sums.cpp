// part_sums for Python.
#include "part_sums.h"

#include "bindings/tensors.h"

namespace pgolf::bindings {
namespace {

struct Matrices {
  std::vector<PartSumsMatrix> list;
  int64_t items = 0;
};

// The sums lie behind one another.
Matrices checked_matrices(const Addresses& parts, const Sizes& rows, const Sizes& cols,
                          Address sums, int64_t capacity, int64_t itemsize) {
  check_length("rows", rows, parts.size());
  check_length("cols", cols, parts.size());
  Matrices matrices;
  int64_t at = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    const int64_t count = count_of({{"rows", rows[i]}, {"cols", cols[i]}});
    check_pointer("parts", parts[i], count);
    if (cols[i] > capacity - at) {
      refuse("capacity", capacity, "sums has to hold a number for each column");
    }
    matrices.list.push_back({parts[i], static_cast<char*>(sums) + at * itemsize, rows[i], cols[i],
                             matrices.items});
    at += cols[i];
    matrices.items += part_sums_items(cols[i]);
    if (matrices.items > INT32_MAX) refuse("cols", cols[i], "there are too many in one call");
  }
  check_pointer("sums", sums, at);
  return matrices;
}

template <typename On>
void part_sums(const Addresses& parts, const Sizes& rows, const Sizes& cols, Address sums,
               int64_t capacity, int dtype, On on) {
  const Dtype element = checked_dtype<On>("dtype", dtype);
  const int64_t itemsize = element == Dtype::fp64 ? 8 : element == Dtype::fp32 ? 4 : 2;
  const Matrices matrices = checked_matrices(parts, rows, cols, sums, capacity, itemsize);
  launch::part_sums(on, matrices.list.data(), static_cast<int>(matrices.list.size()),
                    matrices.items, element);
}

const Functions functions = {{PGOLF_BOTH(part_sums, "parts rows cols sums capacity dtype")}};

}  // namespace
}  // namespace pgolf::bindings
