// weight_cast and fake_quant on the CPU, forward and backward: the formula of weight_cast.h, row by
// row over all matrices.
#include "weight_cast.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "host/parallel.h"
#include "kernels.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

constexpr int64_t kRowsAtOnce = 32;

// An integer of T's size. As integers, magnitudes are ordered as they are as numbers, with NaN on
// top: their largest is what torch's amax gives, in any order of comparison.
template <typename T>
struct Magnitude;
template <>
struct Magnitude<float> {
  using type = int32_t;
};
template <>
struct Magnitude<bf16> {
  using type = int16_t;
};
template <>
struct Magnitude<double> {
  using type = int64_t;
};

template <typename T>
compute_t<T> largest_magnitude(const T* row, int64_t count) {
  using I = typename Magnitude<T>::type;
  constexpr I kWithoutSign = static_cast<I>(~(I{1} << (8 * sizeof(I) - 1)));
  I largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const I magnitude = bit_cast<I>(row[i]) & kWithoutSign;
    largest = magnitude > largest ? magnitude : largest;
  }
  return widen(bit_cast<T>(largest));
}

template <Quantise kHow, typename T, typename To>
void cast_row(const T* w, To* out, CastRow<compute_t<T>> row, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = narrow<To>(row.scale * quantised<kHow>(widen(w[i]), row));
  }
}

// dw, which needs w only where codes may have been clipped.
template <Quantise kHow, typename T, typename To>
void row_gradient(const To* dout, const T* w, T* dw, CastRow<compute_t<T>> row,
                  int64_t count) {
  using F = compute_t<T>;
  for (int64_t i = 0; i < count; ++i) {
    const F weight = kHow == Quantise::no ? F(0) : widen(w[i]);
    dw[i] = narrow<T>(cast_gradients<kHow>(static_cast<F>(widen(dout[i])), weight, row).dw);
  }
}

// dw; the result is dscale: partial sums by column, added up in one fixed order.
template <Quantise kHow, typename T, typename To>
compute_t<T> row_gradients(const To* dout, const T* w, T* dw, CastRow<compute_t<T>> row,
                           int64_t count) {
  using F = compute_t<T>;
  constexpr int kSums = 64 / sizeof(F);
  F sums[kSums] = {};
  const auto add = [&](int64_t first, int number) {
    for (int i = 0; i < number; ++i) {
      const F weight = widen(w[first + i]);
      const auto d = cast_gradients<kHow>(static_cast<F>(widen(dout[first + i])), weight, row);
      dw[first + i] = narrow<T>(d.dw);
      sums[i] += d.dscale;
    }
  };
  int64_t first = 0;
  for (; first + kSums <= count; first += kSums) add(first, kSums);
  add(first, static_cast<int>(count - first));
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

template <typename F>
CastRow<F> row_of(const WeightCastShape& shape, const float* bits, const void* scale, int64_t r) {
  CastRow<F> row = {};
  if (bits) row.grid = fake_quant_grid<F>(*bits, shape.floor, shape.multiple, shape.full_range);
  row.scale = scale ? static_cast<const F*>(scale)[r] : F(1);
  return row;
}

// body(constant) for the way in which the rows of a matrix are quantised, as a type.
template <Quantise kHow>
struct How {
  static constexpr Quantise value = kHow;
};
template <typename Body>
void with_how(const WeightCastShape& shape, bool has_grid, const Body& body) {
  if (!has_grid || !(*shape.on > 0)) return body(How<Quantise::no>{});
  if (shape.multiple == 1) return body(How<Quantise::to_codes>{});
  return body(How<Quantise::to_multiples>{});
}

// body(T{}, To{}) for the element types of the weights and of what they are cast to.
template <typename Body>
void with_types(const WeightCastShape& shape, const Body& body) {
  with_element(shape.from, [&](auto from) {
    if (shape.to == Dtype::bf16) {
      body(from, bf16{});
    } else {
      body(from, compute_t<decltype(from)>{});
    }
  });
}

// body(matrix, begin, end) for ranges of rows that cover all matrices, on several threads.
template <typename Matrix, typename Body>
void each_range(const Matrix* matrices, int64_t count, int64_t bytes_per_element, int threads,
                const Body& body) {
  int64_t rows = 0, elements = 0;
  for (int64_t i = 0; i < count; ++i) {
    rows += matrices[i].rows;
    elements += matrices[i].rows * matrices[i].cols;
  }
  if (rows == 0) return;
  const int64_t bytes = elements / rows * bytes_per_element + 1;
  parallel_for(rows, bytes, threads, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // row of the matrix
    for (const Matrix* m = matrices; m != matrices + count; first += m->rows, ++m) {
      const int64_t from = std::max(begin - first, int64_t{0});
      const int64_t to = std::min(end - first, m->rows);
      for (int64_t r = from; r < to; r += kRowsAtOnce) {
        body(*m, r, std::min(r + kRowsAtOnce, to));
      }
    }
  });
}

