// fake_quant on the CPU, forward and backward with a clip mask: the formula of fake_quant.h.
#include "fake_quant.h"

#include "cpu/dispatch.h"
#include "cpu/launchers.h"
#include "host/parallel.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

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

template <bool kMultiples, typename T>
void quantize_row(const T* w, T* out, compute_t<T> step, const FakeQuantGrid<compute_t<T>>& grid,
                  int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const auto code = fake_quant_code<kMultiples>(widen(w[i]), step, grid);
    out[i] = narrow<T>(fake_quant_clamp(code, grid) * step);
  }
}

template <bool kMultiples, typename T>
void mask_row(const T* dout, const T* w, T* dw, compute_t<T> step,
              const FakeQuantGrid<compute_t<T>>& grid, int64_t count) {
  using I = typename Magnitude<T>::type;
  for (int64_t i = 0; i < count; ++i) {
    const auto code = fake_quant_code<kMultiples>(widen(w[i]), step, grid);
    const bool kept = (code >= grid.least) & (code <= grid.qmax);
    dw[i] = bit_cast<T>(static_cast<I>(bit_cast<I>(dout[i]) & -static_cast<I>(kept)));
  }
}

template <typename T>
void copy_row(const T* from, T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

template <typename F>
FakeQuantGrid<F> grid_of(const FakeQuantShape& shape) {
  return fake_quant_grid<F>(shape.bits, shape.floor, shape.multiple, shape.full_range);
}

}  // namespace

void fake_quant(const FakeQuantShape& shape, Rows w, const float* clip_factor, void* out,
                void* scale, int threads) {
  if (shape.cols == 0) return;
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    using F = compute_t<T>;
    const auto grid = grid_of<F>(shape);
    const int64_t bytes = 2 * shape.cols * int64_t{sizeof(T)};
    parallel_for(shape.rows, bytes, threads, [&](int64_t begin, int64_t end) {
      const T* rows = static_cast<const T*>(w.data);
      F* steps = static_cast<F*>(scale);
      // All steps of the range first: codes would have to wait for the step of their own row.
      for (int64_t r = begin; r < end; ++r) {
        const F amax = largest_magnitude(rows + r * w.row_stride, shape.cols);
        steps[r] = fake_quant_step(amax, static_cast<F>(clip_factor[r]), grid);
      }
      for (int64_t r = begin; r < end; ++r) {
        const T* from = rows + r * w.row_stride;
        T* to = static_cast<T*>(out) + r * shape.cols;
        const F step = steps[r];
        if (!shape.on) {
          copy_row(from, to, shape.cols);
        } else if (shape.multiple == 1) {
          quantize_row<false>(from, to, step, grid, shape.cols);
        } else {
          quantize_row<true>(from, to, step, grid, shape.cols);
        }
      }
    });
  });
}

void fake_quant_backward(const FakeQuantShape& shape, Rows dout, Rows w, const void* scale,
                         void* dw, int threads) {
  if (shape.cols == 0) return;
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    using F = compute_t<T>;
    const auto grid = grid_of<F>(shape);
    const int64_t bytes = 3 * shape.cols * int64_t{sizeof(T)};
    parallel_for(shape.rows, bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const T* from = static_cast<const T*>(dout.data) + r * dout.row_stride;
        const T* weights = static_cast<const T*>(w.data) + r * w.row_stride;
        T* to = static_cast<T*>(dw) + r * shape.cols;
        const F step = static_cast<const F*>(scale)[r];
        if (!shape.on) {
          copy_row(from, to, shape.cols);
        } else if (shape.multiple == 1) {
          mask_row<false>(from, weights, to, step, grid, shape.cols);
        } else {
          mask_row<true>(from, weights, to, step, grid, shape.cols);
        }
      }
    });
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
