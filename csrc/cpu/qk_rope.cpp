// qk_rope on the CPU: the formulas of qk_rope.h, head by head, so that each comes from memory once.
// Sums over a head are in float for float and bf16, in double for double.
#include "qk_rope.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/lanes.h"
#include "cpu/launchers.h"
#include "cpu/stream.h"
#include "heads.h"
#include "host/parallel.h"

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

// w . x with w = R^T dy
template <typename T>
compute_t<T> turned_dot(const T* dy, const T* x, Turn<compute_t<T>> turn, int64_t size) {
  using F = compute_t<T>;
  Pairs<F> sums = Pairs<F>::filled(0);
  turn.each([&](int64_t j, int64_t count) {
    const Halves<F> w = turn.back(dy, j, count), pair = turn.load(x, j, count);
    sums = sums + (w.first * pair.first + w.second * pair.second);
  });
  const int64_t r = 2 * turn.half;
  return sums.sum() + dot(dy + r, x + r, size - r);
}

// to = of_w w + of_x x with w = R^T dy; without kWithX the last term is left out.
template <bool kWithX, typename T>
void turn_back(const T* dy, const T* x, Turn<compute_t<T>> turn, RopeGradient<compute_t<T>> factors,
               int64_t size, T* to) {
  using F = compute_t<T>;
  const auto combine = [&](auto w, auto x_lanes) {
    using L = decltype(w);
    if constexpr (!kWithX) return w * L::filled(factors.of_w);
    return w * L::filled(factors.of_w) + x_lanes * L::filled(factors.of_x);
  };
  turn.each([&](int64_t j, int64_t count) {
    const Halves<F> w = turn.back(dy, j, count), pair = turn.load(x, j, count);
    store_pairs<F>(combine(w.first, pair.first), to + j, count);
    store_pairs<F>(combine(w.second, pair.second), to + turn.half + j, count);
  });
  const int64_t r = 2 * turn.half;
  each_lanes<F>(size - r, [&](int64_t i, auto lanes) {
    lanes.store(combine(lanes.load(dy + r + i), lanes.load(x + r + i)), to + r + i);
  });
}

template <typename T>
using HeadWriter = RowWriter<T, kMaxRopeSize>;

template <typename T>
struct Operator {
  using F = compute_t<T>;
  QkRopeShape shape;
  const T* qkv;
  const F* cos;
  const F* sin;
  const F* gain;

  Operator(const QkRopeShape& s, const QkRopeInputs& in)
      : shape(s),
        qkv(static_cast<const T*>(in.qkv)),
        cos(static_cast<const F*>(in.cos)),
        sin(static_cast<const F*>(in.sin)),
        gain(static_cast<const F*>(in.gain)) {}

  int64_t tokens() const { return shape.batch * shape.time; }
  int64_t heads() const { return shape.heads + 2 * shape.kv_heads; }  // of a token's qkv
  int64_t token_bytes() const { return heads() * shape.size * int64_t{sizeof(T)}; }

  const T* head(int64_t token, int64_t index) const {
    return qkv + (token * heads() + index) * shape.size;
  }
  Turn<F> turn(int64_t token) const {
    const int64_t first = token % shape.time * shape.half;
    return {cos + first, sin + first, shape.half};
  }
  F rstd(const T* x) const {
    const F squares = shape.norm ? dot(x, x, shape.size) : F(0);
    return rope_rstd(squares, shape.size, static_cast<F>(shape.eps), shape.norm);
  }

  void forward(int64_t token, const T* value, const HeadWriter<T>& q, const HeadWriter<T>& k,
               const HeadWriter<T>& v) const {
    const int64_t size = shape.size, groups = shape.kv_heads;
    const auto turned = [&](const HeadWriter<T>& to, int64_t at, const T* x, F factor) {
      to.row(at, [&](T* y) { turn_head(x, turn(token), rstd(x) * factor, size, y); });
    };
    for (int64_t h = 0; h < shape.heads; ++h) {
      turned(q, token * shape.heads + h, head(token, h), gain[h]);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = token * groups + g;
      turned(k, at, head(token, shape.heads + g), F(1));
      const T* x = head(token, shape.heads + groups + g);
      v.row(at, [&](T* y) {
        if (value == nullptr) {
          std::copy(x, x + size, y);
        } else {
          each_lanes<F>(size, [&](int64_t i, auto lanes) {
            lanes.store(lanes.load(x + i) + lanes.load(value + at * size + i), y + i);
          });
        }
      });
    }
  }

