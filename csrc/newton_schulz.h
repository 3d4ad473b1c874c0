// What comes before the first Newton-Schulz step, for CPU and GPU: each row divided by its norm
// (optional), then each matrix by its Frobenius norm, in double from sums of squares.
#pragma once

#include <cmath>

#include "host_device.h"

namespace pgolf {

constexpr double kNewtonSchulzFloor = 1e-7;  // least row norm, and what is added to a matrix norm

PGOLF_HOST_DEVICE static inline double row_norm_divisor(double squares) {
  const double norm = std::sqrt(squares);
  return norm < kNewtonSchulzFloor ? kNewtonSchulzFloor : norm;  // NaN stays
}

PGOLF_HOST_DEVICE static inline double matrix_norm_divisor(double squares, double safety) {
  return safety * std::sqrt(squares) + kNewtonSchulzFloor;
}

}  // namespace pgolf
