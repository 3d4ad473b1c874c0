// residual_norm on the CPU: the formulas of residual_norm.h, row by row, so that each tensor comes
// from memory once. Sums are in float for float and bf16, in double for double.
#include "residual_norm.h"

#include "cpu/dispatch.h"
#include "cpu/item_parts.h"
#include "cpu/lanes.h"
#include "cpu/stream.h"
#include "host/parallel.h"
#include "kernels.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

// x + factors y, where no y is nothing and no factors are 1.
template <typename F, typename T, typename Lanes>
Row<F> added(Row<F> x, const Lanes& lanes, const T* y, int64_t at, const F* factors, int64_t col) {
  if (y == nullptr) return x;
  const Row<F> term = lanes.load(y + at);
  return x + (factors ? lanes.load(factors + col) * term : term);
}

template <typename T>
struct Inputs {
  using F = compute_t<T>;
  const T *x, *branch, *skip, *x0;
  const F *branch_scale, *skip_weight, *mix0, *mix1;

  explicit Inputs(const ResidualNormInputs& in)
      : x(static_cast<const T*>(in.x)),
        branch(static_cast<const T*>(in.branch)),
        skip(static_cast<const T*>(in.skip)),
        x0(static_cast<const T*>(in.x0)),
        branch_scale(static_cast<const F*>(in.branch_scale)),
        skip_weight(static_cast<const F*>(in.skip_weight)),
        mix0(static_cast<const F*>(in.mix0)),
        mix1(static_cast<const F*>(in.mix1)) {}
};

template <typename T>
struct Forward {
  using F = compute_t<T>;
  ResidualNormShape shape;
  Inputs<T> in;
  Output<T> total, x_in, h;
  F* rstd;

  Forward(const ResidualNormShape& s, const ResidualNormInputs& i, const ResidualNormOutputs& out)
      : shape(s),
        in(i),
        total(out.total, s.rows, s.width),
        x_in(out.x_in, s.rows, s.width),
        h(out.h, s.rows, s.width),
        rstd(static_cast<F*>(out.rstd)) {}

  void row(int64_t index) const {
    const int64_t width = shape.width, first = index * width;
    alignas(64) F mixed[kMaxResidualWidth];
    Row<F> squares = Row<F>::filled(0);
    each_lanes<F>(width, [&](int64_t col, auto lanes) {
      const int64_t at = first + col;
      Row<F> x = lanes.load(in.x + at);
      x = added(x, lanes, in.branch, at, in.branch_scale, col);
      x = added(x, lanes, in.skip, at, in.skip_weight, col);
      if (total) total.store(lanes, x, at);
      if (in.mix0) x = lanes.load(in.mix0 + col) * x;
      if (in.mix1) x = added(x, lanes, in.x0, at, in.mix1, col);
      if (x_in) x_in.store(lanes, x, at);
      squares = squares + x * x;
      x.store(mixed + col);  // whole lanes: there is room, and zeros follow the end
    });
    const F own = rms_rstd(squares.sum(), width, static_cast<F>(shape.eps));
    const F scaled = static_cast<F>(shape.scale) * own;
    rstd[index] = shape.factored ? scaled : own;
    if (shape.factored) return;
    const Row<F> factor = Row<F>::filled(scaled);
    each_lanes<F>(width, [&](int64_t col, auto lanes) {
      h.store(lanes, factor * Row<F>::load(mixed + col), first + col);
    });
  }
};

template <typename T>
struct Backward {
  using F = compute_t<T>;
  ResidualNormShape shape;
  ResidualNormGradient<F> gradient;
  Inputs<T> in;
  const T *x_in, *d_total, *d_x_in, *dh;
  const F *rstd, *total_scale, *x_in_scale;
  Output<T> dx, dbranch, dskip, dx0;

