// leaky_relu2 on the CPU, forward and backward: the formula of leaky_relu2.h, 32 elements and their
// word of signs at a time. (The MLP's matrix products stay with torch.)
#include "cpu/dispatch.h"
#include "cpu/stream.h"
#include "host/parallel.h"
#include "kernels.h"
#include "leaky_relu2.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

template <typename F>
struct RowFactors {
  F slope, rstd;
};

struct BitTable {
  uint32_t of[kBitsPerWord];
};

constexpr BitTable make_bit_table() {
  BitTable table = {};
  for (int i = 0; i < kBitsPerWord; ++i) table.of[i] = uint32_t{1} << i;
  return table;
}

// From memory, as not all instruction sets shift each lane by its own count.
constexpr BitTable kBit = make_bit_table();

// `count` is at most 32, and 32 itself where it is a constant. All is read before anything is
// written, as post may be pre.
template <typename T>
inline uint32_t forward_block(const T* pre, const Output<T>& post, int64_t at,
                              RowFactors<compute_t<T>> row, int count) {
  using F = compute_t<T>;
  F x[kBitsPerWord];
  uint32_t bits = 0;
  for (int i = 0; i < count; ++i) x[i] = widen(pre[i]) * row.rstd;
  for (int i = 0; i < count; ++i) bits |= x[i] > F(0) ? kBit.of[i] : 0;
  T result[kBitsPerWord];
  for (int i = 0; i < count; ++i) result[i] = narrow<T>(leaky_relu2_value(x[i], row.slope));
  post.block(result, at, count);
  return bits;
}

template <typename T>
inline void backward_block(const T* dpost, const T* post, uint32_t bits, const Output<T>& dpre,
                           int64_t at, RowFactors<compute_t<T>> row, int count) {
  using F = compute_t<T>;
  T result[kBitsPerWord];
  for (int i = 0; i < count; ++i) {
    const F derivative = leaky_relu2_derivative(widen(post[i]), (bits & kBit.of[i]) != 0, row.slope);
    result[i] = narrow<T>(widen(dpost[i]) * derivative * row.rstd);
  }
  dpre.block(result, at, count);
}

template <typename F>
RowFactors<F> row_factors(const LeakyRelu2Shape& shape, int64_t row) {
  return {static_cast<F>(shape.slope), shape.rstd ? static_cast<const F*>(shape.rstd)[row] : F(1)};
}

// Calls block(row, first column, word, count) for every word of rows [begin, end).
template <typename Block>
inline void each_word(int64_t cols, int64_t begin, int64_t end, const Block& block) {
  const int64_t words = sign_words(cols);
  for (int64_t row = begin; row < end; ++row) {
    int64_t word = 0;
    for (; (word + 1) * kBitsPerWord <= cols; ++word) {
      block(row, row * cols + word * kBitsPerWord, row * words + word, kBitsPerWord);
    }
    if (word < words) {
      const int64_t left = cols - word * kBitsPerWord;
      block(row, row * cols + word * kBitsPerWord, row * words + word, static_cast<int>(left));
    }
  }
}

}  // namespace

void leaky_relu2(const LeakyRelu2Shape& shape, const void* pre, void* post, uint32_t* bits,
                 int threads) {
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(pre);
    const Output<T> to(post, shape.rows, shape.cols, pre != post);
    const int64_t bytes = 2 * shape.cols * int64_t{sizeof(T)};
    parallel_for(shape.rows, bytes, threads, [&](int64_t begin, int64_t end) {
      each_word(shape.cols, begin, end, [&](int64_t row, int64_t at, int64_t word, int count) {
        bits[word] =
            forward_block(from + at, to, at, row_factors<compute_t<T>>(shape, row), count);
      });
      end_streaming();
    });
  });
}

void leaky_relu2_backward(const LeakyRelu2Shape& shape, const void* dpost, const void* post,
                          const uint32_t* bits, void* dpre, int threads) {
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(dpost);
    const T* activation = static_cast<const T*>(post);
    const Output<T> to(dpre, shape.rows, shape.cols, dpost != dpre);
    const int64_t bytes = 3 * shape.cols * int64_t{sizeof(T)};
    parallel_for(shape.rows, bytes, threads, [&](int64_t begin, int64_t end) {
      each_word(shape.cols, begin, end, [&](int64_t row, int64_t at, int64_t word, int count) {
        backward_block(from + at, activation + at, bits[word], to, at,
                       row_factors<compute_t<T>>(shape, row), count);
      });
      end_streaming();
    });
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
