// Newton-Schulz's normalisation on the CPU; newton_schulz.h has the formula. (The matrix products
// stay with torch.) Squares are summed in double, so that no norm of floats over- or underflows, in
// one fixed order: lanes of a row, then rows of a matrix.
#include "newton_schulz.h"

#include "cpu/numbers.h"
#include "host/parallel.h"
#include "kernels.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

template <typename T, typename X>
void multiply(const T* from, double factor, X* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = narrow<X>(static_cast<compute_t<X>>(widen(from[i]) * factor));
  }
}

// From the sum of squares of each of a matrix's rows to the factor that the row is multiplied with.
void squares_to_factors(double* rows, int64_t count, bool row_norm, double safety) {
  double total = 0;
  for (int64_t r = 0; r < count; ++r) {
    const double factor = row_norm ? row_norm_factor(rows[r]) : 1;
    total += rows[r];
    rows[r] = factor;
  }
  const double matrix = safety * std::sqrt(total) + kNewtonSchulzFloor;
  for (int64_t r = 0; r < count; ++r) rows[r] /= matrix;
}

// A row of g by its index in (batch x rows).
template <typename T>
const T* row_of(const NewtonSchulzShape& shape, const void* g, int64_t row) {
  return static_cast<const T*>(g) + row / shape.rows * shape.batch_stride +
         row % shape.rows * shape.row_stride;
}

}  // namespace

void newton_schulz_normalize(const NewtonSchulzShape& shape, const void* g, void* x,
                             double* squares, int threads) {
  if (shape.cols == 0) return;
  with_element(shape.g_dtype, [&](auto from) {
    using T = decltype(from);
    const int64_t rows = shape.batch * shape.rows;
    const int64_t bytes = shape.cols * int64_t{sizeof(T)};
    parallel_for(rows, bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        squares[r] = sum_of_squares(row_of<T>(shape, g, r), shape.cols);
      }
    });
    for (int64_t b = 0; b < shape.batch; ++b) {
      squares_to_factors(squares + b * shape.rows, shape.rows, shape.row_norm, shape.safety);
    }
    with_element(shape.x_dtype, [&](auto to) {
      using X = decltype(to);
      parallel_for(rows, bytes, threads, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          multiply(row_of<T>(shape, g, r), squares[r], static_cast<X*>(x) + r * shape.cols,
                   shape.cols);
        }
      });
    });
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
