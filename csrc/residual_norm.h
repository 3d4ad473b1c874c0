// residual_norm: what a layer adds to the residual stream, the mix with the first embedding, and the
// norm. The formulas, for CPU and GPU; F is float or double. For one token, with products by element,
//
//   total = x + a branch + w skip,   x_in = mix0 total + mix1 x0,   h = scale rstd x_in,
//   rstd  = 1 / sqrt(|x_in|^2 / D + eps)
//
// and the other way round, with G = d_x_in + scale rstd (dh - n (dh . n) / D) and n = rstd x_in
//
//   d = d_total + mix0 G,   dx = d,   dbranch = a d,   dskip = w d,   dx0 = mix1 G
//   da = sum d branch,   dw = sum d skip,   dmix0 = sum G total,   dmix1 = sum G x0   (over tokens)
#pragma once

#include <cstdint>

#include "kernels.h"
#include "rms_norm.h"

namespace pgolf {

constexpr int64_t kMaxResidualWidth = 4096;  // D

// Gradients of a, w and mix are summed over this many tokens by themselves, then over those sums:
// the result depends neither on threads nor on the size of a GPU.
constexpr int64_t kResidualRowsPerBlock = 64;
constexpr int64_t residual_blocks(int64_t rows) {
  return rows / kResidualRowsPerBlock + (rows % kResidualRowsPerBlock != 0);
}

// Rows of gradients of parameters, in this order: of a, of w, two of mix (where total is there).
constexpr int64_t residual_parameters(const ResidualNormInputs& in) {
  return (in.branch_scale ? 1 : 0) + (in.skip_weight ? 1 : 0) + (in.mix && in.x ? 2 : 0);
}

}  // namespace pgolf
