// exp and tanh of a register of floats, within 2 units in the last place and the same bits on all
// instruction sets; of doubles by the C++ library, one by one.
#pragma once

#include <cmath>
#include <type_traits>

#include "cpu/lanes.h"

namespace pgolf::cpu::PGOLF_ISA {

// exp(x) = power + power rest, where power is a power of 2.
template <typename V>
struct Exponential {
  V power, rest;
};

// x = n ln 2 + r with the whole number n nearest to x / ln 2, |x| < 87: power = 2^n and rest =
// exp(r) - 1, r + r^2 times the polynomial of degree 4 that fits at Chebyshev's points (off by
// 1e-8 at most). NaN stays in rest.
template <typename V>
static inline Exponential<V> exponential(V x) {
  using Words = vector_t<uint32_t, sizeof(V) / sizeof(float)>;
  constexpr float kRound = 0x1.8p23f;  // added to a number below 2^22, leaves a whole one
  const V shifted = x * 1.44269504f + kRound;
  const V n = shifted - kRound;
  // ln 2 in two parts; the first has so few bits that its product with n is exact.
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  V q = r * 1.3933643e-3f + 8.3631752e-3f;
  q = q * r + 4.1666467e-2f;
  q = q * r + 1.6666576e-1f;
  q = q * r + 0.5f;
  // (The last bits of `shifted` are n.)
  const Words exponent = (bit_cast<Words>(shifted) << 23) + 0x3F800000u;
  return {bit_cast<V>(exponent), r + r * r * q};
}

template <typename V>
constexpr bool kFloats = std::is_same_v<std::decay_t<decltype(V{}[0])>, float>;

// exp(x) for x <= 0; 0 below -87, where a float loses bits.
template <typename V>
static inline V exp_below_0(V x) {
  if constexpr (kFloats<V>) {
    const auto [power, rest] = exponential(x < -87.f ? V{} - 87.f : x);
    return x < -87.f ? V{} : power + power * rest;
  } else {
    for (unsigned i = 0; i < sizeof(V) / sizeof(double); ++i) x[i] = std::exp(x[i]);
    return x;
  }
}

template <typename V>
static inline V tanh(V x) {
  if constexpr (kFloats<V>) {
    using Words = vector_t<uint32_t, sizeof(V) / sizeof(float)>;
    const Words sign = bit_cast<Words>(x) & 0x80000000u;
    const V twice = bit_cast<V>(bit_cast<Words>(x + x) & 0x7FFFFFFFu);
    const auto [power, rest] = exponential(twice > 40.f ? V{} + 40.f : twice);
    const V minus_1 = power * rest + (power - 1.f);  // exp(2 |x|) - 1, exact where it is small
    return bit_cast<V>(bit_cast<Words>(minus_1 / (minus_1 + 2.f)) | sign);
  } else {
    for (unsigned i = 0; i < sizeof(V) / sizeof(double); ++i) x[i] = std::tanh(x[i]);
    return x;
  }
}

}  // namespace pgolf::cpu::PGOLF_ISA
