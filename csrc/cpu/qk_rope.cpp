// qk_rope on the CPU: the formulas of qk_rope.h, head by head, so that each comes from memory once.
// Sums over a head are in float for float and bf16, in double for double.
#include "qk_rope.h"

#include <algorithm>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/item_parts.h"
#include "cpu/lanes.h"
#include "cpu/stream.h"
#include "heads.h"
#include "host/parallel.h"
#include "kernels.h"
#include "rms_norm.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

constexpr int kPairs = 8;  // that are rotated at once; r is 16 in most recipes
template <typename F>
using Pairs = Lanes<F, kPairs>;

template <typename F, typename T>
Pairs<F> load_pairs(const T* from, int64_t count) {
  return count == kPairs ? Pairs<F>::load(from) : load_end<F, kPairs>(from, count);
}

template <typename F, typename T>
void store_pairs(Pairs<F> x, T* to, int64_t count) {
  if (count == kPairs) {
    x.store(to);
  } else {
    store_end(x, to, count);
  }
}

// The first and the second half of some rotated pairs.
template <typename F>
struct Halves {
  Pairs<F> first, second;
};

// The rotation R of one token.
template <typename F>
struct Turn {
  const F* cos;
  const F* sin;
  int64_t half;

  template <typename T>
  Halves<F> load(const T* x, int64_t j, int64_t count) const {
    return {load_pairs<F>(x + j, count), load_pairs<F>(x + half + j, count)};
  }

  // R x
  template <typename T>
  Halves<F> forward(const T* x, int64_t j, int64_t count) const {
    const Pairs<F> c = load_pairs<F>(cos + j, count), s = load_pairs<F>(sin + j, count);
    const Halves<F> pair = load(x, j, count);
    return {pair.first * c + pair.second * s, pair.second * c - pair.first * s};
  }

  // R^T x
  template <typename T>
  Halves<F> back(const T* x, int64_t j, int64_t count) const {
    const Pairs<F> c = load_pairs<F>(cos + j, count), s = load_pairs<F>(sin + j, count);
    const Halves<F> pair = load(x, j, count);
    return {pair.first * c - pair.second * s, pair.second * c + pair.first * s};
  }

  // body(j, count) for the pairs j to j + count.
  template <typename Body>
  void each(const Body& body) const {
    for (int64_t j = 0; j < half; j += kPairs) body(j, std::min<int64_t>(kPairs, half - j));
  }
};

// to = factor R x
template <typename T>
void turn_head(const T* x, Turn<compute_t<T>> turn, compute_t<T> factor, int64_t size, T* to) {
  using F = compute_t<T>;
  turn.each([&](int64_t j, int64_t count) {
    const Halves<F> turned = turn.forward(x, j, count);
    store_pairs<F>(turned.first * Pairs<F>::filled(factor), to + j, count);
    store_pairs<F>(turned.second * Pairs<F>::filled(factor), to + turn.half + j, count);
  });
  const int64_t r = 2 * turn.half;
  each_lanes<F>(size - r, [&](int64_t i, auto lanes) {
    lanes.store(lanes.load(x + r + i) * Row<F>::filled(factor), to + r + i);
  });
}

// What the gradient of a head is made of: w = R^T dy and x, widened, and their inner products. Where
// heads come from results x is n = R^T y / gain.
template <typename F>
struct Widened {
  alignas(64) F w[kMaxRopeSize];
  alignas(64) F x[kMaxRopeSize];
  F along, squares;  // w . x and x . x

  template <bool kOfResults, typename T>
  void load(const T* dy, const T* from, Turn<F> turn, F gain, int64_t size) {
    const F scale = kOfResults ? F(1) / gain : F(1);
    const auto turned = [&](int64_t j, int64_t count) {
      if constexpr (!kOfResults) return turn.load(from, j, count);
      const Halves<F> back = turn.back(from, j, count);
      const Pairs<F> each = Pairs<F>::filled(scale);
      return Halves<F>{back.first * each, back.second * each};
    };
    Pairs<F> pair_along = Pairs<F>::filled(0), pair_squares = Pairs<F>::filled(0);
    turn.each([&](int64_t j, int64_t count) {
      const Halves<F> back = turn.back(dy, j, count), pair = turned(j, count);
      pair_along = pair_along + (back.first * pair.first + back.second * pair.second);
      pair_squares = pair_squares + (pair.first * pair.first + pair.second * pair.second);
      store_pairs(back.first, w + j, count);
      store_pairs(back.second, w + turn.half + j, count);
      store_pairs(pair.first, x + j, count);
      store_pairs(pair.second, x + turn.half + j, count);
    });
    const int64_t r = 2 * turn.half;
    Row<F> row_along = Row<F>::filled(0), row_squares = Row<F>::filled(0);
    each_lanes<F>(size - r, [&](int64_t i, auto lanes) {
      const Row<F> same = lanes.load(dy + r + i);
      const Row<F> head = kOfResults ? lanes.load(from + r + i) * Row<F>::filled(scale)
                                     : lanes.load(from + r + i);
      row_along = row_along + same * head;
      row_squares = row_squares + head * head;
      lanes.store(same, w + r + i);
      lanes.store(head, x + r + i);
    });
    along = pair_along.sum() + row_along.sum();
    squares = pair_squares.sum() + row_squares.sum();
  }
};

