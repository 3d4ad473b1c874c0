// xsa on a GPU: the formula of xsa.h. A group of lanes takes one value head of a token and its query
// heads, one after the other: every row comes from memory once.
#include "xsa.h"

#include <cuda_runtime.h>

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace pgolf::cuda {
namespace {

// A tensor (N, T, heads, d) of known element type.
template <typename T>
struct Tokens {
  const T* data;
  int64_t batch_stride, time_stride, head_stride;

  explicit Tokens(Heads x)
      : data(static_cast<const T*>(x.data)),
        batch_stride(x.batch_stride),
        time_stride(x.time_stride),
        head_stride(x.head_stride) {}

  __device__ const T* row(Divided batch_and_time, int64_t head) const {
    return data + batch_and_time.quotient * batch_stride + batch_and_time.rest * time_stride +
           head * head_stride;
  }
};

template <typename T, int kVector, int kLanes, int kChunks>
__global__ void __launch_bounds__(kThreads)
    xsa_forward_rows(XsaShape shape, Tokens<T> y, Tokens<T> v, T* z) {
  using Lanes = Row<T, kVector, kLanes, kChunks>;
  const int size = static_cast<int>(shape.size);
  const int64_t per_group = shape.heads / shape.groups;
  const int64_t items = shape.batch * shape.time * shape.groups;
  for (int64_t item = first_item<kLanes>(); item < items; item += item_step<kLanes>()) {
    const Divided token_group = divide(item, shape.groups);
    const Divided place = divide(token_group.quotient, shape.time);
    const Lanes value = Lanes::load(v.row(place, token_group.rest), size);
    const auto inverse = xsa_norm(value.dot(value)).inverse;
    for (int64_t h = 0; h < per_group; ++h) {
      const Lanes head = Lanes::load(y.row(place, token_group.rest * per_group + h), size);
      const auto along = inverse * head.dot(value);
      head.plus(-along, value).store(z + (item * per_group + h) * size, size);
    }
  }
}

template <typename T, int kVector, int kLanes, int kChunks>
__global__ void __launch_bounds__(kThreads)
    xsa_backward_rows(XsaShape shape, Tokens<T> dz, Tokens<T> y, Tokens<T> v, T* dy, T* dv) {
  using Lanes = Row<T, kVector, kLanes, kChunks>;
  using F = compute_t<T>;
  const int size = static_cast<int>(shape.size);
  const int64_t per_group = shape.heads / shape.groups;
  const int64_t items = shape.batch * shape.time * shape.groups;
  for (int64_t item = first_item<kLanes>(); item < items; item += item_step<kLanes>()) {
    const Divided token_group = divide(item, shape.groups);
    const Divided place = divide(token_group.quotient, shape.time);
    const Lanes value = Lanes::load(v.row(place, token_group.rest), size);
    const XsaNorm<F> norm = xsa_norm(value.dot(value));
    Lanes sum = Lanes::zero();
    F along_v = 0;
    for (int64_t h = 0; h < per_group; ++h) {
      const int64_t head = token_group.rest * per_group + h;
      const Lanes upstream = Lanes::load(dz.row(place, head), size);
      const Lanes output = Lanes::load(y.row(place, head), size);
      const F sa = norm.inverse * output.dot(value);
      const F sb = norm.inverse * upstream.dot(value);
      along_v += F(2) * sa * sb;
      sum = sum.plus(-sa, upstream).plus(-sb, output);
      upstream.plus(-sb, value).store(dy + (item * per_group + h) * size, size);
    }
    if (norm.moving == F(0)) along_v = 0;
    sum.plus(along_v, value).store(dv + item * size, size);
  }
}

// body(vector, lanes, chunks) with the constants that fit heads of `size` elements.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <typename T, typename Body>
const char* with_lanes(int64_t size, bool vectors, const Body& body) {
  constexpr int kVector = kAccessBytes / sizeof(T);
  static_assert(kMaxXsaSize == 8 * kWarp);
  if (!vectors) return body(Constant<1>{}, Constant<kWarp>{}, Constant<8>{});
  if (size <= 8 * kVector) return body(Constant<kVector>{}, Constant<8>{}, Constant<1>{});
  if (size <= 16 * kVector) return body(Constant<kVector>{}, Constant<16>{}, Constant<1>{});
  constexpr int kChunks = kMaxXsaSize / (kVector * kWarp);
  return body(Constant<kVector>{}, Constant<kWarp>{}, Constant<kChunks>{});
}

// Distances between rows in bytes.
template <typename T>
int64_t row_bytes(Heads x) {
  return (x.batch_stride | x.time_stride | x.head_stride) * int64_t{sizeof(T)};
}

}  // namespace

const char* xsa(const XsaShape& shape, Heads y, Heads v, void* z, void* stream) {
  if (shape.heads == 0 || shape.size == 0) return nullptr;
  return with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const bool vectors = aligned({y.data, v.data, z}, {row_bytes<T>(y), row_bytes<T>(v),
                                                       shape.size * int64_t{sizeof(T)}});
    return with_lanes<T>(shape.size, vectors, [&](auto vector, auto lanes, auto chunks) {
      constexpr int kLanes = decltype(lanes)::value;
      const int64_t items = shape.batch * shape.time * shape.groups;
      return launch(xsa_forward_rows<T, decltype(vector)::value, kLanes, decltype(chunks)::value>,
                    blocks_for(items, kThreads / kLanes), kThreads, stream, shape, Tokens<T>(y),
                    Tokens<T>(v), static_cast<T*>(z));
    });
  });
}

const char* xsa_backward(const XsaShape& shape, Heads dz, Heads y, Heads v, void* dy, void* dv,
                         void* stream) {
  if (shape.groups == 0 || shape.size == 0) return nullptr;
  return with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const bool vectors = aligned({dz.data, y.data, v.data, dy, dv},
                                 {row_bytes<T>(dz), row_bytes<T>(y), row_bytes<T>(v),
                                  shape.size * int64_t{sizeof(T)}});
    return with_lanes<T>(shape.size, vectors, [&](auto vector, auto lanes, auto chunks) {
      constexpr int kLanes = decltype(lanes)::value;
      const int64_t items = shape.batch * shape.time * shape.groups;
      return launch(xsa_backward_rows<T, decltype(vector)::value, kLanes, decltype(chunks)::value>,
                    blocks_for(items, kThreads / kLanes), kThreads, stream, shape, Tokens<T>(dz),
                    Tokens<T>(y), Tokens<T>(v), static_cast<T*>(dy), static_cast<T*>(dv));
    });
  });
}

}  // namespace pgolf::cuda
