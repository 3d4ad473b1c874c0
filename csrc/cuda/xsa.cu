// xsa on a GPU: the formula of xsa.h. A group of lanes takes one value head of a token and its query
// heads, one after the other: every row comes from memory once.
#include "xsa.h"

#include <cuda_runtime.h>

#include "cuda/device.cuh"
#include "cuda/head_lanes.h"
#include "cuda/launch.h"
#include "heads.h"

namespace pgolf::cuda {
namespace {

static_assert(kMaxXsaSize == kMaxHeadSize);

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
    const Lanes value = Lanes::load(v.row(place.quotient, place.rest, token_group.rest), size);
    const auto inverse = xsa_norm(value.dot(value)).inverse;
    for (int64_t h = 0; h < per_group; ++h) {
      const int64_t at = token_group.rest * per_group + h;
      const Lanes head = Lanes::load(y.row(place.quotient, place.rest, at), size);
      const auto along = inverse * head.dot(value);
      head.plus(-along, value).store(z + (item * per_group + h) * size, size);
    }
  }
}

// One block of registers is enough: with the compiler's own choice the longest heads spill.
template <typename T, int kVector, int kLanes, int kChunks>
__global__ void __launch_bounds__(kThreads, 1)
    xsa_backward_rows(XsaShape shape, Tokens<T> dz, Tokens<T> y, Tokens<T> v, T* dy, T* dv) {
  using Lanes = Row<T, kVector, kLanes, kChunks>;
  using F = compute_t<T>;
  const int size = static_cast<int>(shape.size);
  const int64_t per_group = shape.heads / shape.groups;
  const int64_t items = shape.batch * shape.time * shape.groups;
  for (int64_t item = first_item<kLanes>(); item < items; item += item_step<kLanes>()) {
    const Divided token_group = divide(item, shape.groups);
    const Divided place = divide(token_group.quotient, shape.time);
    const Lanes value = Lanes::load(v.row(place.quotient, place.rest, token_group.rest), size);
    const XsaNorm<F> norm = xsa_norm(value.dot(value));
    Lanes sum = Lanes::zero();
    F along_v = 0;
    for (int64_t h = 0; h < per_group; ++h) {
      const int64_t head = token_group.rest * per_group + h;
      const Lanes upstream = Lanes::load(dz.row(place.quotient, place.rest, head), size);
      const Lanes output = Lanes::load(y.row(place.quotient, place.rest, head), size);
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

}  // namespace

const char* xsa(const XsaShape& shape, Heads y, Heads v, void* z, void* stream) {
  if (shape.heads == 0 || shape.size == 0) return nullptr;
  return with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const bool vectors = aligned({y.data, v.data, z}, {head_bytes<T>(y), head_bytes<T>(v),
                                                       shape.size * int64_t{sizeof(T)}});
    return with_head_lanes<T>(shape.size, vectors, [&](auto vector, auto lanes, auto chunks) {
      constexpr int kLanes = decltype(lanes)::value;
      const int64_t items = shape.batch * shape.time * shape.groups;
      return launch(xsa_forward_rows<T, decltype(vector)::value, kLanes, decltype(chunks)::value>,
                    stepping_blocks(items, kThreads / kLanes), kThreads, stream, shape,
                    Tokens<T>(y), Tokens<T>(v), static_cast<T*>(z));
    });
  });
}

const char* xsa_backward(const XsaShape& shape, Heads dz, Heads y, Heads v, void* dy, void* dv,
                         void* stream) {
  if (shape.groups == 0 || shape.size == 0) return nullptr;
  return with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const bool vectors = aligned({dz.data, y.data, v.data, dy, dv},
                                 {head_bytes<T>(dz), head_bytes<T>(y), head_bytes<T>(v),
                                  shape.size * int64_t{sizeof(T)}});
    return with_head_lanes<T>(shape.size, vectors, [&](auto vector, auto lanes, auto chunks) {
      constexpr int kLanes = decltype(lanes)::value;
      const int64_t items = shape.batch * shape.time * shape.groups;
      return launch(xsa_backward_rows<T, decltype(vector)::value, kLanes, decltype(chunks)::value>,
                    stepping_blocks(items, kThreads / kLanes), kThreads, stream, shape,
                    Tokens<T>(dz), Tokens<T>(y), Tokens<T>(v), static_cast<T*>(dy),
                    static_cast<T*>(dv));
    });
  });
}

}  // namespace pgolf::cuda
