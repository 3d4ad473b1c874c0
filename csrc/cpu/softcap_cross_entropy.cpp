// softcap_cross_entropy on the CPU: rows of logits become their gradients, and one loss a row. A row
// is worked on in tiles whose tanh and exp stay in the cache; those of longer rows are computed
// twice.
#include "softcap_cross_entropy.h"

#include <algorithm>
#include <limits>

#include "cpu/dispatch.h"
#include "cpu/exponential.h"
#include "cpu/lanes.h"
#include "host/parallel.h"
#include "kernels.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

constexpr int64_t kTile = 2048;

template <typename F>
struct Cap {
  F cap;  // 0: none

  // (Not a product with 1 / cap, whose rounding would shift all logits alike.)
  Row<F> tanh_of(Row<F> z) const {
    if (cap == F(0)) return Row<F>::filled(0);
    return z.map([this](auto x) { return tanh(x / cap); });
  }
  Row<F> logit(Row<F> z, Row<F> tanh_z) const {
    return cap == F(0) ? z : Row<F>::filled(cap) * tanh_z;
  }
  F logit(F z) const {
    const Row<F> all = Row<F>::filled(z);
    F lanes[64 / sizeof(F)];
    logit(all, tanh_of(all)).store(lanes);
    return lanes[0];
  }
};

// NaN is not looked for: it comes back from the sum.
template <typename F, typename T>
F greatest_of(const T* z, int64_t cols) {
  F greatest = -std::numeric_limits<F>::infinity();
  for (int64_t i = 0; i < cols; ++i) greatest = std::max(greatest, widen(z[i]));
  return greatest;
}

template <typename F>
struct Tile {
  F tanhs[kTile], powers[kTile];  // tanh(z / cap), exp(l - m)

  // Returns the sum of the powers.
  template <typename T>
  F fill(const T* z, int64_t count, const Cap<F>& cap, F greatest) {
    Row<F> sums = Row<F>::filled(0);
    each_lanes<F>(count, [&](int64_t i, auto lanes) {
      const Row<F> loaded = lanes.load(z + i), t = cap.tanh_of(loaded);
      const Row<F> below = cap.logit(loaded, t) - Row<F>::filled(greatest);
      lanes.store(t, tanhs + i);
      lanes.store(below.map([](auto x) { return exp_below_0(x); }), powers + i);
      sums = sums + lanes.load(powers + i);  // without what lies behind the row's end
    });
    return sums.sum();
  }

  template <typename T>
  void gradient(T* dz, int64_t count, F scale) const {
    each_lanes<F>(count, [&](int64_t i, auto lanes) {
      const Row<F> t = lanes.load(tanhs + i);
      const Row<F> slope = Row<F>::filled(1) - t * t;
      lanes.store(lanes.load(powers + i) * Row<F>::filled(scale) * slope, dz + i);
    });
  }
};

template <typename T>
void one_row(const LossShape& shape, T* z, int64_t target, compute_t<T>* loss,
             Tile<compute_t<T>>& tile) {
  using F = compute_t<T>;
  const Cap<F> cap{static_cast<F>(shape.cap)};
  const F greatest = cap.logit(greatest_of<F>(z, shape.cols));
  const bool ignored = target == kIgnoredTarget;
  const F factor = ignored ? F(0) : static_cast<F>(shape.factor);
  F sum = 0;
  for (int64_t i = 0; i < shape.cols; i += kTile) {
    sum += tile.fill(z + i, std::min(kTile, shape.cols - i), cap, greatest);
  }
  const F target_logit = ignored ? greatest : cap.logit(widen(z[target]));
  const LossRow<F> row = loss_row(greatest, sum, target_logit, factor);
  *loss = ignored ? F(0) : row.loss;
  if (!shape.gradient) return;
  for (int64_t i = 0; i < shape.cols; i += kTile) {
    const int64_t count = std::min(kTile, shape.cols - i);
    if (shape.cols > kTile) tile.fill(z + i, count, cap, greatest);
    tile.gradient(z + i, count, row.scale);
    if (target >= i && target < i + count) {
      const F t = tile.tanhs[target - i];
      z[target] = narrow<T>((tile.powers[target - i] * row.scale - factor) * (F(1) - t * t));
    }
  }
}

}  // namespace

void softcap_cross_entropy(const LossShape& shape, void* z, const int64_t* targets, void* losses,
                           int threads) {
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    using F = compute_t<T>;
    const int64_t bytes = 2 * shape.cols * int64_t{sizeof(T)};
    parallel_for(shape.rows, bytes, threads, [&](int64_t begin, int64_t end) {
      Tile<F> tile;
      for (int64_t row = begin; row < end; ++row) {
        one_row(shape, static_cast<T*>(z) + row * shape.cols, targets[row],
                static_cast<F*>(losses) + row, tile);
      }
    });
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
