// 64 bytes of numbers (16 floats or 8 doubles) as as many registers as the instruction set takes for
// them. Sums over a row go lane by lane and then over the lanes in one fixed order, so that all
// instruction sets round alike. Vector types are GCC's extension, which Clang has too.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "element.h"

namespace pgolf::cpu::PGOLF_ISA {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <typename T, int kCount>
struct VectorOf {
  typedef T type __attribute__((vector_size(kCount * sizeof(T))));
};
template <typename T, int kCount>
using vector_t = typename VectorOf<T, kCount>::type;

// 16 bits to 32 and back (what is above is lost).
template <int kCount>
static inline vector_t<uint32_t, kCount> widen_bits(vector_t<uint16_t, kCount> x) {
#if defined(__AVX512F__)
  // One instruction each, where GCC 12 makes four: xsa in bf16 takes 1.4 times as long with those.
  // (It warns of the forms without a mask that their unused operand is uninitialised.)
  if constexpr (kCount == 16) {
    return bit_cast<vector_t<uint32_t, kCount>>(_mm512_maskz_cvtepu16_epi32(0xFFFF, bit_cast<__m256i>(x)));
  }
#endif
  return __builtin_convertvector(x, vector_t<uint32_t, kCount>);
}

template <int kCount>
static inline vector_t<uint16_t, kCount> narrow_bits(vector_t<uint32_t, kCount> x) {
#if defined(__AVX512F__)
  if constexpr (kCount == 16) {
    return bit_cast<vector_t<uint16_t, kCount>>(_mm512_maskz_cvtepi32_epi16(0xFFFF, bit_cast<__m512i>(x)));
  }
#endif
  return __builtin_convertvector(x, vector_t<uint16_t, kCount>);
}

// kCount numbers: a register, or two halves of one more than fits.
template <typename F, int kCount, bool kFits = kCount * sizeof(F) <= kRegisterBytes>
struct Lanes {
  vector_t<F, kCount> all;

  static Lanes filled(F x) { return {x - vector_t<F, kCount>{}}; }

  static Lanes load(const F* from) {
    Lanes x;
    std::memcpy(&x, from, sizeof(x));
    return x;
  }
  static Lanes load(const bf16* from) {
    vector_t<uint16_t, kCount> halves;
    std::memcpy(&halves, from, sizeof(halves));
    return {bit_cast<vector_t<F, kCount>>(widen_bits<kCount>(halves) << 16)};
  }
  void store(F* to) const { std::memcpy(to, this, sizeof(*this)); }
  void store(bf16* to) const {  // round_to_bf16
    using Words = vector_t<uint32_t, kCount>;
    const Words bits = bit_cast<Words>(all);
    const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Words result = all == all ? rounded : Words{} + 0x7FC0;
    const auto halves = narrow_bits<kCount>(result);
    std::memcpy(to, &halves, sizeof(halves));
  }

  Lanes operator+(Lanes x) const { return {all + x.all}; }
  Lanes operator-(Lanes x) const { return {all - x.all}; }
  Lanes operator*(Lanes x) const { return {all * x.all}; }

  // f of the registers.
  template <typename Function>
  Lanes map(const Function& f) const {
    return {f(all)};
  }

  F sum() const {
    Lanes<F, kCount / 2> low, high;
    std::memcpy(&low, &all, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&all) + sizeof(low), sizeof(high));
    return (low + high).sum();
  }
};

template <typename F, int kCount>
struct Lanes<F, kCount, false> {
  using Half = Lanes<F, kCount / 2>;
  Half low, high;

  static Lanes filled(F x) { return {Half::filled(x), Half::filled(x)}; }

  template <typename T>
  static Lanes load(const T* from) {
    return {Half::load(from), Half::load(from + kCount / 2)};
  }
  template <typename T>
  void store(T* to) const {
    low.store(to);
    high.store(to + kCount / 2);
  }

  Lanes operator+(Lanes x) const { return {low + x.low, high + x.high}; }
  Lanes operator-(Lanes x) const { return {low - x.low, high - x.high}; }
  Lanes operator*(Lanes x) const { return {low * x.low, high * x.high}; }

  template <typename Function>
  Lanes map(const Function& f) const {
    return {low.map(f), high.map(f)};
  }

  F sum() const { return (low + high).sum(); }
};

template <typename F>
struct Lanes<F, 1, true> {
  F all;

  Lanes operator+(Lanes x) const { return {all + x.all}; }
  F sum() const { return all; }
};

template <typename F>
using Row = Lanes<F, 64 / sizeof(F)>;

// The lanes of a row's end: `count` numbers, and zeros.
template <typename F, int kCount = 64 / sizeof(F), typename T>
static inline Lanes<F, kCount> load_end(const T* from, int64_t count) {
  T padded[kCount] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
  return Lanes<F, kCount>::load(padded);
}

template <typename F, int kCount, typename T>
static inline void store_end(Lanes<F, kCount> x, T* to, int64_t count) {
  T padded[kCount];
  x.store(padded);
  for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

// A full register's worth of a row, and its end.
template <typename F>
struct FullLanes {
  template <typename T>
  Row<F> load(const T* from) const {
    return Row<F>::load(from);
  }
  template <typename T>
  void store(Row<F> x, T* to) const {
    x.store(to);
  }
};
template <typename F>
struct EndLanes {
  int64_t count;

  template <typename T>
  Row<F> load(const T* from) const {
    return load_end<F>(from, count);
  }
  template <typename T>
  void store(Row<F> x, T* to) const {
    store_end(x, to, count);
  }
};

// body(i, lanes) all along rows of `size` numbers: lanes.load(x + i) and lanes.store(result, y + i)
// move those that begin at i.
template <typename F, typename Body>
static inline void each_lanes(int64_t size, const Body& body) {
  constexpr int kLanes = 64 / sizeof(F);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, FullLanes<F>{});
  if (i < size) body(i, EndLanes<F>{size - i});
}

// The inner product of two rows of `size` numbers.
template <typename T, typename U>
static inline compute_t<T> dot(const T* x, const U* y, int64_t size) {
  using F = compute_t<T>;
  Row<F> sums = Row<F>::filled(0);
  each_lanes<F>(size, [&](int64_t i, auto lanes) {
    sums = sums + lanes.load(x + i) * lanes.load(y + i);
  });
  return sums.sum();
}

}  // namespace pgolf::cpu::PGOLF_ISA