  // The gradient of head `index` of qkv; returns what it adds to d_gain.
  F backward_head(int64_t token, int64_t index, const T* dy, F factor, const HeadWriter<T>& to) const {
    F sum = 0;
    to.row(token * heads() + index, [&](T* dx) {
      if (dy == nullptr) {
        std::fill(dx, dx + shape.size, T{});
        return;
      }
      const T* x = head(token, index);
      const Turn<F> here = turn(token);
      const bool keeps_x = shape.norm || index < shape.heads;  // others have no use for x
      const F along = keeps_x ? turned_dot(dy, x, here, shape.size) : F(0);
      const auto factors = rope_gradient(along, rstd(x), factor, shape.size);
      sum = factors.gain;
      if (shape.norm) {
        turn_back<true>(dy, x, here, factors, shape.size, dx);
      } else {
        turn_back<false>(dy, x, here, factors, shape.size, dx);
      }
    });
    return sum;
  }

  // gains: (H,) what the token adds to d_gain is added to it.
  void backward(int64_t token, Tokens<T> dq, Tokens<T> dk, Tokens<T> dv, const HeadWriter<T>& to,
                F* gains) const {
    const int64_t batch = token / shape.time, time = token % shape.time;
    const auto row = [&](const Tokens<T>& x, int64_t h) {
      return x.data ? x.row(batch, time, h) : nullptr;
    };
    for (int64_t h = 0; h < shape.heads; ++h) {
      gains[h] += backward_head(token, h, row(dq, h), gain[h], to);
    }
    for (int64_t g = 0; g < shape.kv_heads; ++g) {
      backward_head(token, shape.heads + g, row(dk, g), F(1), to);
    }
    for (int64_t g = 0; g < shape.kv_heads; ++g) {
      const T* dy = row(dv, g);
      to.row(token * heads() + shape.heads + shape.kv_heads + g, [&](T* dx) {
        if (dy) {
          std::copy(dy, dy + shape.size, dx);
        } else {
          std::fill(dx, dx + shape.size, T{});
        }
      });
    }
  }
};

}  // namespace

void qk_rope(const QkRopeShape& shape, const QkRopeInputs& in, const void* value,
             const QkRopeOutputs& out, int threads) {
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const Operator<T> op(shape, in);
    const HeadWriter<T> q(out.q, op.tokens() * shape.heads, shape.size);
    const HeadWriter<T> k(out.k, op.tokens() * shape.kv_heads, shape.size);
    const HeadWriter<T> v(out.v, op.tokens() * shape.kv_heads, shape.size);
    parallel_for(op.tokens(), 2 * op.token_bytes(), threads, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        op.forward(token, static_cast<const T*>(value), q, k, v);
      }
      end_streaming();
    });
  });
}

void qk_rope_backward(const QkRopeShape& shape, const QkRopeInputs& in,
                      const QkRopeGradients& gradients, void* dqkv, void* partials, void* d_gain,
                      int threads) {
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    using F = compute_t<T>;
    const Operator<T> op(shape, in);
    const Tokens<T> dq(gradients.dq), dk(gradients.dk), dv(gradients.dv);
    const HeadWriter<T> to(dqkv, op.tokens() * op.heads(), shape.size);
    const int64_t blocks = rope_blocks(op.tokens());
    F* const sums = static_cast<F*>(partials);
    const int64_t bytes = 3 * op.token_bytes() * kRopeTokensPerBlock;
    parallel_for(blocks, bytes, threads, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        F* const gains = sums + block * shape.heads;
        std::fill(gains, gains + shape.heads, F(0));
        const int64_t first = block * kRopeTokensPerBlock;
        const int64_t last = std::min(first + kRopeTokensPerBlock, op.tokens());
        for (int64_t token = first; token < last; ++token) {
          op.backward(token, dq, dk, dv, to, gains);
        }
      }
      end_streaming();
    });
    for (int64_t h = 0; h < shape.heads; ++h) {
      double sum = 0;
      for (int64_t block = 0; block < blocks; ++block) sum += sums[block * shape.heads + h];
      static_cast<F*>(d_gain)[h] = static_cast<F>(sum);
    }
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