// Rows [begin, end) of a matrix, at most kRowsAtOnce.
template <Quantise kHow, typename T, typename To>
void cast_rows(const WeightCastShape& shape, const CastMatrix& m, int64_t begin, int64_t end) {
  using F = compute_t<T>;
  const T* w = static_cast<const T*>(m.w.data);
  const auto grid_row = row_of<F>(shape, m.clip_factor ? m.bits : nullptr, nullptr, 0);
  F steps[kRowsAtOnce] = {};
  // All steps first: codes would have to wait for the step of their own row.
  for (int64_t r = begin; m.clip_factor && r < end; ++r) {
    const F amax = largest_magnitude(w + r * m.w.row_stride, m.cols);
    steps[r - begin] = fake_quant_step(amax, static_cast<F>(m.clip_factor[r]), grid_row.grid);
    if (m.step) static_cast<F*>(m.step)[r] = steps[r - begin];
  }
  for (int64_t r = begin; r < end; ++r) {
    CastRow<F> row = grid_row;
    row.step = steps[r - begin];
    if (m.scale) row.scale = static_cast<const F*>(m.scale)[r];
    cast_row<kHow>(w + r * m.w.row_stride, static_cast<To*>(m.out) + r * m.cols, row, m.cols);
  }
}

template <Quantise kHow, typename T, typename To>
void gradients_of_rows(const WeightCastShape& shape, const CastGradient& m, int64_t begin,
                       int64_t end) {
  using F = compute_t<T>;
  for (int64_t r = begin; r < end; ++r) {
    auto row = row_of<F>(shape, m.step ? m.bits : nullptr, m.scale, r);
    if (m.step) row.step = static_cast<const F*>(m.step)[r];
    row.all_pass = !shape.clip_mask;
    const To* dout = static_cast<const To*>(m.dout.data) + r * m.dout.row_stride;
    const T* w = static_cast<const T*>(m.w.data) + r * m.w.row_stride;
    T* dw = static_cast<T*>(m.dw) + r * m.cols;
    if (m.dscale) {
      static_cast<F*>(m.dscale)[r] = row_gradients<kHow>(dout, w, dw, row, m.cols);
    } else if (shape.clip_mask) {
      row_gradient<kHow>(dout, w, dw, row, m.cols);
    } else {
      row_gradient<Quantise::no>(dout, w, dw, row, m.cols);
    }
  }
}

}  // namespace

void weight_cast(const WeightCastShape& shape, const CastMatrix* matrices, int64_t count,
                 int threads) {
  with_types(shape, [&](auto from, auto to) {
    using T = decltype(from);
    using To = decltype(to);
    const auto cast = [&](const CastMatrix& m, int64_t begin, int64_t end) {
      with_how(shape, m.clip_factor, [&](auto how) {
        cast_rows<decltype(how)::value, T, To>(shape, m, begin, end);
      });
    };
    each_range(matrices, count, sizeof(T) + sizeof(To), threads, cast);
  });
}

void weight_cast_backward(const WeightCastShape& shape, const CastGradient* matrices,
                          int64_t count, int threads) {
  with_types(shape, [&](auto from, auto to) {
    using T = decltype(from);
    using To = decltype(to);
    const auto differentiate = [&](const CastGradient& m, int64_t begin, int64_t end) {
      with_how(shape, m.step, [&](auto how) {
        gradients_of_rows<decltype(how)::value, T, To>(shape, m, begin, end);
      });
    };
    each_range(matrices, count, 2 * sizeof(T) + sizeof(To), threads, differentiate);
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
