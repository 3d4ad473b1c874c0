// Newton-Schulz's normalisation on the CPU; newton_schulz.h has the formula. (The matrix products
// stay with torch.) Squares are summed in double, so that no norm of floats over- or underflows, in
// one fixed order: lanes of a row, then rows of a matrix.
#include "newton_schulz.h"

#include "cpu/dispatch.h"
#include "cpu/lanes.h"
#include "cpu/launchers.h"
#include "host/parallel.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

template <typename T>
double sum_of_squares(const T* row, int64_t count) {
  constexpr int kSums = 16;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int j = 0; j < kSums; ++j) {
      const double x = widen(row[i + j]);
      sums[j] += x * x;
    }
  }
  for (int j = 0; i < count; ++i, ++j) {
    const double x = widen(row[i]);
    sums[j] += x * x;
  }
  for (int width = kSums / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
}

template <typename T, typename X>
void multiply(const T* from, double factor, X* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = narrow<X>(static_cast<compute_t<X>>(widen(from[i]) * factor));
  }
}

// A row of g by its index in (batch x rows).
template <typename T>
const T* row_of(const NewtonSchulzShape& shape, const void* g, int64_t row) {
  return static_cast<const T*>(g) + row / shape.rows * shape.batch_stride +
         row % shape.rows * shape.row_stride;
}

// From each row's sum of squares to the factor that the row is multiplied with.
void squares_to_factors(const NewtonSchulzShape& shape, double* rows) {
  double total = 0;
  for (int64_t r = 0; r < shape.rows; ++r) {
    if (shape.row_norm) {
      const double divisor = row_norm_divisor(rows[r]);
      total += rows[r] / divisor / divisor;
      rows[r] = divisor;
    } else {
      total += rows[r];
      rows[r] = 1;
    }
  }
  const double matrix = matrix_norm_divisor(total, shape.safety);
  for (int64_t r = 0; r < shape.rows; ++r) rows[r] = 1 / (rows[r] * matrix);
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
    for (int64_t b = 0; b < shape.batch; ++b) squares_to_factors(shape, squares + b * shape.rows);
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
