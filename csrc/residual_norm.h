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

struct ResidualNormShape {
  int64_t rows, width;  // T, D
  double scale, eps;
  Dtype dtype;
};

// Contiguous, null where there is none: x, branch, skip and x0 (T, D), and in float, or double for
// double, branch_scale and skip_weight (D,) and mix (2, D). For the gradient x is total, or null
// where the gradient of mix is not wanted; branch and skip are there if their factors are.
struct ResidualNormInputs {
  const void *x, *branch, *branch_scale, *skip, *skip_weight, *x0, *mix;
};

// (T, D); total and x_in are null where they are not wanted. rstd: (T,) float, or double for double.
struct ResidualNormOutputs {
  void *total, *x_in, *h, *rstd;
};

// What the gradient starts from: what the forward pass made, and gradients, null where there is none.
struct ResidualNormUpstream {
  const void *x_in, *rstd, *d_total, *d_x_in, *dh;
};

// (T, D), null where there is none: dbranch and dskip only where they differ from dx. parameters
// (P, D) and partials (residual_blocks(T), P, D) are float, or double for double.
struct ResidualNormGradients {
  void *dx, *dbranch, *dskip, *dx0, *parameters, *partials;
};

constexpr int64_t kMaxResidualWidth = 4096;  // D

// Gradients of a, w and mix are summed over parts of the tokens by themselves, then over those sums:
// the result depends neither on threads nor on the size of a GPU. A part has this many tokens, or so
// many that there are at most so many parts, four for each of the 132 multiprocessors of an H100.
constexpr int64_t kResidualRowsPerBlock = 64, kResidualMostBlocks = 528;
constexpr int64_t residual_rows_per_block(int64_t rows) {
  const int64_t even = rows / kResidualMostBlocks + (rows % kResidualMostBlocks != 0);
  return even < kResidualRowsPerBlock ? kResidualRowsPerBlock : even;
}
constexpr int64_t residual_blocks(int64_t rows) {
  const int64_t per_block = residual_rows_per_block(rows);
  return rows / per_block + (rows % per_block != 0);
}

// Rows of gradients of parameters, in this order: of a, of w, two of mix (where total is there).
constexpr int64_t residual_parameters(const ResidualNormInputs& in) {
  return (in.branch_scale ? 1 : 0) + (in.skip_weight ? 1 : 0) + (in.mix && in.x ? 2 : 0);
}

}  // namespace pgolf
