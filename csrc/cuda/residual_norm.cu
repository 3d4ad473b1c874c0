// residual_norm on a GPU: the formulas of residual_norm.h. A warp takes a row of up to 512 elements, a
// block a longer one, and keeps it in registers: every tensor comes from memory once.
#include "residual_norm.h"

#include <cuda_runtime.h>

#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "cuda/partials.cuh"

namespace pgolf::cuda {
namespace {

constexpr int kElements = 16;  // of a row, in each lane
constexpr int64_t kWarpWidth = kElements * kWarp;
static_assert(kMaxResidualWidth == kElements * kThreads);

template <typename T>
struct Inputs {
  ResidualNormShape shape;
  const T *x, *branch, *skip, *x0;
  const float *branch_scale, *skip_weight, *mix;

  Inputs(const ResidualNormShape& s, const ResidualNormInputs& in)
      : shape(s),
        x(static_cast<const T*>(in.x)),
        branch(static_cast<const T*>(in.branch)),
        skip(static_cast<const T*>(in.skip)),
        x0(static_cast<const T*>(in.x0)),
        branch_scale(static_cast<const float*>(in.branch_scale)),
        skip_weight(static_cast<const float*>(in.skip_weight)),
        mix(static_cast<const float*>(in.mix)) {}

  // Whether 16 bytes at a time meet all rows and parameters.
  bool aligned_rows() const {
    return aligned({x, branch, skip, x0, branch_scale, skip_weight, mix},
                   {shape.width * int64_t{sizeof(T)}});
  }
};

template <typename T>
struct Outputs {
  T *total, *x_in, *h;
  float* rstd;

  explicit Outputs(const ResidualNormOutputs& out)
      : total(static_cast<T*>(out.total)),
        x_in(static_cast<T*>(out.x_in)),
        h(static_cast<T*>(out.h)),
        rstd(static_cast<float*>(out.rstd)) {}
};

template <typename T>
struct Upstream {
  const T *x_in, *d_total, *d_x_in, *dh;
  const float* rstd;

  explicit Upstream(const ResidualNormUpstream& in)
      : x_in(static_cast<const T*>(in.x_in)),
        d_total(static_cast<const T*>(in.d_total)),
        d_x_in(static_cast<const T*>(in.d_x_in)),
        dh(static_cast<const T*>(in.dh)),
        rstd(static_cast<const float*>(in.rstd)) {}
};

template <typename T>
struct Gradients {
  T *dx, *dbranch, *dskip, *dx0;

