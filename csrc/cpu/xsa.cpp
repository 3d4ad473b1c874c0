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

template <typename F, typename T>
void store(Row<F> x, T* to, bool streamed) {
  constexpr int kLanes = 64 / sizeof(F);
  if (streamed) {
    T narrowed[kLanes];
    x.store(narrowed);
    stream<sizeof(narrowed)>(narrowed, to);
  } else {
    x.store(to);
  }
}

// to = x - factor v
template <typename T>
void subtract(const T* x, const T* v, compute_t<T> factor, T* to, int64_t size, bool streamed) {
  using F = compute_t<T>;
  constexpr int kLanes = 64 / sizeof(F);
  const Row<F> factors = Row<F>::filled(factor);
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    store<F>(Row<F>::load(x + i) - factors * Row<F>::load(v + i), to + i, streamed);
  }
  if (i < size) {
    const Row<F> end = load_end<F>(x + i, size - i) - factors * load_end<F>(v + i, size - i);
    store_end<F>(end, to + i, size - i);
  }
}

// What one query head adds to dv: -sa dz - sb y.
template <typename F>
struct HeadFactors {
  F sa, sb;
};

template <typename T, typename Load>
Row<compute_t<T>> dv_lanes(const T* dz, const T* y, const T* v, int64_t dz_stride, int64_t y_stride,
                           const HeadFactors<compute_t<T>>* heads, int64_t count,
                           compute_t<T> along_v, const Load& load) {
  using F = compute_t<T>;
  Row<F> sum = Row<F>::filled(along_v) * load(v);
  for (int64_t h = 0; h < count; ++h) {
    sum = sum - (Row<F>::filled(heads[h].sa) * load(dz + h * dz_stride) +
                 Row<F>::filled(heads[h].sb) * load(y + h * y_stride));
  }
  return sum;
}

template <typename T, int kSize>
void forward_tokens(const XsaShape& shape, Tokens<T> y, Tokens<T> v, T* z, int64_t begin,
                    int64_t end) {
  const int64_t size = row_size<kSize>(shape);
  const int64_t per_group = shape.heads / shape.groups;
  const bool streamed =
      worth_streaming(z, shape.batch * shape.time * shape.heads, size * int64_t{sizeof(T)});
  for (int64_t token = begin; token < end; ++token) {
    const T* y_row = y.row(token / shape.time, token % shape.time);
    const T* v_row = v.row(token / shape.time, token % shape.time);
    T* z_row = z + token * shape.heads * size;
    for (int64_t g = 0; g < shape.groups; ++g, v_row += v.head_stride) {
      const auto s = xsa_norm(dot(v_row, v_row, size)).inverse;
      for (int64_t h = 0; h < per_group; ++h, y_row += y.head_stride, z_row += size) {
        subtract(y_row, v_row, s * dot(y_row, v_row, size), z_row, size, streamed);
      }
    }
  }
  end_streaming();
}

template <typename T>
struct Gradients {
  T* dy;
  T* dv;
  bool dy_streamed, dv_streamed;
};

// One value head: dy of its query heads (contiguous), and dv.
template <typename T>
void backward_group(const T* dz, const T* y, const T* v, int64_t dz_stride, int64_t y_stride,
                    int64_t per_group, int64_t size, Gradients<T> to) {
  using F = compute_t<T>;
  constexpr int kLanes = 64 / sizeof(F);
  HeadFactors<F> heads[kMaxHeadsPerGroup];
  const XsaNorm<F> norm = xsa_norm(dot(v, v, size));
  F along_v = 0;
  for (int64_t h = 0; h < per_group; ++h) {
    const F sa = norm.inverse * dot(y + h * y_stride, v, size);
    const F sb = norm.inverse * dot(dz + h * dz_stride, v, size);
    heads[h] = {sa, sb};
    along_v += F(2) * sa * sb;
    subtract(dz + h * dz_stride, v, sb, to.dy + h * size, size, to.dy_streamed);
  }
  if (norm.moving == F(0)) along_v = 0;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const auto lanes =
        dv_lanes(dz + i, y + i, v + i, dz_stride, y_stride, heads, per_group, along_v,
                 [](const T* from) { return Row<F>::load(from); });
    store<F>(lanes, to.dv + i, to.dv_streamed);
  }
  if (i < size) {
    const int64_t left = size - i;
    const Row<F> end = dv_lanes(dz + i, y + i, v + i, dz_stride, y_stride, heads, per_group,
                                along_v, [=](const T* from) { return load_end<F>(from, left); });
    store_end<F>(end, to.dv + i, left);
  }
}

template <typename T, int kSize>
void backward_tokens(const XsaShape& shape, Tokens<T> dz, Tokens<T> y, Tokens<T> v, Gradients<T> to,
                     int64_t begin, int64_t end) {
  const int64_t size = row_size<kSize>(shape);
  const int64_t per_group = shape.heads / shape.groups;
  to.dy += begin * shape.heads * size;
  to.dv += begin * shape.groups * size;
  for (int64_t token = begin; token < end; ++token) {
    const T* dz_row = dz.row(token / shape.time, token % shape.time);
    const T* y_row = y.row(token / shape.time, token % shape.time);
    const T* v_row = v.row(token / shape.time, token % shape.time);
    for (int64_t g = 0; g < shape.groups; ++g) {
      backward_group(dz_row, y_row, v_row, dz.head_stride, y.head_stride, per_group, size, to);
      dz_row += per_group * dz.head_stride;
      y_row += per_group * y.head_stride;
      v_row += v.head_stride;
      to.dy += per_group * size;
      to.dv += size;
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
    with_size(shape.size, [&](auto size) {
      parallel_for(shape.batch * shape.time, bytes, threads, [&](int64_t begin, int64_t end) {
        forward_tokens<T, decltype(size)::value>(shape, Tokens<T>(y), Tokens<T>(v),
                                                 static_cast<T*>(z), begin, end);
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
    const int64_t row_bytes = shape.size * int64_t{sizeof(T)};
    const int64_t tokens = shape.batch * shape.time;
    const Gradients<T> to = {static_cast<T*>(dy), static_cast<T*>(dv),
                             worth_streaming(dy, tokens * shape.heads, row_bytes),
                             worth_streaming(dv, tokens * shape.groups, row_bytes)};
    with_size(shape.size, [&](auto size) {
      parallel_for(shape.batch * shape.time, bytes, threads, [&](int64_t begin, int64_t end) {
        backward_tokens<T, decltype(size)::value>(shape, Tokens<T>(dz), Tokens<T>(y), Tokens<T>(v),
                                                  to, begin, end);
      });
    });
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
