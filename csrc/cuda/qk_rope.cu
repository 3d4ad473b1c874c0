// qk_rope on a GPU: the formulas of qk_rope.h. A group of lanes takes one head of a token; what
// rotation pairs with a lane's elements it reads itself, which the cache has by then.
#include "qk_rope.h"

#include <cuda_runtime.h>

#include "cuda/device.cuh"
#include "cuda/head_lanes.h"
#include "cuda/launch.h"
#include "cuda/partials.cuh"
#include "heads.h"

namespace pgolf::cuda {
namespace {

static_assert(kMaxRopeSize == kMaxHeadSize);

template <typename T>
struct Inputs {
  QkRopeShape shape;
  const T* qkv;
  const float *cos, *sin, *gain;

  Inputs(const QkRopeShape& s, const QkRopeInputs& in)
      : shape(s),
        qkv(static_cast<const T*>(in.qkv)),
        cos(static_cast<const float*>(in.cos)),
        sin(static_cast<const float*>(in.sin)),
        gain(static_cast<const float*>(in.gain)) {}

  PGOLF_HOST_DEVICE int64_t heads() const { return shape.heads + 2 * shape.kv_heads; }
  PGOLF_HOST_DEVICE int64_t tokens() const { return shape.batch * shape.time; }
  PGOLF_HOST_DEVICE bool is_query(int64_t head) const { return head < shape.heads; }
  PGOLF_HOST_DEVICE bool is_value(int64_t head) const {
    return head >= shape.heads + shape.kv_heads;
  }
  // Whether 16 bytes at a time also meet what rotation pairs.
  bool aligned_heads() const {
    return aligned({qkv, cos, sin},
                   {shape.size * int64_t{sizeof(T)}, shape.half * int64_t{sizeof(T)}});
  }
};

// The rotation R of one token, for the elements of this lane: x cos + partner sin, where sin has
// its sign, and where nothing is rotated the partner is 0 and cos 1.
template <typename T, int kVector, int kLanes, int kChunks>
struct Turn {
  using Lanes = Row<T, kVector, kLanes, kChunks>;
  float cos[Lanes::kCount], sin[Lanes::kCount];
  int half;

  __device__ Turn(const Inputs<T>& in, int64_t time) : half(static_cast<int>(in.shape.half)) {
    constexpr int kAtOnce = kVector < 4 ? kVector : 4;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int place = Lanes::place(chunk);
#pragma unroll
      for (int i = 0; i < kVector; i += kAtOnce) {
        Vector<float, kAtOnce> c = {}, s = {};
        if (place < 2 * half) {
          const int64_t at = time * half + (place < half ? place : place - half) + i;
          c = *reinterpret_cast<const Vector<float, kAtOnce>*>(in.cos + at);
          s = *reinterpret_cast<const Vector<float, kAtOnce>*>(in.sin + at);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int to = chunk * kVector + i + j;
          cos[to] = place < 2 * half ? c.at[j] : 1.0f;
          sin[to] = place < half ? s.at[j] : -s.at[j];
        }
      }
    }
  }

  // R x for sign 1, R^T x for sign -1; x is also at `from`.
  __device__ Lanes of(const Lanes& x, const T* from, float sign) const {
    Lanes partner = Lanes::zero();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int place = Lanes::place(chunk);
      if (place < 2 * half) {
        partner.load_chunk(chunk, from + (place < half ? place + half : place - half));
      }
    }
    Lanes turned;
#pragma unroll
    for (int i = 0; i < Lanes::kCount; ++i) {
      turned.at[i] = x.at[i] * cos[i] + sign * partner.at[i] * sin[i];
    }
    return turned;
  }
};

template <typename T, typename Lanes>
__device__ float head_rstd(const Inputs<T>& in, const Lanes& x) {
  const float squares = in.shape.norm ? x.dot(x) : 0.0f;
  return rope_rstd(squares, in.shape.size, static_cast<float>(in.shape.eps), in.shape.norm);
}

template <typename T, int kVector, int kLanes, int kChunks>
__global__ void __launch_bounds__(kThreads)
    qk_rope_forward(Inputs<T> in, const T* value, T* q, T* k, T* v) {
  using Lanes = Row<T, kVector, kLanes, kChunks>;
  const int size = static_cast<int>(in.shape.size);
  const int64_t groups = in.shape.kv_heads, items = in.tokens() * in.heads();
  for (int64_t item = first_item<kLanes>(); item < items; item += item_step<kLanes>()) {
    const Divided place = divide(item, in.heads());
    const int64_t token = place.quotient, head = place.rest;
    const T* const from = in.qkv + item * size;
    Lanes x = Lanes::load(from, size);
    if (in.is_value(head)) {
      const int64_t at = (token * groups + head - in.shape.heads - groups) * size;
      if (value) x = x.plus(1, Lanes::load(value + at, size));
      x.store(v + at, size);
      continue;
    }
    const Turn<T, kVector, kLanes, kChunks> turn(in, divide(token, in.shape.time).rest);
    const float gain = in.is_query(head) ? in.gain[head] : 1.0f;
    T* const to = in.is_query(head) ? q + (token * in.shape.heads + head) * size
                                    : k + (token * groups + head - in.shape.heads) * size;
    Lanes::zero().plus(gain * head_rstd(in, x), turn.of(x, from, 1)).store(to, size);
  }
}