  explicit Gradients(const ResidualNormGradients& out)
      : dx(static_cast<T*>(out.dx)),
        dbranch(static_cast<T*>(out.dbranch)),
        dskip(static_cast<T*>(out.dskip)),
        dx0(static_cast<T*>(out.dx0)) {}
};

// row + factors y, where no y is nothing and no factors are 1.
template <typename Lanes, typename T>
__device__ Lanes added(const Lanes& row, const T* y, int64_t at, const float* factors, int size) {
  if (!y) return row;
  const Lanes term = Lanes::load(y + at, size);
  return factors ? row.plus(Lanes::load_floats(factors, size), term) : row.plus(1.0f, term);
}

template <typename T, int kVector, int kLanes, int kChunks>
__global__ void __launch_bounds__(kThreads)
    residual_norm_forward(Inputs<T> in, Outputs<T> out) {
  using Lanes = Row<T, kVector, kLanes, kChunks>;
  const int size = static_cast<int>(in.shape.width);
  const float scale = static_cast<float>(in.shape.scale), eps = static_cast<float>(in.shape.eps);
  for (int64_t row = first_item<kLanes>(); row < in.shape.rows; row += item_step<kLanes>()) {
    const int64_t at = row * size;
    Lanes x = Lanes::load(in.x + at, size);
    x = added(x, in.branch, at, in.branch_scale, size);
    x = added(x, in.skip, at, in.skip_weight, size);
    if (out.total) x.store(out.total + at, size);
    if (in.mix) {
      x = x.times(Lanes::load_floats(in.mix, size));
      x = added(x, in.x0, at, in.mix + size, size);
    }
    if (out.x_in) x.store(out.x_in + at, size);
    const float rstd = rms_rstd(x.dot(x), size, eps);
    if (group_lane<kLanes>() == 0) out.rstd[row] = rstd;
    Lanes::zero().plus(scale * rstd, x).store(out.h + at, size);
  }
}

// The gradient of x_in, G, of the row at `at`.
template <typename Lanes, typename T>
__device__ Lanes mixed_gradient(const ResidualNormShape& shape, const Upstream<T>& up, int64_t row,
                                int64_t at) {
  const int size = static_cast<int>(shape.width);
  Lanes g = up.d_x_in ? Lanes::load(up.d_x_in + at, size) : Lanes::zero();
  if (!up.dh) return g;
  const Lanes dh = Lanes::load(up.dh + at, size), x_in = Lanes::load(up.x_in + at, size);
  const auto norm =
      rms_gradient(dh.dot(x_in), up.rstd[row], static_cast<float>(shape.scale), size);
  return g.plus(norm.of_dn, dh).plus(norm.of_x, x_in);
}

// Which parameters have gradients: their sums stay in registers, and those of all leave room for half
// as many warps.
enum class Learned { none, mix, all };

// What a lane's rows add to the gradients of parameters; the groups' sums are added up at the end.
template <typename Lanes, Learned kLearned>
struct Sums {
  Lanes branch_scale = Lanes::zero(), skip_weight = Lanes::zero();
  Lanes mix = Lanes::zero(), mix0 = Lanes::zero();
};
template <typename Lanes>
struct Sums<Lanes, Learned::mix> {
  Lanes mix = Lanes::zero(), mix0 = Lanes::zero();
};
template <typename Lanes>
struct Sums<Lanes, Learned::none> {};

// to[c] = the sum over the block's groups of column c.
template <typename T, int kVector, int kLanes, int kChunks>
__device__ void store_sum(const Row<T, kVector, kLanes, kChunks>& sum, int size, float* to) {
  using Lanes = Row<T, kVector, kLanes, kChunks>;
  constexpr int kWidth = kLanes * Lanes::kCount;
  __shared__ float sums[kThreads * Lanes::kCount];
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // the sums before these have been read
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      sums[thread / kLanes * kWidth + Lanes::place(chunk) + i] = sum.at[chunk * kVector + i];
    }
  }
  __syncthreads();
  for (int col = thread; col < size; col += kThreads) {
    float total = 0;
    for (int first = 0; first < kThreads / kLanes * kWidth; first += kWidth) {
      total += sums[first + col];
    }
    to[col] = total;
  }
}

// A block takes kResidualRowsPerBlock rows; partials (blocks, P, D) is for what is learned.
template <typename T, int kVector, int kLanes, int kChunks, Learned kLearned>
__global__ void __launch_bounds__(kThreads)
    residual_norm_backward_rows(Inputs<T> in, Upstream<T> up, Gradients<T> out, int64_t parameters,
                                float* partials) {
  using Lanes = Row<T, kVector, kLanes, kChunks>;
  const int size = static_cast<int>(in.shape.width);
  Sums<Lanes, kLearned> sums;
  const int64_t begin = blockIdx.x * kResidualRowsPerBlock;
  const int64_t left = in.shape.rows - begin;
  const int64_t end = begin + (left < kResidualRowsPerBlock ? left : kResidualRowsPerBlock);
  for (int64_t row = begin + threadIdx.x / kLanes; row < end; row += kThreads / kLanes) {
    const int64_t at = row * size;
    Lanes d = mixed_gradient<Lanes>(in.shape, up, row, at);
    if (in.mix) {
      if constexpr (kLearned != Learned::none) {
        if (in.x) {
          sums.mix = sums.mix.plus(d, Lanes::load(in.x + at, size));
          sums.mix0 = sums.mix0.plus(d, Lanes::load(in.x0 + at, size));
        }
      }
      d.times(Lanes::load_floats(in.mix + size, size)).store(out.dx0 + at, size);
      d = d.times(Lanes::load_floats(in.mix, size));
    }
    if (up.d_total) d = d.plus(1.0f, Lanes::load(up.d_total + at, size));
    d.store(out.dx + at, size);
    if constexpr (kLearned == Learned::all) {
      if (in.branch_scale) {
        sums.branch_scale = sums.branch_scale.plus(d, Lanes::load(in.branch + at, size));
        d.times(Lanes::load_floats(in.branch_scale, size)).store(out.dbranch + at, size);
      }
      if (in.skip_weight) {
        sums.skip_weight = sums.skip_weight.plus(d, Lanes::load(in.skip + at, size));
        d.times(Lanes::load_floats(in.skip_weight, size)).store(out.dskip + at, size);
      }
    }
  }
  float* to = partials + blockIdx.x * parameters * size;
  const auto store = [&](const Lanes& sum) {
    store_sum(sum, size, to);
    to += size;
  };
  if constexpr (kLearned == Learned::all) {
    if (in.branch_scale) store(sums.branch_scale);
    if (in.skip_weight) store(sums.skip_weight);
  }
  if constexpr (kLearned != Learned::none) {
    if (in.mix && in.x) {
      store(sums.mix);
      store(sums.mix0);
    }
  }
}

