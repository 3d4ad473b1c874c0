// Runs of numbers of a type that is known only when the program runs, as floats and back.
#pragma once

#include <cstring>

#include "cpu/dispatch.h"
#include "kernels.h"

namespace pgolf::cpu::PGOLF_ISA {

constexpr int64_t kRun = 256;  // numbers at a time, which stay in the nearest cache

// to[i] = from[at + i], fp32 or bf16
static inline void load_run(const void* from, Dtype dtype, int64_t at, int64_t count, float* to) {
  if (dtype == Dtype::bf16) {
    const bf16* halves = static_cast<const bf16*>(from) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = widen(halves[i]);
  } else {
    std::memcpy(to, static_cast<const float*>(from) + at, static_cast<size_t>(count) * 4);
  }
}

static inline void store_run(const float* from, void* to, Dtype dtype, int64_t at, int64_t count) {
  if (dtype == Dtype::bf16) {
    bf16* halves = static_cast<bf16*>(to) + at;
    for (int64_t i = 0; i < count; ++i) halves[i] = round_to_bf16(from[i]);
  } else {
    std::memcpy(static_cast<float*>(to) + at, from, static_cast<size_t>(count) * 4);
  }
}

// The sum of the squares, in double and in one fixed order.
template <typename T>
static inline double sum_of_squares(const T* x, int64_t count) {
  constexpr int kSums = 16;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int j = 0; j < kSums; ++j) {
      const double wide = widen(x[i + j]);
      sums[j] += wide * wide;
    }
  }
  for (int j = 0; i < count; ++i, ++j) {
    const double wide = widen(x[i]);
    sums[j] += wide * wide;
  }
  for (int width = kSums / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) sums[j] += sums[j + width];
  }
  return sums[0];
}

}  // namespace pgolf::cpu::PGOLF_ISA
