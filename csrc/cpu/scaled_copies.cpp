// scaled_copies on the CPU: row by row, so that each tensor comes from memory once. Sums are in float
// for float and bf16, in double for double.
#include "scaled_copies.h"

#include "cpu/dispatch.h"
#include "cpu/item_parts.h"
#include "cpu/lanes.h"
#include "cpu/stream.h"
#include "kernels.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

template <typename T>
struct CopiesBackward {
  using F = compute_t<T>;
  ScaledCopiesShape shape;
  const void* const* gradients;
  const T* x;
  const F* factors;
  Output<T> dx;

  // What the token adds to the gradients of factors is added to sums (count, D).
  void row(int64_t index, F* sums) const {
    const int64_t width = shape.width, first = index * width;
    each_lanes<F>(width, [&](int64_t col, auto lanes) {
      const int64_t at = first + col;
      const Row<F> own = lanes.load(x + at);
      Row<F> sum = Row<F>::filled(0);
      for (int i = 0; i < shape.count; ++i) {
        if (gradients[i] == nullptr) continue;
        const Row<F> g = lanes.load(static_cast<const T*>(gradients[i]) + at);
        sum = sum + lanes.load(factors + i * width + col) * g;
        F* const of_factor = sums + i * width + col;
        lanes.store(lanes.load(of_factor) + g * own, of_factor);
      }
      dx.store(lanes, sum, at);
    });
  }
};

}  // namespace

void scaled_copies_backward(const ScaledCopiesShape& shape, const ScaledCopiesInputs& in,
                            const void* const* gradients, void* dx, void* partials, int threads) {
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    using F = compute_t<T>;
    const CopiesBackward<T> op{shape, gradients, static_cast<const T*>(in.x),
                               static_cast<const F*>(in.factors),
                               Output<T>(dx, shape.rows, shape.width)};
    const int64_t numbers = shape.count * shape.width;
    const int64_t bytes = (shape.count + 2) * shape.width * int64_t{sizeof(T)};
    for_items_in_parts<F>(copies_parts(shape.rows), shape.rows, numbers, partials, bytes, threads,
                          [&](int64_t row, F* sums) { op.row(row, sums); });
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