// Writes the gradient of one head of qkv; returns what it adds to d_gain. dy is null for none.
template <typename T, int kVector, int kLanes, int kChunks>
__device__ float head_gradient(const Inputs<T>& in, int64_t token, int64_t head, const T* dy,
                               T* dqkv) {
  using Lanes = Row<T, kVector, kLanes, kChunks>;
  const int size = static_cast<int>(in.shape.size);
  const int64_t at = (token * in.heads() + head) * size;
  const Lanes upstream = dy ? Lanes::load(dy, size) : Lanes::zero();
  if (!dy || in.is_value(head)) {
    upstream.store(dqkv + at, size);
    return 0;
  }
  const Turn<T, kVector, kLanes, kChunks> turn(in, divide(token, in.shape.time).rest);
  const Lanes w = turn.of(upstream, dy, -1);
  const float gain = in.is_query(head) ? in.gain[head] : 1.0f;
  const bool keeps_x = in.shape.norm || in.is_query(head);  // other heads have no use for x
  const Lanes x = keeps_x ? Lanes::load(in.qkv + at, size) : Lanes::zero();
  const auto factors = rope_gradient(w.dot(x), head_rstd(in, x), gain, in.shape.size);
  const Lanes scaled = Lanes::zero().plus(factors.of_w, w);
  (in.shape.norm ? scaled.plus(factors.of_x, x) : scaled).store(dqkv + at, size);
  return factors.gain;
}

// A block takes kRopeTokensPerBlock tokens, a group of lanes the same heads of all or of every n-th
// of them: what a head adds to d_gain stays in one register until the end.
// One block of registers is enough: with the compiler's own choice the longest heads spill.
template <typename T, int kVector, int kLanes, int kChunks>
__global__ void __launch_bounds__(kThreads, 1)
    qk_rope_backward_blocks(Inputs<T> in, Tokens<T> dq, Tokens<T> dk, Tokens<T> dv, T* dqkv,
                            float* partials) {
  constexpr int kGroups = kThreads / kLanes;
  __shared__ float sums[kGroups];
  const int group = static_cast<int>(threadIdx.x) / kLanes;
  const int64_t heads = in.heads(), queries = in.shape.heads, groups = in.shape.kv_heads;
  const int64_t together = heads < kGroups ? kGroups / heads : 1;  // tokens at once
  const int64_t head_of_group = group % heads, token_of_group = group / heads;
  const int64_t begin = blockIdx.x * kRopeTokensPerBlock;
  const int64_t left = in.tokens() - begin;
  const int64_t end = begin + (left < kRopeTokensPerBlock ? left : kRopeTokensPerBlock);
  for (int64_t first = 0; first < heads; first += kGroups) {
    const int64_t head = first + head_of_group;
    float sum = 0;
    if (head < heads && token_of_group < together) {
      for (int64_t token = begin + token_of_group; token < end; token += together) {
        const Divided place = divide(token, in.shape.time);
        const auto row = [&](const Tokens<T>& x, int64_t h) {
          return x.data ? x.row(place.quotient, place.rest, h) : nullptr;
        };
        const T* dy = in.is_query(head)   ? row(dq, head)
                      : in.is_value(head) ? row(dv, head - queries - groups)
                                          : row(dk, head - queries);
        sum += head_gradient<T, kVector, kLanes, kChunks>(in, token, head, dy, dqkv);
      }
    }
    if (group_lane<kLanes>() == 0) sums[group] = sum;
    __syncthreads();
    if (group_lane<kLanes>() == 0 && token_of_group == 0 && head < queries) {
      for (int64_t i = 1; i < together; ++i) sum += sums[group + i * heads];
      partials[blockIdx.x * queries + head] = sum;
    }
    __syncthreads();
  }
}

}  // namespace

const char* qk_rope(const QkRopeShape& shape, const QkRopeInputs& in, const void* value,
                    const QkRopeOutputs& out, void* stream) {
  return with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const Inputs<T> inputs(shape, in);
    const bool vectors = inputs.aligned_heads() && aligned({value, out.q, out.k, out.v}, {});
    return with_head_lanes<T>(shape.size, vectors, [&](auto vector, auto lanes, auto chunks) {
      constexpr int kLanes = decltype(lanes)::value;
      return launch(qk_rope_forward<T, decltype(vector)::value, kLanes, decltype(chunks)::value>,
                    stepping_blocks(inputs.tokens() * inputs.heads(), kThreads / kLanes), kThreads,
                    stream, inputs, static_cast<const T*>(value), static_cast<T*>(out.q),
                    static_cast<T*>(out.k), static_cast<T*>(out.v));
    });
  });
}

const char* qk_rope_backward(const QkRopeShape& shape, const QkRopeInputs& in,
                             const QkRopeGradients& gradients, void* dqkv, void* partials,
                             void* d_gain, void* stream) {
  const Heads dq = gradients.dq, dk = gradients.dk, dv = gradients.dv;
  const int64_t blocks = rope_blocks(shape.batch * shape.time);
  const char* error = with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const Inputs<T> inputs(shape, in);
    const bool vectors = inputs.aligned_heads() &&
                         aligned({dq.data, dk.data, dv.data, dqkv},
                                 {head_bytes<T>(dq), head_bytes<T>(dk), head_bytes<T>(dv)});
    return with_head_lanes<T>(shape.size, vectors, [&](auto vector, auto lanes, auto chunks) {
      return launch(qk_rope_backward_blocks<T, decltype(vector)::value, decltype(lanes)::value,
                                            decltype(chunks)::value>,
                    blocks, kThreads, stream, inputs, Tokens<T>(dq), Tokens<T>(dk), Tokens<T>(dv),
                    static_cast<T*>(dqkv), static_cast<float*>(partials));
    });
  });
  if (error) return error;
  return sum_rows(static_cast<const float*>(partials), blocks, shape.heads,
                  static_cast<float*>(d_gain), stream);
}

}  // namespace pgolf::cuda
