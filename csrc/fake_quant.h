// fake_quant: a row of weights as signed codes of k bits times one fp16 step. The formula, for CPU
// and GPU, equal bit for bit to the grid of pgolf/ops/int_grid.py; F is float or
// double. Nothing that includes this may be compiled with -ffast-math.
#pragma once

#include <cmath>
#include <cstdint>

#include "element.h"
#include "host_device.h"

namespace pgolf {

constexpr int kMinBits = 4;
constexpr int kMaxBits = 8;

// What all rows share.
template <typename F>
struct FakeQuantGrid {
  F qmax;      // 2^(bits - 1) - 1
  F least;     // -qmax, or one less
  F floor;     // least clip
  F multiple;  // codes are rounded to a multiple of it
};

// For the number `bits` as a device holds it: where the grid has no such bits, the largest code is
// NaN, and so is everything that follows.
template <typename F>
PGOLF_HOST_DEVICE static inline FakeQuantGrid<F> fake_quant_grid(float bits, double floor,
                                                                 int64_t multiple,
                                                                 bool full_range) {
  const bool known = bits >= kMinBits && bits <= kMaxBits && bits == static_cast<int>(bits);
  const F qmax = known ? static_cast<F>((1 << (static_cast<int>(bits) - 1)) - 1) : F(NAN);
  return {qmax, full_range ? -qmax - 1 : -qmax, static_cast<F>(floor), static_cast<F>(multiple)};
}

// Correctly rounded, whatever nvcc's flags are.
PGOLF_HOST_DEVICE static inline float divide_exactly(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}
PGOLF_HOST_DEVICE static inline double divide_exactly(double a, double b) { return a / b; }

// x between 2^-24 and 65504 to the nearest fp16 number, ties to even; NaN stays.
PGOLF_HOST_DEVICE static inline float round_to_fp16(float x) {
  if (x != x) return x;
  // Floats between 0.5 and 1 are spaced as fp16 numbers below 2^-14.
  if (x < 0x1p-14f) return (x + 0.75f) - 0.75f;
  const uint32_t bits = bit_cast<uint32_t>(x);
  return bit_cast<float>((bits + 0xFFF + ((bits >> 13) & 1)) & ~uint32_t{0x1FFF});
}

// The step of a row whose largest magnitude is amax, of which it keeps the share `factor`; NaN if a
// weight is infinite. (Comparisons as written let NaN pass.)
template <typename F>
PGOLF_HOST_DEVICE static inline F fake_quant_step(F amax, F factor, const FakeQuantGrid<F>& grid) {
  if (amax - amax != F(0)) return amax - amax;
  const F clip = amax * factor;
  F step = divide_exactly(clip < grid.floor ? grid.floor : clip, grid.qmax);
  step = step < F(0x1p-24) ? F(0x1p-24) : step;
  step = step > F(65504) ? F(65504) : step;
  return static_cast<F>(round_to_fp16(static_cast<float>(step)));
}

// x to the nearest whole number, ties to even, -0 for small negative x; NaN and infinities stay.
// (Not rint, which is a call where the instruction set has no rounding, as plain x86-64.)
template <typename F>
PGOLF_HOST_DEVICE static inline F round_half_even(F x) {
  const F whole = sizeof(F) == 4 ? F(0x1p23) : F(0x1p52);  // from here on there are no fractions
  const F size = std::fabs(x);
  const F rounded = std::copysign((size + whole) - whole, x);
  return size < whole ? rounded : x;
}

// The code of w before it is clamped: a whole number, infinite or NaN. kMultiples says whether the
// grid's `multiple` is other than 1. (Known to the compiler, as a loop that may do either divides
// twice.)
template <bool kMultiples, typename F>
PGOLF_HOST_DEVICE static inline F fake_quant_code(F w, F step, const FakeQuantGrid<F>& grid) {
  const F code = round_half_even(divide_exactly(w, step));
  if constexpr (kMultiples) {
    return round_half_even(divide_exactly(code, grid.multiple)) * grid.multiple;
  } else {
    return code;
  }
}

template <typename F>
PGOLF_HOST_DEVICE static inline F fake_quant_clamp(F code, const FakeQuantGrid<F>& grid) {
  const F above = code < grid.least ? grid.least : code;
  return above > grid.qmax ? grid.qmax : above;
}

}  // namespace pgolf