  Backward(const ResidualNormShape& s, const ResidualNormInputs& i, const ResidualNormUpstream& up,
           const ResidualNormGradients& out)
      : shape(s),
        gradient(s),
        in(i),
        x_in(static_cast<const T*>(up.x_in)),
        d_total(static_cast<const T*>(up.d_total)),
        d_x_in(static_cast<const T*>(up.d_x_in)),
        dh(static_cast<const T*>(up.dh)),
        rstd(static_cast<const F*>(up.rstd)),
        total_scale(static_cast<const F*>(up.total_scale)),
        x_in_scale(static_cast<const F*>(up.x_in_scale)),
        dx(out.dx, s.rows, s.width),
        dbranch(out.dbranch, s.rows, s.width),
        dskip(out.dskip, s.rows, s.width),
        dx0(out.dx0, s.rows, s.width) {}

  // What the token adds to the gradients of parameters is added to sums (P, D).
  void row(int64_t index, F* sums) const {
    const int64_t width = shape.width, first = index * width;
    const F along = dh ? dot(dh + first, x_in + first, width) : F(0);
    const auto norm = gradient.of(along, rstd[index], width);
    each_lanes<F>(width, [&](int64_t col, auto lanes) {
      const int64_t at = first + col;
      F* sum = sums + col;
      const auto add_to_next_sum = [&](Row<F> x) {
        lanes.store(lanes.load(sum) + x, sum);
        sum += width;
      };
      const Row<F> of_x_in = d_x_in ? lanes.load(d_x_in + at) : Row<F>::filled(0);
      const Row<F> of_total = d_total ? lanes.load(d_total + at) : Row<F>::filled(0);
      // The gradient of x_in, G.
      Row<F> g = x_in_scale ? lanes.load(x_in_scale + col) * of_x_in : of_x_in;
      if (dh) {
        g = g + (Row<F>::filled(norm.of_dn) * lanes.load(dh + at) +
                 Row<F>::filled(norm.of_x) * lanes.load(x_in + at));
      }
      Row<F> d = in.mix0 ? lanes.load(in.mix0 + col) * g : g;
      if (d_total) d = d + (total_scale ? lanes.load(total_scale + col) * of_total : of_total);
      dx.store(lanes, d, at);
      if (in.branch_scale) {
        dbranch.store(lanes, lanes.load(in.branch_scale + col) * d, at);
        add_to_next_sum(d * lanes.load(in.branch + at));
      }
      if (in.skip_weight) {
        dskip.store(lanes, lanes.load(in.skip_weight + col) * d, at);
        add_to_next_sum(d * lanes.load(in.skip + at));
      }
      if (dx0) dx0.store(lanes, in.mix1 ? lanes.load(in.mix1 + col) * g : g, at);
      if (in.mix0 && in.x) add_to_next_sum(g * lanes.load(in.x + at));
      if (in.mix1 && in.x) add_to_next_sum(g * lanes.load(in.x0 + at));
      if (total_scale) add_to_next_sum(of_total * lanes.load(in.x + at));
      if (x_in_scale) add_to_next_sum(of_x_in * lanes.load(x_in + at));
    });
  }
};

}  // namespace

void residual_norm(const ResidualNormShape& shape, const ResidualNormInputs& in,
                   const ResidualNormOutputs& out, int threads) {
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const Forward<T> op(shape, in, out);
    const int64_t bytes = 4 * shape.width * int64_t{sizeof(T)};
    parallel_for(shape.rows, bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) op.row(row);
      end_streaming();
    });
  });
}

void residual_norm_backward(const ResidualNormShape& shape, const ResidualNormInputs& in,
                            const ResidualNormUpstream& upstream, const ResidualNormGradients& out,
                            int threads) {
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    using F = compute_t<T>;
    const Backward<T> op(shape, in, upstream, out);
    const int64_t numbers = residual_parameters(in, upstream) * shape.width;
    const int64_t bytes = 5 * shape.width * int64_t{sizeof(T)};
    for_items_in_parts<F>(residual_parts(shape.rows), shape.rows, numbers, out.partials, bytes,
                          threads, [&](int64_t row, F* sums) { op.row(row, sums); });
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
