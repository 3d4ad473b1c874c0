// How qk_rope lies on a GPU: the sizes that its kernels are compiled for, the tokens of a warp, the
// heads of its groups of lanes, and the rotation of a token.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "cuda/packed.cuh"
#include "heads.h"
#include "qk_rope.h"

namespace pgolf::cuda {
namespace {

constexpr int kWarps = kThreads / kWarp;

// Sizes that recipes have, so that the compiler knows them: loops over heads unroll, addresses are
// constants apart, and a pass knows whether its heads are queries, keys or values.
template <int kHeads, int kKvHeads, int kSize, int kHalf>
struct FixedShape {
  static constexpr int kPasses = 4;           // whose numbers are requested at once
  static constexpr bool kAllGradients = true;  // those of q, k and v are there
  // Of a multiprocessor, which bounds registers; by the compiler's own choice some are spilled.
  static constexpr int kForwardBlocks = 3, kBackwardBlocks = 2;
  static constexpr int64_t heads = kHeads, kv_heads = kKvHeads, total = kHeads + 2 * kKvHeads;
  static constexpr int size = kSize, half = kHalf;
  static constexpr bool norm = true;
  float eps;

  explicit FixedShape(const QkRopeShape& s) : eps(static_cast<float>(s.eps)) {}
  static bool fits(const QkRopeShape& s) {
    return s.heads == heads && s.kv_heads == kv_heads && s.size == size && s.half == half && s.norm;
  }
  // Whether all heads of any pass of `groups` heads are of one kind.
  PGOLF_HOST_DEVICE static constexpr bool alike(int groups) {
    return heads % groups == 0 && kv_heads % groups == 0;
  }
};

// Of the recipes with 16 and with 64 rotated elements a head.
struct Rotated16 : FixedShape<8, 4, 64, 8> {
  using FixedShape::FixedShape;
};
struct Rotated64 : FixedShape<8, 4, 64, 32> {
  using FixedShape::FixedShape;
};

// Any others.
struct AnyShape {
  static constexpr int kPasses = 1, kForwardBlocks = 2, kBackwardBlocks = 1;
  static constexpr bool kAllGradients = false;
  int64_t heads, kv_heads, total;
  int size, half;
  bool norm;
  float eps;

  explicit AnyShape(const QkRopeShape& s)
      : heads(s.heads),
        kv_heads(s.kv_heads),
        total(s.heads + 2 * s.kv_heads),
        size(static_cast<int>(s.size)),
        half(static_cast<int>(s.half)),
        norm(s.norm),
        eps(static_cast<float>(s.eps)) {}
  PGOLF_HOST_DEVICE static constexpr bool alike(int) { return false; }
};

// Of each of the passes whose numbers are requested at once.
template <typename Shape, typename U>
using EachPass = U[Shape::kPasses];

// The head that this group of lanes takes of a pass, whose first head is `first`.
template <typename Shape, int kLanes>
struct Head {
  static constexpr int kGroups = kWarp / kLanes;
  int64_t index, heads;  // of those in qkv; of those of its kind
  int64_t own;           // its number among them
  bool exists, is_query, is_value;
  bool turns;  // whether any head of the pass is a query or key: the same in all lanes
  int size;

  __device__ Head(const Shape& shape, int64_t first)
      : index(first + this_lane() / kLanes), size(shape.size) {
    const int64_t keys_end = shape.heads + shape.kv_heads;
    const int64_t like = Shape::alike(kGroups) ? first : index;
    exists = like < shape.total;
    is_query = like < shape.heads;
    is_value = like >= keys_end;
    turns = first < keys_end;
    heads = is_query ? shape.heads : shape.kv_heads;
    own = index - (is_query ? 0 : is_value ? keys_end : shape.heads);
  }
  // Where it lies in q, k or v, whichever it is of.
  __device__ int64_t place(int64_t token) const { return (token * heads + own) * size; }
};

// The tokens of a launch; a warp of a block takes every kWarps-th of `per_block`.
struct Span {
  int64_t tokens, time, per_block;
  int64_t step_rows, step_time;  // kWarps tokens as rows of `time` and what is left

  Span(const QkRopeShape& s, int64_t each)
      : tokens(s.batch * s.time),
        time(s.time > 0 ? s.time : 1),
        per_block(each),
        step_rows(kWarps / time),
        step_time(kWarps % time) {}
};

// A token of this warp. Only where the first one stands takes a division.
struct Place {
  int64_t token, end, time;
  int64_t batch;  // of the first token

