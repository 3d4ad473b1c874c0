// The RMS norm of a row, for CPU and GPU; F is float or double. For x of D elements
//
//   n = factor rstd x,   rstd = 1 / sqrt(|x|^2 / D + eps)
//   dx = factor rstd (dn - rstd x (dn . rstd x) / D) = of_dn dn + of_x x
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace pgolf {

template <typename F>
PGOLF_HOST_DEVICE static inline F rms_rstd(F squares, int64_t width, F eps) {
  return F(1) / std::sqrt(squares / static_cast<F>(width) + eps);
}

template <typename F>
struct RmsGradient {
  F of_dn, of_x;
};

template <typename F>
PGOLF_HOST_DEVICE static inline RmsGradient<F> rms_gradient(F dn_dot_x, F rstd, F factor,
                                                            int64_t width) {
  const F of_dn = factor * rstd;
  return {of_dn, -of_dn * (dn_dot_x * rstd / static_cast<F>(width) * rstd)};
}

}  // namespace pgolf
