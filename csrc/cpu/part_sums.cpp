// part_sums on the CPU: sums are made in double, those of a matrix row by row.
#include "part_sums.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "host/parallel.h"
#include "kernels.h"
#include "multi_tensor.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

template <typename T>
void sum_columns(const PartSumsMatrix& m, int64_t first, int64_t count) {
  const T* row = static_cast<const T*>(m.parts) + first;
  double sums[kPartSumsColumns] = {};
  for (int64_t i = 0; i < m.rows; ++i, row += m.cols) {
    for (int64_t c = 0; c < count; ++c) sums[c] += widen(row[c]);
  }
  T* const out = static_cast<T*>(m.sums) + first;
  for (int64_t c = 0; c < count; ++c) out[c] = narrow<T>(static_cast<compute_t<T>>(sums[c]));
}

}  // namespace

void part_sums(const PartSumsMatrix* matrices, int count, int64_t items, Dtype dtype, int threads) {
  int64_t bytes = 1;  // of an item, at least one
  for (int i = 0; i < count; ++i) {
    bytes = std::max(bytes, matrices[i].rows * kPartSumsColumns * int64_t{sizeof(double)});
  }
  parallel_for(items, bytes, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const PartSumsMatrix& m = matrices[tensor_of(matrices, count, item)];
      const int64_t first = (item - m.first_item) * kPartSumsColumns;
      const int64_t columns = std::min(kPartSumsColumns, m.cols - first);
      with_element(dtype, [&](auto element) {
        sum_columns<decltype(element)>(m, first, columns);
      });
    }
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
