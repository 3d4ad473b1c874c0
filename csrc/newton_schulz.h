// What comes before the first Newton-Schulz step, for CPU and GPU: each row divided by its norm
// (optional), then each matrix by its Frobenius norm, in double from sums of squares.
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

// The factor that gives a row norm 1, from the sum of its squares, which becomes that of the new row.
PGOLF_HOST_DEVICE static inline double row_norm_factor(double& squares) {
  const double norm = std::sqrt(squares);
  const double divisor = norm < kNewtonSchulzFloor ? kNewtonSchulzFloor : norm;  // NaN stays
  squares = squares / divisor / divisor;
  return 1 / divisor;
}

}  // namespace pgolf
