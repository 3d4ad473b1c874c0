// Stores that go around the caches, for outputs that do not fit them: an ordinary store first reads
// the line that it is about to overwrite. Measured here on a loaded machine, a copy of 25 MB by one
// thread moves 27 GB/s with them and 13 to 17 without; where the caches hold all of it, both are
// alike.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/lanes.h"

namespace pgolf::cpu::PGOLF_ISA {

constexpr int64_t kStreamFromBytes = 8 << 20;
constexpr int64_t kLineBytes = 64;

// Whether an output of `rows` rows of `row_bytes` is to be streamed, row after row.
static inline bool worth_streaming(const void* to, int64_t rows, int64_t row_bytes) {
  return rows * row_bytes >= kStreamFromBytes && row_bytes % kLineBytes == 0 &&
         reinterpret_cast<std::uintptr_t>(to) % kLineBytes == 0;
}

// kBytes, a multiple of 32, to an address that is one, too.
template <int kBytes>
static inline void stream(const void* from, void* to) {
  static_assert(kBytes % 32 == 0);
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
#if defined(__AVX512F__)
  if constexpr (kBytes % 64 == 0) {
    for (int i = 0; i < kBytes; i += 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
    }
    return;
  }
#endif
#if defined(__AVX2__)
  for (int i = 0; i < kBytes; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
  }
#elif defined(__SSE2__)
  for (int i = 0; i < kBytes; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(target + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
  }
#else
  std::memcpy(target, source, kBytes);
#endif
}

// `bytes` of whole cache lines, from one to another.
static inline void stream_lines(const void* from, void* to, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLineBytes) {
    stream<kLineBytes>(static_cast<const char*>(from) + i, static_cast<char*>(to) + i);
  }
}

// A contiguous output of rows, written around the caches where that is worth it; or none, which must
// not be written. kMaxSize bounds the rows of `row`.
template <typename T, int64_t kMaxSize = 0>
class Output {
 public:
  // `may_stream` is false where the same memory is read: its lines are in the caches.
  Output(void* to, int64_t rows, int64_t size, bool may_stream = true)
      : to_(static_cast<T*>(to)),
        size_(size),
        streamed_(may_stream && worth_streaming(to, rows, size * int64_t{sizeof(T)})) {}

  explicit operator bool() const { return to_ != nullptr; }

  // What each_lanes calls `lanes` stores x from element `at` on. (Rows that are streamed have no
  // other end than full lanes.)
  template <typename F, typename Lanes>
  void store(const Lanes& lanes, Row<F> x, int64_t at) const {
    if (!streamed_) return lanes.store(x, to_ + at);
    T narrowed[64 / sizeof(F)];
    x.store(narrowed);
    stream<sizeof(narrowed)>(narrowed, to_ + at);
  }

  // The first `count` of kCount numbers, from element `at` on.
  template <int kCount>
  void block(const T (&from)[kCount], int64_t at, int count) const {
    if (streamed_ && count == kCount) return stream<sizeof(from)>(from, to_ + at);
    for (int i = 0; i < count; ++i) to_[at + i] = from[i];
  }

  // fill(address) writes row number `index` there.
  template <typename Fill>
  void row(int64_t index, const Fill& fill) const {
    T* const target = to_ + index * size_;
    if (!streamed_) return fill(target);
    alignas(kLineBytes) T row[kMaxSize];
    fill(row);
    stream_lines(row, target, size_ * int64_t{sizeof(T)});
  }

 private:
  T* to_;
  int64_t size_;
  bool streamed_;
};

// After the last of a range: before other threads are told that it is done.
static inline void end_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace pgolf::cpu::PGOLF_ISA
