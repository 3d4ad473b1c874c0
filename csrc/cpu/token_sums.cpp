// token_sums on the CPU: an id at a time, some columns in a buffer. Sums are in float for float and
// bf16, in double for double.
#include "token_sums.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/lanes.h"
#include "host/parallel.h"
#include "kernels.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

constexpr int64_t kColumns = 256;  // of a buffer

template <typename T>
struct Operator {
  using F = compute_t<T>;
  TokenSumsShape shape;
  TokenOrder tokens;
  const T* x;
  const F* divisors;
  T* sums;

  // `count` columns from `column` on of one id.
  void columns(int64_t id, int64_t column, int64_t count) const {
    alignas(64) F sum[kColumns] = {};
    for (int64_t place = tokens.bounds[id]; place < tokens.bounds[id + 1]; ++place) {
      const int64_t token = tokens.order[place];
      const Row<F> factor = Row<F>::filled(divisors ? F(1) / divisors[token] : F(1));
      const T* const from = x + token * shape.stride + column;
      each_lanes<F>(count, [&](int64_t i, auto lanes) {
        lanes.store(lanes.load(sum + i) + factor * lanes.load(from + i), sum + i);
      });
    }
    T* const to = sums + id * shape.width + column;
    each_lanes<F>(count, [&](int64_t i, auto lanes) { lanes.store(lanes.load(sum + i), to + i); });
  }
};

}  // namespace

void token_sums(const TokenSumsShape& shape, const TokenOrder& tokens, const void* x,
                const void* divisors, void* sums, int threads) {
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const Operator<T> op = {shape, tokens, static_cast<const T*>(x),
                            static_cast<const compute_t<T>*>(divisors), static_cast<T*>(sums)};
    const int64_t blocks = (shape.width + kColumns - 1) / kColumns;
    const int64_t each = shape.vocab > 0 ? tokens.bounds[shape.vocab] / shape.vocab + 1 : 1;
    parallel_for(shape.vocab * blocks, each * kColumns * int64_t{sizeof(T)}, threads,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t column = i % blocks * kColumns;
                     op.columns(i / blocks, column, std::min(kColumns, shape.width - column));
                   }
                 });
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
