// xsa on the CPU: the formula of xsa.h, a token's value head with its query heads at a time, so that
// each row comes from memory once. Sums are in float for float and bf16, in double for double.
#include "xsa.h"

#include "cpu/dispatch.h"
#include "cpu/lanes.h"
#include "cpu/stream.h"
#include "heads.h"
#include "host/parallel.h"
#include "kernels.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

// kSize is d where it is known when this is compiled, so that loops over it unroll; otherwise 0.
template <int kSize>
int64_t row_size(const XsaShape& shape) {
  return kSize ? kSize : shape.size;
}

// to = x - factor v, from element `at` of `to` on
template <typename T>
void subtract(const T* x, const T* v, compute_t<T> factor, Output<T> to, int64_t at,
              int64_t size) {
  using F = compute_t<T>;
  const Row<F> factors = Row<F>::filled(factor);
  each_lanes<F>(size, [&](int64_t i, auto lanes) {
    to.store(lanes, lanes.load(x + i) - factors * lanes.load(v + i), at + i);
  });
}

// What one query head adds to dv: -sa dz - sb y.
template <typename F>
struct HeadFactors {
  F sa, sb;
};

template <typename T, int kSize>
void forward_tokens(const XsaShape& shape, Tokens<T> y, Tokens<T> v, Output<T> z, int64_t begin,
                    int64_t end) {
  const int64_t size = row_size<kSize>(shape);
  const int64_t per_group = shape.heads / shape.groups;
  for (int64_t token = begin; token < end; ++token) {
    const T* y_row = y.row(token / shape.time, token % shape.time);
    const T* v_row = v.row(token / shape.time, token % shape.time);
    int64_t at = token * shape.heads * size;
    for (int64_t g = 0; g < shape.groups; ++g, v_row += v.head_stride) {
      const auto s = xsa_norm(dot(v_row, v_row, size)).inverse;
      for (int64_t h = 0; h < per_group; ++h, y_row += y.head_stride, at += size) {
        subtract(y_row, v_row, s * dot(y_row, v_row, size), z, at, size);
      }
    }
  }
  end_streaming();
}

template <typename T>
struct Gradients {
  Output<T> dy, dv;
};

// One value head: dy of its query heads (contiguous, from element dy_at on), and dv.
template <typename T>
void backward_group(const T* dz, const T* y, const T* v, int64_t dz_stride, int64_t y_stride,
                    int64_t per_group, int64_t size, const Gradients<T>& to, int64_t dy_at,
                    int64_t dv_at) {
  using F = compute_t<T>;
  HeadFactors<F> heads[kMaxHeadsPerGroup];
  const XsaNorm<F> norm = xsa_norm(dot(v, v, size));
  F along_v = 0;
  for (int64_t h = 0; h < per_group; ++h) {
    const F sa = norm.inverse * dot(y + h * y_stride, v, size);
    const F sb = norm.inverse * dot(dz + h * dz_stride, v, size);
    heads[h] = {sa, sb};
    along_v += F(2) * sa * sb;
    subtract(dz + h * dz_stride, v, sb, to.dy, dy_at + h * size, size);
  }
  if (norm.moving == F(0)) along_v = 0;
  each_lanes<F>(size, [&](int64_t i, auto lanes) {
    Row<F> sum = Row<F>::filled(along_v) * lanes.load(v + i);
    for (int64_t h = 0; h < per_group; ++h) {
      sum = sum - (Row<F>::filled(heads[h].sa) * lanes.load(dz + h * dz_stride + i) +
                   Row<F>::filled(heads[h].sb) * lanes.load(y + h * y_stride + i));
    }
    to.dv.store(lanes, sum, dv_at + i);
  });
}

template <typename T, int kSize>
void backward_tokens(const XsaShape& shape, Tokens<T> dz, Tokens<T> y, Tokens<T> v,
                     const Gradients<T>& to, int64_t begin, int64_t end) {
  const int64_t size = row_size<kSize>(shape);
  const int64_t per_group = shape.heads / shape.groups;
  int64_t dy_at = begin * shape.heads * size, dv_at = begin * shape.groups * size;
  for (int64_t token = begin; token < end; ++token) {
    const T* dz_row = dz.row(token / shape.time, token % shape.time);
    const T* y_row = y.row(token / shape.time, token % shape.time);
    const T* v_row = v.row(token / shape.time, token % shape.time);
    for (int64_t g = 0; g < shape.groups; ++g) {
      backward_group(dz_row, y_row, v_row, dz.head_stride, y.head_stride, per_group, size, to,
                     dy_at, dv_at);
      dz_row += per_group * dz.head_stride;
      y_row += per_group * y.head_stride;
      v_row += v.head_stride;
      dy_at += per_group * size;
      dv_at += size;
    }
  }
  end_streaming();
}

// body(constant) with d as std::integral_constant would hold it, for the head sizes of the recipes.
template <int kSize>
struct Constant {
  static constexpr int value = kSize;
};

template <typename Body>
void with_size(int64_t size, const Body& body) {
  if (size == 64) return body(Constant<64>{});
  return body(Constant<0>{});
}

}  // namespace

void xsa(const XsaShape& shape, Heads y, Heads v, void* z, int threads) {
  if (shape.heads == 0 || shape.size == 0) return;
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t bytes = (2 * shape.heads + shape.groups) * shape.size * int64_t{sizeof(T)};
    const Output<T> out(z, shape.batch * shape.time * shape.heads, shape.size);
    with_size(shape.size, [&](auto size) {
      parallel_for(shape.batch * shape.time, bytes, threads, [&](int64_t begin, int64_t end) {
        forward_tokens<T, decltype(size)::value>(shape, Tokens<T>(y), Tokens<T>(v), out, begin,
                                                 end);
      });
    });
  });
}

void xsa_backward(const XsaShape& shape, Heads dz, Heads y, Heads v, void* dy, void* dv,
                  int threads) {
  if (shape.groups == 0 || shape.size == 0) return;  // without query heads dv is zero
  with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const int64_t bytes = (3 * shape.heads + 2 * shape.groups) * shape.size * int64_t{sizeof(T)};
    const int64_t tokens = shape.batch * shape.time;
    const Gradients<T> to = {{dy, tokens * shape.heads, shape.size},
                             {dv, tokens * shape.groups, shape.size}};
    with_size(shape.size, [&](auto size) {
      parallel_for(shape.batch * shape.time, bytes, threads, [&](int64_t begin, int64_t end) {
        backward_tokens<T, decltype(size)::value>(shape, Tokens<T>(dz), Tokens<T>(y), Tokens<T>(v),
                                                  to, begin, end);
      });
    });
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