template <typename T>
using HeadOutput = Output<T, kMaxRopeSize>;

// kSize and kHalf are d and r/2 where they are known when this is compiled, so that loops unroll;
// otherwise 0.
template <typename T, int kSize, int kHalf>
struct Operator {
  using F = compute_t<T>;
  QkRopeShape shape;
  const T *qkv, *q, *k;  // the last two, with rstds, in place of qkv
  const F* rstds;
  const F* cos;
  const F* sin;
  const F* gain;
  const F* factors;

  Operator(const QkRopeShape& s, const QkRopeInputs& in, const QkRopeResults& results)
      : shape(s),
        qkv(static_cast<const T*>(in.qkv)),
        q(static_cast<const T*>(results.q)),
        k(static_cast<const T*>(results.k)),
        rstds(static_cast<const F*>(results.rstd)),
        cos(static_cast<const F*>(in.cos)),
        sin(static_cast<const F*>(in.sin)),
        gain(static_cast<const F*>(in.gain)),
        factors(static_cast<const F*>(in.factor)) {}

  int64_t size() const { return kSize ? kSize : shape.size; }
  int64_t half() const { return kSize ? kHalf : shape.half; }
  int64_t tokens() const { return shape.batch * shape.time; }
  int64_t heads() const { return shape.heads + 2 * shape.kv_heads; }  // of a token's qkv
  int64_t token_bytes() const { return heads() * size() * int64_t{sizeof(T)}; }

  const T* head(int64_t token, int64_t index) const {
    return qkv + (token * heads() + index) * size();
  }
  Turn<F> turn(int64_t token) const {
    const int64_t first = token % shape.time * half();
    return {cos + first, sin + first, half()};
  }
  F factor_of(int64_t token) const { return factors ? factors[token] : F(1); }
  F rstd(F squares, F factor) const {
    return shape.norm ? rope_rstd(squares, size(), static_cast<F>(shape.eps), factor) : factor;
  }

  // value: of this token, or null.
  void forward(int64_t token, const T* value, const HeadOutput<T>& q, const HeadOutput<T>& k,
               const HeadOutput<T>& v) const {
    const int64_t groups = shape.kv_heads;
    const F factor = factor_of(token);
    const auto turned = [&](const HeadOutput<T>& to, int64_t at, const T* x, F gain) {
      const F scale = gain * rstd(shape.norm ? dot(x, x, size()) : F(0), factor);
      to.row(at, [&](T* y) { turn_head(x, turn(token), scale, size(), y); });
    };
    for (int64_t h = 0; h < shape.heads; ++h) {
      turned(q, token * shape.heads + h, head(token, h), gain[h]);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = token * groups + g;
      turned(k, at, head(token, shape.heads + g), F(1));
      const T* x = head(token, shape.heads + groups + g);
      v.row(at, [&](T* y) {
        weighted(factor, x, F(1), value ? value + g * size() : nullptr, y);
      });
    }
  }

  // to = a x + b y, of which either may be null: not there.
  void weighted(F a, const T* x, F b, const T* y, T* to) const {
    if (x == nullptr) {
      std::swap(a, b);
      std::swap(x, y);
    }
    if (x == nullptr) {
      std::fill(to, to + size(), T{});
    } else if (y == nullptr && a == F(1)) {
      std::copy(x, x + size(), to);
    } else {
      each_lanes<F>(size(), [&](int64_t i, auto lanes) {
        const Row<F> first = Row<F>::filled(a) * lanes.load(x + i);
        lanes.store(y ? first + Row<F>::filled(b) * lanes.load(y + i) : first, to + i);
      });
    }
  }

  // Of a head of q or k.
  const T* result(int64_t token, int64_t index) const {
    const bool is_query = index < shape.heads;
    const int64_t own = is_query ? token * shape.heads + index
                                 : token * shape.kv_heads + index - shape.heads;
    return (is_query ? q : k) + own * size();
  }