// The kernel for what is learned.
template <typename T, int kVector, int kLanes, int kChunks>
auto backward_kernel(const ResidualNormInputs& in) {
  if (in.branch_scale || in.skip_weight) {
    return residual_norm_backward_rows<T, kVector, kLanes, kChunks, Learned::all>;
  }
  if (residual_parameters(in)) {
    return residual_norm_backward_rows<T, kVector, kLanes, kChunks, Learned::mix>;
  }
  return residual_norm_backward_rows<T, kVector, kLanes, kChunks, Learned::none>;
}

// body(vector, lanes, chunks) with the constants of a Row that fit rows of `width` elements.
template <typename T, typename Body>
const char* with_row_lanes(int64_t width, bool vectors, const Body& body) {
  constexpr int kVector = kAccessBytes / sizeof(T);
  constexpr Constant<kVector> vector{};
  constexpr Constant<kElements / kVector> chunks{};
  if (width <= kWarpWidth) {
    if (vectors) return body(vector, Constant<kWarp>{}, chunks);
    return body(Constant<1>{}, Constant<kWarp>{}, Constant<kElements>{});
  }
  if (vectors) return body(vector, Constant<kThreads>{}, chunks);
  return body(Constant<1>{}, Constant<kThreads>{}, Constant<kElements>{});
}

}  // namespace

const char* residual_norm(const ResidualNormShape& shape, const ResidualNormInputs& in,
                          const ResidualNormOutputs& out, void* stream) {
  return with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const Inputs<T> inputs(shape, in);
    const bool vectors = inputs.aligned_rows() && aligned({out.total, out.x_in, out.h}, {});
    return with_row_lanes<T>(shape.width, vectors, [&](auto vector, auto lanes, auto chunks) {
      constexpr int kLanes = decltype(lanes)::value;
      return launch(
          residual_norm_forward<T, decltype(vector)::value, kLanes, decltype(chunks)::value>,
          stepping_blocks(shape.rows, kThreads / kLanes), kThreads, stream, inputs,
          Outputs<T>(out));
    });
  });
}

const char* residual_norm_backward(const ResidualNormShape& shape, const ResidualNormInputs& in,
                                   const ResidualNormUpstream& upstream,
                                   const ResidualNormGradients& out, void* stream) {
  const int64_t blocks = residual_blocks(shape.rows), parameters = residual_parameters(in);
  float* const partials = static_cast<float*>(out.partials);
  const char* error = with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const Inputs<T> inputs(shape, in);
    const bool vectors = inputs.aligned_rows() &&
                         aligned({upstream.x_in, upstream.d_total, upstream.d_x_in, upstream.dh},
                                 {}) &&
                         aligned({out.dx, out.dbranch, out.dskip, out.dx0}, {});
    return with_row_lanes<T>(shape.width, vectors, [&](auto vector, auto lanes, auto chunks) {
      const auto kernel = backward_kernel<T, decltype(vector)::value, decltype(lanes)::value,
                                          decltype(chunks)::value>(in);
      return launch(kernel, blocks, kThreads, stream, inputs, Upstream<T>(upstream),
                    Gradients<T>(out), parameters, partials);
    });
  });
  if (error || parameters == 0) return error;
  return sum_rows(partials, blocks, parameters * shape.width, static_cast<float*>(out.parameters),
                  stream);
}

}  // namespace pgolf::cuda
