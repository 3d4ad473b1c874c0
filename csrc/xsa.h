// xsa: removes from each query head's row y its component along the row v of its value head. The
// formula, for CPU and GPU; F is float or double.
//
//   z  = y - s a v                    a = y.v,  s = 1 / max(|v|, 1e-12)^2
//   dy = dz - s b v                   b = dz.v
//   dv = sum over the value head's query heads of  -s (a dz + b y) + 2 (s a)(s b) v
//
// The last term is the norm's own gradient: where |v| <= 1e-12 the norm is a constant and it is left
// out, as torch has it. Never s^2 a b: s^2 overflows a float where |v| is small.
#pragma once

#include "host_device.h"
#include "kernels.h"

namespace pgolf {

constexpr int kMaxHeadsPerGroup = 256;  // on a CPU: query heads to one value head
constexpr int64_t kMaxXsaSize = 256;    // on a GPU: elements of a head

struct XsaShape {
  int64_t batch, time, heads, groups, size;  // N, T, H, G, d: y is (N, T, H, d), v (N, T, G, d)
  Dtype dtype;
};

template <typename F>
struct XsaNorm {
  F inverse;  // s
  F moving;   // 1, or 0 where the norm is held at its floor
};

template <typename F>
PGOLF_HOST_DEVICE static inline XsaNorm<F> xsa_norm(F squares) {
  const F floor = F(1e-12) * F(1e-12);
  const bool held = squares <= floor;  // not where it is NaN
  return {F(1) / (held ? floor : squares), held ? F(0) : F(1)};
}

}  // namespace pgolf