  // The gradient of head `index` of qkv; returns what it adds to d_gain.
  template <bool kOfResults>
  F backward_head(int64_t token, int64_t index, const T* dy, F gain,
                  const HeadOutput<T>& to) const {
    F sum = 0;
    to.row(token * heads() + index, [&](T* dx) {
      if (dy == nullptr) {
        std::fill(dx, dx + size(), T{});
        return;
      }
      Widened<F> in;
      RopeGradient<F> gradient;
      if constexpr (kOfResults) {
        const F rstd = rstds[token * (shape.heads + shape.kv_heads) + index];
        in.template load<true>(dy, result(token, index), turn(token), rope_gain(gain), size());
        gradient = rope_gradient_of_normed(in.along, rstd, gain, size());
      } else {
        const bool needs_x = shape.norm || index < shape.heads;
        const T* const x = needs_x ? head(token, index) : dy;  // (dy is at hand)
        in.template load<false>(dy, x, turn(token), gain, size());
        gradient = rope_gradient(in.along, rstd(in.squares, factor_of(token)), gain, size());
      }
      const Row<F> of_w = Row<F>::filled(gradient.of_w), of_x = Row<F>::filled(gradient.of_x);
      each_lanes<F>(size(), [&](int64_t i, auto lanes) {
        const Row<F> scaled = of_w * lanes.load(in.w + i);
        lanes.store(shape.norm ? scaled + of_x * lanes.load(in.x + i) : scaled, dx + i);
      });
      sum = gradient.gain;
    });
    return sum;
  }

  // gains: (H,) what the token adds to d_gain is added to it.
  template <bool kOfResults>
  void backward(int64_t token, Tokens<T> dq, Tokens<T> dk, Tokens<T> dv, Tokens<T> dv_again,
                const HeadOutput<T>& to, F* gains) const {
    const int64_t batch = token / shape.time, time = token % shape.time;
    const auto row = [&](const Tokens<T>& x, int64_t h) {
      return x.data ? x.row(batch, time, h) : nullptr;
    };
    for (int64_t h = 0; h < shape.heads; ++h) {
      gains[h] += backward_head<kOfResults>(token, h, row(dq, h), gain[h], to);
    }
    for (int64_t g = 0; g < shape.kv_heads; ++g) {
      backward_head<kOfResults>(token, shape.heads + g, row(dk, g), F(1), to);
    }
    const F factor = factor_of(token);
    for (int64_t g = 0; g < shape.kv_heads; ++g) {
      to.row(token * heads() + shape.heads + shape.kv_heads + g, [&](T* dx) {
        weighted(factor, row(dv, g), factor, row(dv_again, g), dx);
      });
    }
  }
};

// body(operator) for the type and the sizes.
template <typename Body>
void with_operator(const QkRopeShape& shape, const QkRopeInputs& in, const QkRopeResults& results,
                   const Body& body) {
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    if (shape.size == 64 && shape.half == 8) {
      return body(element, Operator<T, 64, 8>(shape, in, results));
    }
    return body(element, Operator<T, 0, 0>(shape, in, results));
  });
}

template <bool kOfResults>
void backward(const QkRopeShape& shape, const QkRopeInputs& in, const QkRopeResults& results,
              const QkRopeGradients& gradients, void* dqkv, void* partials, int threads) {
  with_operator(shape, in, results, [&](auto element, const auto& op) {
    using T = decltype(element);
    using F = compute_t<T>;
    const Tokens<T> dq(gradients.dq), dk(gradients.dk), dv(gradients.dv);
    const Tokens<T> dv_again(gradients.dv_again);
    const HeadOutput<T> to(dqkv, op.tokens() * op.heads(), shape.size);
    for_items_in_parts<F>(rope_parts(op.tokens()), op.tokens(), shape.heads, partials,
                          3 * op.token_bytes(), threads, [&](int64_t token, F* gains) {
                            op.template backward<kOfResults>(token, dq, dk, dv, dv_again, to, gains);
                          });
  });
}

}  // namespace

void qk_rope(const QkRopeShape& shape, const QkRopeInputs& in, const QkRopeValue& value,
             const QkRopeOutputs& out, int threads) {
  with_operator(shape, in, {}, [&](auto element, const auto& op) {
    using T = decltype(element);
    const HeadOutput<T> q(out.q, op.tokens() * shape.heads, shape.size);
    const HeadOutput<T> k(out.k, op.tokens() * shape.kv_heads, shape.size);
    const HeadOutput<T> v(out.v, op.tokens() * shape.kv_heads, shape.size);
    parallel_for(op.tokens(), 2 * op.token_bytes(), threads, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const T* const rows = static_cast<const T*>(value.rows);
        const int64_t width = shape.kv_heads * shape.size;
        op.forward(token, rows ? rows + value.row(token) * width : nullptr, q, k, v);
      }
      end_streaming();
    });
  });
}

void qk_rope_backward(const QkRopeShape& shape, const QkRopeInputs& in,
                      const QkRopeGradients& gradients, void* dqkv, void* partials, int threads) {
  backward<false>(shape, in, {}, gradients, dqkv, partials, threads);
}

void qk_rope_backward_of_results(const QkRopeShape& shape, const QkRopeInputs& in,
                                 const QkRopeResults& results, const QkRopeGradients& gradients,
                                 void* dqkv, void* partials, int threads) {
  backward<true>(shape, in, results, gradients, dqkv, partials, threads);
}

}  // namespace pgolf::cpu::PGOLF_ISA