  __device__ explicit Place(const Span& span) {
    const int64_t begin = blockIdx.x * span.per_block, left = span.tokens - begin;
    token = begin + threadIdx.x / kWarp;
    end = begin + (left < span.per_block ? left : span.per_block);
    const Divided first = divide(token, span.time);
    batch = first.quotient;
    time = first.rest;
  }
  __device__ bool in_block() const { return token < end; }
  // To the next one; whether that is one row further than Span::step_rows says.
  __device__ bool advance(const Span& span) {
    token += kWarps;
    time += span.step_time;
    const bool over = time >= span.time;
    if (over) time -= span.time;
    return over;
  }
};

// Gradients of q, k or v, which may have any strides or not be there, and how far it is from one
// token of a warp to its next one, in the same row of tokens or in a later one.
template <typename T>
struct Upstream {
  Tokens<T> tokens;
  int64_t step, step_over;

  Upstream(Heads x, const Span& span)
      : tokens(x),
        step(span.step_rows * x.batch_stride + span.step_time * x.time_stride),
        step_over(step + x.batch_stride - span.time * x.time_stride) {}
};

// The gradient of a head at the tokens of a warp, one after the other.
template <typename T>
struct Walk {
  bool given;
  const T* head;
  int64_t step, step_over;

  __device__ static Walk along(const Upstream<T>& x, const Place& at, int64_t head, bool given) {
    return {given, given ? x.tokens.row(at.batch, at.time, head) : nullptr, x.step, x.step_over};
  }
  __device__ void advance(bool over) {
    if (given) head += over ? step_over : step;
  }
};

// The rotation R of one token, or with sign -1 its inverse, for the numbers of this lane:
// x cos + partner sin, where sin has its sign; where nothing turns the partner is 0 and cos 1.
template <typename T, int kVector, int kLanes, int kChunks, typename Shape>
struct Turn {
  using Own = Packed<T, kVector, kLanes, kChunks>;
  using Lanes = typename Own::Lanes;
  // Whether what is paired stands in two lanes at the same places: `half` is whole vectors then.
  static constexpr bool kShuffles = kChunks == 1 && sizeof(typename Own::Chunk) == kAccessBytes;
  float cos[Lanes::kCount], sin[Lanes::kCount];
  int half;

  __device__ Turn(const Shape& shape, const float* cosines, const float* sines, int64_t time,
                  float sign)
      : half(shape.half) {
    constexpr int kAtOnce = kVector < 4 ? kVector : 4;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int place = Lanes::place(chunk);
#pragma unroll
      for (int i = 0; i < kVector; i += kAtOnce) {
        Vector<float, kAtOnce> c, s = {};
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) c.at[j] = 1.0f;
        if (place < 2 * half) {
          const int64_t at = time * half + (place < half ? place : place - half) + i;
          c = *reinterpret_cast<const Vector<float, kAtOnce>*>(cosines + at);
          s = *reinterpret_cast<const Vector<float, kAtOnce>*>(sines + at);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int to = chunk * kVector + i + j;
          cos[to] = c.at[j];
          sin[to] = (place < half ? sign : -sign) * s.at[j];
        }
      }
    }
  }

  // For all lanes of the warp. x is also in memory at `head`, if it is wanted.
  __device__ Lanes of(const Own& x, const T* head, bool wanted) const {
    const Lanes own = x.unpacked(), partner = partners(x, head, wanted).unpacked();
    Lanes turned;
#pragma unroll
    for (int i = 0; i < Lanes::kCount; ++i) {
      turned.at[i] = own.at[i] * cos[i] + partner.at[i] * sin[i];
    }
    return turned;
  }

 private:
  __device__ Own partners(const Own& x, const T* head, bool wanted) const {
    Own partner = {};
    if constexpr (kShuffles) {
      const int lane = group_lane<kLanes>(), apart = half / kVector;
      const int from = lane < apart ? lane + apart : lane - apart;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = __shfl_sync(~0u, x.chunks[0].at[i], from, kLanes);
        partner.chunks[0].at[i] = lane < 2 * apart ? word : 0;
      }
    } else {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const int place = Lanes::place(chunk);
        if (wanted && place < 2 * half) {
          const T* const from = head + (place < half ? place + half : place - half);
          partner.chunks[chunk] = *reinterpret_cast<const typename Own::Chunk*>(from);
        }
      }
    }
    return partner;
  }
};

}  // namespace
}  // namespace pgolf::cuda
