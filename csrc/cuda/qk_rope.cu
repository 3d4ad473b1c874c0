// qk_rope on a GPU: the formulas of qk_rope.h. A warp takes a token: its place, its angles and the
// gains are looked up once for all heads. Each group of lanes takes one head of a pass and the next
// ones of the passes after it; what all of them need is requested before any of it is used.
#include "qk_rope.h"

#include <cuda_runtime.h>

#include "cuda/device.cuh"
#include "cuda/head_lanes.h"
#include "cuda/launch.h"
#include "cuda/qk_rope.cuh"
#include "heads.h"
#include "rms_norm.h"

namespace pgolf::cuda {
namespace {

static_assert(kMaxRopeSize == kMaxHeadSize);

constexpr int64_t kForwardTokens = 4 * kWarps;  // of a block

// For all lanes of the warp. What is rounded to bf16 can do with a root that is two units of fp32
// off.
template <typename T, typename Shape, typename Lanes>
__device__ float head_rstd(const Shape& shape, const Lanes& x, float factor) {
  if (!shape.norm) return factor;
  const float squares = x.template dot<true>(x);
  if (sizeof(T) == sizeof(bf16)) {
    return factor * rsqrtf(squares * (factor * factor) / shape.size + shape.eps);
  }
  return rope_rstd<float>(squares, shape.size, shape.eps, factor);
}

// A head of the row of a token's id, which begins at `column`; NaN for an id that has none.
template <typename T, typename Own, typename Shape>
__device__ Own of_table(const QkRopeValue& value, int64_t token, int64_t column,
                        const Shape& shape) {
  const int64_t row = value.row(token);
  if (!value.has(row)) return Own::rounded(Own::Lanes::zero().plus(NAN, Own::Lanes::zero()));
  const int64_t width = shape.kv_heads * shape.size;
  return Own::load(static_cast<const T*>(value.rows) + row * width + column, shape.size, true);
}

// kById: values get rows of a table added. (A kernel for both spills, or has fewer loads on their way
// in the layers without.)
template <typename T, int kVector, int kLanes, int kChunks, typename Shape, bool kById>
__global__ void __launch_bounds__(kThreads, Shape::kForwardBlocks)
    qk_rope_forward(Shape shape, Span span, const T* __restrict__ qkv,
                    const float* __restrict__ cos, const float* __restrict__ sin,
                    const float* __restrict__ gain, const float* __restrict__ factors,
                    QkRopeValue value, T* __restrict__ q, T* __restrict__ k, T* __restrict__ v) {
  using Own = Packed<T, kVector, kLanes, kChunks>;
  using Of = Head<Shape, kLanes>;
  constexpr int kPasses = Shape::kPasses;
  for (int64_t first = 0; first < shape.total; first += kPasses * Of::kGroups) {
    EachPass<Shape, float> gains;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const Of head(shape, first + i * Of::kGroups);
      gains[i] = head.is_query ? gain[head.index] : 1.0f;
    }
    for (Place at(span); at.in_block(); at.advance(span)) {
      const T* const from = qkv + at.token * shape.total * shape.size;
      const T* const values = static_cast<const T*>(value.rows);
      EachPass<Shape, Own> x, added;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const Of head(shape, first + i * Of::kGroups);
        x[i] = Own::load(from + head.index * shape.size, shape.size, head.exists);
        const bool adds = head.exists && head.is_value && values;
        if constexpr (kById) {
          added[i] = Own{};
          if (adds) added[i] = of_table<T, Own>(value, at.token, head.own * shape.size, shape);
        } else {
          added[i] = Own::load(adds ? values + head.place(at.token) : nullptr, shape.size, adds);
        }
      }
      const Turn<T, kVector, kLanes, kChunks, Shape> turn(shape, cos, sin, at.time, 1);
      const float factor = factors ? factors[at.token] : 1.0f;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const Of head(shape, first + i * Of::kGroups);
        Own y = x[i];
        if (head.turns) {
          const float scale = gains[i] * head_rstd<T>(shape, x[i].unpacked(), factor);
          const auto turned = turn.of(x[i], from + head.index * shape.size, head.exists);
          if (!head.is_value) y = Own::rounded(Own::Lanes::zero().plus(scale, turned));
        }
        if (head.is_value) y = Own::rounded(added[i].unpacked().plus(factor, x[i].unpacked()));
        T* const to = (head.is_query ? q : head.is_value ? v : k) + head.place(at.token);
        if (head.exists) y.store(to, shape.size);
      }
    }
  }
}

