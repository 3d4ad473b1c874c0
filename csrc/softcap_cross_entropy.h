// softcap_cross_entropy: one row of logits, for CPU and GPU; F is float or double.
//
//   t = tanh(z / cap),  l = cap t   (cap 0: l = z, and t = 0 below)
//   loss = log(sum exp(l - m)) - (l[target] - m),   m = max l
//   dz = factor (exp(l - m) / sum - [target]) (1 - t^2)
//
// tanh rises, so m is the l of the greatest z; where a cap bounds all powers any l will do, and a
// GPU takes the target's. A row whose target is kIgnoredTarget has the loss 0 and the factor 0; any
// other target outside of the row makes loss and dz NaN.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"
#include "kernels.h"

namespace pgolf {

struct LossShape {
  int64_t rows, cols;
  double cap, factor;
  bool gradient;  // otherwise z is only read
  Dtype dtype;    // of z
};

// Columns of a row that a GPU's block holds in registers; longer rows are for the CPU alone.
constexpr int64_t kMaxLossColumns = 8192;

constexpr int64_t kIgnoredTarget = -100;  // as torch's cross_entropy has it

// What is to be known of a row before its gradients.
template <typename F>
struct LossRow {
  F greatest;  // m
  F scale;     // factor / sum
  F loss;
};

template <typename F>
PGOLF_HOST_DEVICE static inline LossRow<F> loss_row(F greatest, F sum, F target_logit, F factor) {
  // (The difference first: it is exact where it is small, and m may be large.)
  return {greatest, factor / sum, std::log(sum) - (target_logit - greatest)};
}

}  // namespace pgolf
