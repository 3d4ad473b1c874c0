// qk_rope: per-head RMS norm, partial rotation and gain. The formulas, for CPU and GPU; F is float
// or double. For one head x of d elements, the first r are rotated in pairs (j, j + r/2):
//
//   y = gain R n,   n = rstd x,   rstd = 1 / sqrt(|x|^2 / d + eps)   (without norm: rstd = 1)
//
// and with w = R^T dy and s = w . n
//
//   d_gain = the sum of s over all tokens,   dx = gain rstd (w - n s / d)   (without norm: gain w)
//
// With a factor f of the token x stands for f x: rstd = f / sqrt(f^2 |x|^2 / d + eps), or f, is all that
// changes for queries and keys, and dx is the gradient of x itself. A value becomes f v, and
// dx = f (dv + dv'), where v' is v once more, with a gradient of its own. It gets a row added, its own
// or that of its token's id in a table.
//
// Where x was never written, the gradient takes n from the results, as R^T y / gain, and rstd from who
// made them, with `rope_gain` for gain there and here.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels.h"
#include "parts.h"
#include "rms_norm.h"

namespace pgolf {

struct QkRopeShape {
  int64_t batch, time, heads, kv_heads, size;  // N, T, H, G, d: qkv is (N, T, H + 2 G, d)
  int64_t half;                                // r/2 pairs of a head are rotated
  double eps;
  bool norm;
  Dtype dtype;
};

// All contiguous; cos and sin (T, r/2) and gain (H,) are float, or double for double.
// factor, of the same type, is (N, T), or null for 1.
struct QkRopeInputs {
  const void *qkv, *cos, *sin, *gain, *factor;
};

// What values get added: rows (N, T, G d), or with ids (N, T) those of a table (count, G d); rows is
// null where there is nothing. On a GPU an id that the table does not have gives NaN.
struct QkRopeValue {
  const void* rows;
  const int64_t* ids;
  int64_t count;

  // The row of a token.
  PGOLF_HOST_DEVICE int64_t row(int64_t token) const { return ids ? ids[token] : token; }
  PGOLF_HOST_DEVICE bool has(int64_t row) const { return !ids || (row >= 0 && row < count); }
};

// Results in place of qkv: q (N, T, H, d), k (N, T, G, d), and rstd (N, T, H + G) of their heads, float
// or double for double; all contiguous.
struct QkRopeResults {
  const void *q, *k, *rstd;
};

struct QkRopeOutputs {
  void *q, *k, *v;
};

// Where there is none its data are null.
struct QkRopeGradients {
  Heads dq, dk, dv, dv_again;
};

constexpr int64_t kMaxRopeSize = 256;  // of a head

// Of the sums for d_gain: a part is so many tokens in a row, which a block takes.
constexpr int64_t kRopeMinPart = 64, kRopeMaxParts = 1024;
constexpr Parts rope_parts(int64_t tokens) {
  return parts_of(tokens, kRopeMinPart, kRopeMaxParts);
}

// dx = of_w w + of_x x. Without norm x has no part in it: it must not be multiplied by zero, as it
// may be infinite.
template <typename F>
struct RopeGradient {
  F of_w, of_x;
  F gain;  // s, what this head adds to d_gain
};

template <typename F>
PGOLF_HOST_DEVICE static inline F rope_rstd(F squares, int64_t size, F eps, F factor) {
  return factor * rms_rstd(squares * (factor * factor), size, eps);
}

template <typename F>
PGOLF_HOST_DEVICE static inline RopeGradient<F> rope_gradient(F w_dot_x, F rstd, F gain,
                                                              int64_t size) {
  const RmsGradient<F> norm = rms_gradient(w_dot_x, rstd, gain, size);
  return {norm.of_dn, norm.of_x, w_dot_x * rstd};
}

// The same where n, with w . n = s, stands for x.
template <typename F>
PGOLF_HOST_DEVICE static inline RopeGradient<F> rope_gradient_of_normed(F s, F rstd, F gain,
                                                                        int64_t size) {
  const F of_w = gain * rstd;
  return {of_w, -of_w * (s / static_cast<F>(size)), s};
}

// What a head of q is multiplied by where n is to be found in it again: gain, but not nearly 0. With
// 2^-100 a q is as good as 0, and still no subnormal number.
template <typename F>
PGOLF_HOST_DEVICE static inline F rope_gain(F gain) {
  const F least = F(7.888609052210118e-31);
  if (!(std::abs(gain) < least)) return gain;
  return gain < 0 ? -least : least;
}

}  // namespace pgolf