// Adds up what the warps of a block have of the sums for d_gain; a lane of each group has all of
// its head's.
template <typename Shape, int kLanes>
__device__ void write_partials(const Shape& shape, int64_t first, const float* sums, float* row) {
  using Of = Head<Shape, kLanes>;
  constexpr int kHeads = Shape::kPasses * Of::kGroups;
  __shared__ float of_warps[kWarps][kHeads];
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < Shape::kPasses; ++i) {
    const int place = i * Of::kGroups + this_lane() / kLanes;
    if (group_lane<kLanes>() == 0) of_warps[thread / kWarp][place] = sums[i];
  }
  __syncthreads();
  if (thread < kHeads && first + thread < shape.heads) {
    float sum = of_warps[0][thread];
    for (int warp = 1; warp < kWarps; ++warp) sum += of_warps[warp][thread];
    row[first + thread] = sum;
  }
  __syncthreads();
}

// kOfResults: heads of q and k come from `results`, which are turned back, and not from qkv.
template <typename T, int kVector, int kLanes, int kChunks, typename Shape, bool kOfResults>
__global__ void __launch_bounds__(kThreads, Shape::kBackwardBlocks)
    qk_rope_backward_blocks(Shape shape, Span span, const T* __restrict__ qkv,
                            QkRopeResults results,
                            const float* __restrict__ cos, const float* __restrict__ sin,
                            const float* __restrict__ gain, const float* __restrict__ factors,
                            Upstream<T> dq, Upstream<T> dk, Upstream<T> dv, Upstream<T> dv_again,
                            T* __restrict__ dqkv, float* __restrict__ partials) {
  using Own = Packed<T, kVector, kLanes, kChunks>;
  using Of = Head<Shape, kLanes>;
  constexpr int kPasses = Shape::kPasses;
  for (int64_t first = 0; first < shape.total; first += kPasses * Of::kGroups) {
    Place at(span);
    EachPass<Shape, float> gains, sums;
    EachPass<Shape, Walk<T>> from, again;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const Of head(shape, first + i * Of::kGroups);
      const auto walk = [&](const Upstream<T>& x) {
        const bool given = Shape::kAllGradients || (head.exists && x.tokens.data);
        return Walk<T>::along(x, at, head.own, given);
      };
      from[i] = head.is_query ? walk(dq) : head.is_value ? walk(dv) : walk(dk);
      const bool twice = head.exists && head.is_value && dv_again.tokens.data;
      again[i] = Walk<T>::along(dv_again, at, head.own, twice);
      gains[i] = head.is_query ? gain[head.index] : 1.0f;
      sums[i] = 0;
    }
    while (at.in_block()) {
      const int64_t row = at.token * shape.total * shape.size;
      const float factor = factors ? factors[at.token] : 1.0f;
      EachPass<Shape, Own> dy, x;  // x of a value, which its gradient has no use for, is dv'
      EachPass<Shape, const T*> source;
      EachPass<Shape, float> rstds;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const Of head(shape, first + i * Of::kGroups);
        dy[i] = Own::load(from[i].head, shape.size, from[i].given);
        // Nor have keys that are not normed.
        const bool wanted = from[i].given && (shape.norm || head.is_query);
        source[i] = qkv + row + head.index * shape.size;
        if constexpr (kOfResults) {
          source[i] = static_cast<const T*>(head.is_query ? results.q : results.k) +
                      head.place(at.token);
          const int64_t place = at.token * (shape.heads + shape.kv_heads) + head.index;
          rstds[i] = wanted && !head.is_value ? static_cast<const float*>(results.rstd)[place] : 0;
        }
        x[i] = Own::load(head.is_value ? again[i].head : source[i], shape.size,
                         head.is_value ? again[i].given : wanted);
      }
      const Turn<T, kVector, kLanes, kChunks, Shape> turn(shape, cos, sin, at.time, -1);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const Of head(shape, first + i * Of::kGroups);
        Own dx = dy[i];
        if (head.turns) {
          const auto w = turn.of(dy[i], from[i].head, from[i].given);
          auto wide = x[i].unpacked();
          if constexpr (kOfResults) {  // n
            const bool there = from[i].given && !head.is_value;
            wide = Own::Lanes::zero().plus(1.0f / rope_gain(gains[i]),
                                           turn.of(x[i], source[i], there));
          }
          const float along = w.template dot<true>(wide);
          RopeGradient<float> gradient;
          if constexpr (kOfResults) {
            gradient = rope_gradient_of_normed(along, rstds[i], gains[i], shape.size);
          } else {
            const float rstd = head_rstd<T>(shape, wide, factor);
            gradient = rope_gradient(along, rstd, gains[i], shape.size);
          }
          if (from[i].given && !head.is_value) {
            const auto scaled = Own::Lanes::zero().plus(gradient.of_w, w);
            dx = Own::rounded(shape.norm ? scaled.plus(gradient.of_x, wide) : scaled);
            sums[i] += gradient.gain;
          }
        }
        if (head.is_value) {
          const auto scaled = Own::Lanes::zero().plus(factor, dy[i].unpacked());
          dx = Own::rounded(scaled.plus(factor, x[i].unpacked()));
        }
        if (head.exists) dx.store(dqkv + row + head.index * shape.size, shape.size);
      }
      const bool over = at.advance(span);
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        from[i].advance(over);
        again[i].advance(over);
      }
    }
    write_partials<Shape, kLanes>(shape, first, sums, partials + blockIdx.x * shape.heads);
  }
}

