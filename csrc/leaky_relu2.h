// leaky_relu2: post = max(pre, slope pre)^2 with 0 <= slope <= 1, and its derivative from post and
// one bit an element, which says whether pre was positive. The formula, for CPU and GPU; F is float
// or double.
//
// Bits lie in words of 32: element f of a row is bit f % 32 of its word f / 32, and the unused high
// bits of the last word are zero.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "kernels.h"

namespace pgolf {

struct LeakyRelu2Shape {
  int64_t rows, cols;
  double slope;
  const void* rstd;  // (rows,) float, or double for double; or null
  Dtype dtype;
};

constexpr int kBitsPerWord = 32;

PGOLF_HOST_DEVICE static inline int64_t sign_words(int64_t cols) {
  return cols / kBitsPerWord + (cols % kBitsPerWord != 0);
}

template <typename F>
PGOLF_HOST_DEVICE static inline F leaky_relu2_value(F pre, F slope) {
  const F below = slope == F(0) ? F(0) : slope * pre;  // 0 * -inf is no 0
  const F kept = pre <= F(0) ? below : pre;            // NaN stays
  return kept * kept;
}

// d post / d pre. (Below 0, sqrt(post) = -slope pre.)
template <typename F>
PGOLF_HOST_DEVICE static inline F leaky_relu2_derivative(F post, bool positive, F slope) {
  return (positive ? F(2) : F(-2) * slope) * std::sqrt(post);
}

}  // namespace pgolf
