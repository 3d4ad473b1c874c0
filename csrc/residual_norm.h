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
//
// Where a layer takes products p total and q x_in that nobody writes, d_total and d_x_in stand for
// p d_total and q d_x_in, and dp = sum d_total total, dq = sum d_x_in x_in. The other way round, where
// x0 is such a product for who made it, its gradient is G, and mix1 has none here.
//
// Factored, h is left to whoever takes x_in and the factor f = scale rstd of its row. What comes back
// is g = f dh, the gradient of x_in where f counts as a constant: G = d_x_in + g - n (g . n) / D.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "parts.h"
#include "rms_norm.h"

namespace pgolf {

struct ResidualNormShape {
  int64_t rows, width;  // T, D
  double scale, eps;
  bool factored;
  Dtype dtype;
};

// Contiguous, null where there is none: x, branch, skip and x0 (T, D), and in float, or double for
// double, branch_scale, skip_weight, mix0 and mix1 (D,). For the gradient x is total, or null where
// that of mix is not wanted; branch and skip are there if their factors are, and mix1 and x0 are not
// where x0 is a product.
struct ResidualNormInputs {
  const void *x, *branch, *branch_scale, *skip, *skip_weight, *x0, *mix0, *mix1;
};

// (T, D); total and x_in are null where they are not wanted, h where it is factored. rstd: (T,) float,
// or double for double; factored, it is the factor.
struct ResidualNormOutputs {
  void *total, *x_in, *h, *rstd;
};

// What the gradient starts from: what the forward pass made, and gradients, null where there is none;
// factored, dh is g. total_scale (there only if x is) and x_in_scale (D,) are p and q.
struct ResidualNormUpstream {
  const void *x_in, *rstd, *d_total, *d_x_in, *dh, *total_scale, *x_in_scale;
};

// (T, D), null where there is none: dbranch and dskip only where they differ from dx. partials
// (parts, P, D), whose sums over parts are the gradients of parameters, is float, or double for
// double.
struct ResidualNormGradients {
  void *dx, *dbranch, *dskip, *dx0, *partials;
};

constexpr int64_t kMaxResidualWidth = 4096;  // D

// Of the sums for a, w and mix: at most four parts for each of the 132 multiprocessors of an H100. On
// a CPU a part is so many tokens in a row; on a GPU it is what a block comes to: each of its groups
// of lanes, 8 warps or the whole block, takes every (parts x groups)-th token.
constexpr int64_t kResidualMinPart = 64, kResidualMaxParts = 528;
constexpr Parts residual_parts(int64_t rows) {
  return parts_of(rows, kResidualMinPart, kResidualMaxParts);
}

// Rows of gradients of parameters, in this order: of a, of w, of mix0 and mix1 (where total is
// there), of p, of q.
constexpr int64_t residual_parameters(const ResidualNormInputs& in,
                                      const ResidualNormUpstream& up) {
  return (in.branch_scale ? 1 : 0) + (in.skip_weight ? 1 : 0) + (in.mix0 && in.x ? 1 : 0) +
         (in.mix1 && in.x ? 1 : 0) + (up.total_scale ? 1 : 0) + (up.x_in_scale ? 1 : 0);
}

// What dh, or g, and x_in have to be multiplied by in G. What is the same for all rows is computed
// once; scale is not 0 where h is factored.
template <typename F>
struct ResidualNormGradient {
  F scale, of_rstd;
  bool factored;

  PGOLF_HOST_DEVICE explicit ResidualNormGradient(const ResidualNormShape& shape)
      : scale(static_cast<F>(shape.scale)),
        of_rstd(shape.factored ? F(1) / scale : F(1)),
        factored(shape.factored) {}

  PGOLF_HOST_DEVICE RmsGradient<F> of(F dh_dot_x, F rstd, int64_t width) const {
    const F own = rstd * of_rstd, of_dh = factored ? F(1) : scale * own;
    return {of_dh, -of_dh * (dh_dot_x * own / static_cast<F>(width) * own)};
  }
};

}  // namespace pgolf