// body(shape, vector, lanes, chunks) with the constants that fit. `usual`: whether nothing that a
// recipe's sizes come with is missing.
template <typename T, typename Body>
const char* with_shape(const QkRopeShape& shape, bool vectors, bool usual, const Body& body) {
  const auto known = [&](auto fixed) {
    constexpr int kVector = kAccessBytes / sizeof(T), kLanes = decltype(fixed)::size / kVector;
    return body(fixed, Constant<kVector>{}, Constant<kLanes>{}, Constant<1>{});
  };
  if (vectors && usual && Rotated16::fits(shape)) return known(Rotated16(shape));
  if (vectors && usual && Rotated64::fits(shape)) return known(Rotated64(shape));
  return with_head_lanes<T>(shape.size, vectors, [&](auto vector, auto lanes, auto chunks) {
    return body(AnyShape(shape), vector, lanes, chunks);
  });
}

// Whether 16 bytes at a time also meet what rotation pairs.
template <typename T>
bool aligned_heads(const QkRopeShape& shape, const QkRopeInputs& in) {
  return aligned({in.qkv, in.cos, in.sin},
                 {shape.size * int64_t{sizeof(T)}, shape.half * int64_t{sizeof(T)}});
}

template <bool kOfResults>
const char* backward(const QkRopeShape& shape, const QkRopeInputs& in, const QkRopeResults& results,
                     const QkRopeGradients& gradients, void* dqkv, void* partials, void* stream) {
  const Heads dq = gradients.dq, dk = gradients.dk, dv = gradients.dv;
  const Heads dv_again = gradients.dv_again;
  const Parts parts = rope_parts(shape.batch * shape.time);
  const Span span(shape, parts.each);
  return with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const bool vectors = aligned_heads<T>(shape, in) &&
                         aligned({dq.data, dk.data, dv.data, dv_again.data, dqkv, results.q,
                                  results.k},
                                 {head_bytes<T>(dq), head_bytes<T>(dk), head_bytes<T>(dv),
                                  head_bytes<T>(dv_again)});
    const bool all = dq.data && dk.data && dv.data;
    return with_shape<T>(shape, vectors, all, [&](auto known, auto vector, auto lanes,
                                                  auto chunks) {
      const auto kernel =
          qk_rope_backward_blocks<T, decltype(vector)::value, decltype(lanes)::value,
                                  decltype(chunks)::value, decltype(known), kOfResults>;
      return launch(kernel, parts.count, kThreads, stream, known, span,
                    static_cast<const T*>(in.qkv), results, static_cast<const float*>(in.cos),
                    static_cast<const float*>(in.sin), static_cast<const float*>(in.gain),
                    static_cast<const float*>(in.factor), Upstream<T>(dq, span),
                    Upstream<T>(dk, span), Upstream<T>(dv, span), Upstream<T>(dv_again, span),
                    static_cast<T*>(dqkv), static_cast<float*>(partials));
    });
  });
}

}  // namespace

const char* qk_rope(const QkRopeShape& shape, const QkRopeInputs& in, const QkRopeValue& value,
                    const QkRopeOutputs& out, void* stream) {
  return with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const bool vectors =
        aligned_heads<T>(shape, in) && aligned({value.rows, out.q, out.k, out.v}, {});
    return with_shape<T>(shape, vectors, true, [&](auto known, auto vector, auto lanes,
                                                   auto chunks) {
      const auto start = [&](auto by_id) {
        const auto kernel =
            qk_rope_forward<T, decltype(vector)::value, decltype(lanes)::value,
                            decltype(chunks)::value, decltype(known), decltype(by_id)::value != 0>;
        return launch(kernel, blocks_for(shape.batch * shape.time, kForwardTokens), kThreads,
                      stream, known, Span(shape, kForwardTokens), static_cast<const T*>(in.qkv),
                      static_cast<const float*>(in.cos), static_cast<const float*>(in.sin),
                      static_cast<const float*>(in.gain), static_cast<const float*>(in.factor),
                      value, static_cast<T*>(out.q), static_cast<T*>(out.k),
                      static_cast<T*>(out.v));
      };
      return value.ids ? start(Constant<1>{}) : start(Constant<0>{});
    });
  });
}

const char* qk_rope_backward(const QkRopeShape& shape, const QkRopeInputs& in,
                             const QkRopeGradients& gradients, void* dqkv, void* partials,
                             void* stream) {
  return backward<false>(shape, in, {}, gradients, dqkv, partials, stream);
}

const char* qk_rope_backward_of_results(const QkRopeShape& shape, const QkRopeInputs& in,
                                        const QkRopeResults& results,
                                        const QkRopeGradients& gradients, void* dqkv,
                                        void* partials, void* stream) {
  return backward<true>(shape, in, results, gradients, dqkv, partials, stream);
}

}  // namespace pgolf::cuda
