// What comes before the first Newton-Schulz step: each row divided by its norm (optional), which GPUs
// do too, then each matrix by its Frobenius norm, in double from sums of squares.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "kernels.h"

namespace pgolf {

struct NewtonSchulzShape {
  int64_t batch, rows, cols;
  int64_t batch_stride, row_stride;  // of g, in elements
  bool row_norm;
  double safety;
  Dtype g_dtype, x_dtype;
};

constexpr double kNewtonSchulzFloor = 1e-7;  // least row norm, and what is added to a matrix norm

PGOLF_HOST_DEVICE static inline double row_norm_divisor(double squares) {
  const double norm = std::sqrt(squares);
  return norm < kNewtonSchulzFloor ? kNewtonSchulzFloor : norm;  // NaN stays
}

// The factor that gives a row norm 1, from the sum of its squares, which becomes that of the new row.
PGOLF_HOST_DEVICE static inline float row_norm_factor(double& squares) {
  const double divisor = row_norm_divisor(squares);
  squares = squares / divisor / divisor;
  return static_cast<float>(1 / divisor);
}

// From the sum of squares of each of a matrix's rows to the factor that the row is multiplied with.
static inline void squares_to_factors(double* rows, int64_t count, bool row_norm, double safety) {
  double total = 0;
  for (int64_t r = 0; r < count; ++r) {
    if (row_norm) {
      const double divisor = row_norm_divisor(rows[r]);
      total += rows[r] / divisor / divisor;
      rows[r] = divisor;
    } else {
      total += rows[r];
      rows[r] = 1;
    }
  }
  const double matrix = safety * std::sqrt(total) + kNewtonSchulzFloor;
  for (int64_t r = 0; r < count; ++r) rows[r] = 1 / (rows[r] * matrix);
}

}  // namespace pgolf
