// Element types of the kernels and the type that each computes in: float in float, bf16 in float
// (rounded once, at the end), double in double.
//
// Functions in headers are static, so that every object file holds its own copy: the linker would
// otherwise keep one of several copies of an inline function, and it may be the one that was
// compiled for an instruction set which this CPU does not have.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace pgolf {

struct bf16 {
  uint16_t bits;  // the upper half of a float's
};

template <typename T>
struct Computed {
  using type = T;
};
template <>
struct Computed<bf16> {
  using type = float;
};
template <typename T>
using compute_t = typename Computed<T>::type;

template <typename To, typename From>
PGOLF_HOST_DEVICE static inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

PGOLF_HOST_DEVICE static inline float widen(float x) { return x; }
PGOLF_HOST_DEVICE static inline double widen(double x) { return x; }
PGOLF_HOST_DEVICE static inline float widen(bf16 x) {
  return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

// To the nearest bf16, ties to even; every NaN becomes one: torch's on a CPU, the GPU's on a GPU.
PGOLF_HOST_DEVICE static inline bf16 round_to_bf16(float x) {
#if defined(__CUDA_ARCH__)
  bf16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(x != x ? 0x7FC0 : rounded)};
#endif
}

// narrow<T>(x): x, in the type that T computes in, as a T.
template <typename T>
PGOLF_HOST_DEVICE static inline T narrow(compute_t<T> x) {
  if constexpr (sizeof(T) == sizeof(bf16)) {
    return round_to_bf16(x);
  } else {
    return x;
  }
}

}  // namespace pgolf
