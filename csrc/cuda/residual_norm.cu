// residual_norm on a GPU: the formulas of residual_norm.h. A warp takes a row of up to 512 elements, a
// block a longer one, and keeps it in registers: every tensor comes from memory once. Only where the
// gradient is for any operands are dh and x_in read twice: to keep them, too, registers are spilled.
#include "residual_norm.h"

#include <cuda_runtime.h>

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/residual_rows.cuh"

namespace pgolf::cuda {
namespace {

constexpr int kElements = 16;  // of a row, in each lane
constexpr int64_t kWarpWidth = kElements * kWarp;
static_assert(kMaxResidualWidth == kElements * kThreads);

template <typename T>
struct Inputs {
  ResidualNormShape shape;
  const T *x, *branch, *skip, *x0;
  const float *branch_scale, *skip_weight, *mix0, *mix1;

  Inputs(const ResidualNormShape& s, const ResidualNormInputs& in)
      : shape(s),
        x(static_cast<const T*>(in.x)),
        branch(static_cast<const T*>(in.branch)),
        skip(static_cast<const T*>(in.skip)),
        x0(static_cast<const T*>(in.x0)),
        branch_scale(static_cast<const float*>(in.branch_scale)),
        skip_weight(static_cast<const float*>(in.skip_weight)),
        mix0(static_cast<const float*>(in.mix0)),
        mix1(static_cast<const float*>(in.mix1)) {}

  // Whether 16 bytes at a time meet all rows and parameters.
  bool aligned_rows() const {
    return aligned({x, branch, skip, x0, branch_scale, skip_weight, mix0, mix1},
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
  const float *rstd, *total_scale, *x_in_scale;

  explicit Upstream(const ResidualNormUpstream& in)
      : x_in(static_cast<const T*>(in.x_in)),
        d_total(static_cast<const T*>(in.d_total)),
        d_x_in(static_cast<const T*>(in.d_x_in)),
        dh(static_cast<const T*>(in.dh)),
        rstd(static_cast<const float*>(in.rstd)),
        total_scale(static_cast<const float*>(in.total_scale)),
        x_in_scale(static_cast<const float*>(in.x_in_scale)) {}
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

// Rows of a block that sums nothing up: a group of lanes takes so many, one after the other, that most
// of them are requested while another one is computed.
constexpr int64_t per_block(int lanes) { return 4 * (kThreads / lanes); }

// A row of what the forward pass reads.
template <typename L>
struct ForwardRow {
  Source<L> x, branch, skip, x0;

  ForwardRow() = default;
  __device__ ForwardRow(const Inputs<typename L::Element>& in, int64_t row) {
    const int size = static_cast<int>(in.shape.width);
    const int64_t at = row * size;
    x = {in.x, at, size, true};
    branch = {in.branch, at, size, L::template has<kBranch>(in.branch)};
    skip = {in.skip, at, size, L::template has<kSkip>(in.skip)};
    x0 = {in.x0, at, size, L::template has<kX0>(in.mix1)};
  }
};

template <typename T, int kVector, int kLanes, int kChunks, unsigned kSet>
__global__ void __launch_bounds__(kThreads, resident_blocks(kVector, kLanes, kSet))
    residual_norm_forward(Inputs<T> in, Outputs<T> out) {
  using L = Layout<T, kVector, kLanes, kChunks, kSet>;
  using Part = typename L::Part;
  const int size = static_cast<int>(in.shape.width);
  const float scale = static_cast<float>(in.shape.scale), eps = static_cast<float>(in.shape.eps);
  const float inverse = 1.0f / static_cast<float>(size);  // a mean without a division a row
  const int64_t step = item_step<kLanes>();
  int64_t row = first_item<kLanes>();
  if (row >= in.shape.rows) return;
  ForwardRow<L> next(in, row);
  for (; row < in.shape.rows; row += step) {
    const ForwardRow<L> here = L::kPrefetches ? next : ForwardRow<L>(in, row);
    if (L::kPrefetches) next = {in, row + step < in.shape.rows ? row + step : row};
    const int64_t at = row * size;
    Part rows[L::kParts];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < L::kParts; ++i) {
      Part x = here.x.part(i);
      if (L::template has<kBranch>(in.branch)) {
        const Part branch = here.branch.part(i);
        x = L::template has<kBranchScale>(in.branch_scale)
                ? x.plus(L::floats(in.branch_scale, i, size), branch)
                : x.plus(1.0f, branch);
      }
      if (L::template has<kSkip>(in.skip)) {
        const Part skip = here.skip.part(i);
        x = L::template has<kSkipWeight>(in.skip_weight)
                ? x.plus(L::floats(in.skip_weight, i, size), skip)
                : x.plus(1.0f, skip);
      }
      if (L::template has<kTotal>(out.total)) L::store(x, out.total + at, i, size);
      if (L::template has<kMix>(in.mix0)) x = x.times(L::floats(in.mix0, i, size));
      if (L::template has<kX0>(in.mix1)) {
        x = x.plus(L::floats(in.mix1, i, size), here.x0.part(i));
      }
      if (L::template has<kXIn>(out.x_in)) L::store(x, out.x_in + at, i, size);
      squares += L::dot(x, x, i, size);
      rows[i] = x;
    }
    const float rstd = rms_rstd(group_sum<kLanes>(squares) * inverse, 1, eps);
    const float factor = scale * rstd;
    if (group_lane<kLanes>() == 0) out.rstd[row] = in.shape.factored ? factor : rstd;
    if (in.shape.factored) continue;
#pragma unroll
    for (int i = 0; i < L::kParts; ++i) {
      L::store(Part::zero().plus(factor, rows[i]), out.h + at, i, size);
    }
  }
}

// A row of what the gradient is made from.
template <typename L>
struct BackwardRow {
  Source<L> dh, x_in, d_x_in, total, x0, d_total, branch, skip;
  float rstd;

  BackwardRow() = default;
  __device__ BackwardRow(const Inputs<typename L::Element>& in,
                         const Upstream<typename L::Element>& up, int64_t row) {
    const int size = static_cast<int>(in.shape.width);
    const int64_t at = row * size;
    dh = {up.dh, at, size, L::template has<kH>(up.dh)};
    x_in = {up.x_in, at, size, L::template has<kH>(up.dh)};
    rstd = up.rstd[row];
    d_x_in = {up.d_x_in, at, size, L::template has<kXIn>(up.d_x_in)};
    total = {in.x, at, size, L::template has<kLearned>(in.x)};
    x0 = {in.x0, at, size,
          L::template has<kLearned>(in.x) && L::template has<kLearnedX0>(in.mix1)};
    d_total = {up.d_total, at, size, L::template has<kTotal>(up.d_total)};
    branch = {in.branch, at, size, L::template has<kBranchScale>(in.branch_scale)};
    skip = {in.skip, at, size, L::template has<kSkipWeight>(in.skip_weight)};
  }
};

// partials (blocks, P, D) is for what is learned: its sums stay in registers until the end.
template <typename T, int kVector, int kLanes, int kChunks, unsigned kSet>
__global__ void __launch_bounds__(kThreads, resident_blocks(kVector, kLanes, kSet))
    residual_norm_backward_rows(Inputs<T> in, Upstream<T> up, Gradients<T> out, int64_t parameters,
                                float* partials) {
  using L = Layout<T, kVector, kLanes, kChunks, kSet>;
  using Part = typename L::Part;
  const int size = static_cast<int>(in.shape.width);
  const ResidualNormGradient<float> gradient(in.shape);
  const float inverse = 1.0f / static_cast<float>(size);
  const bool normed = L::template has<kH>(up.dh), mixes = L::template has<kMix>(in.mix0);
  const bool learns = L::template has<kLearned>(in.x);
  const bool of_x0 = learns && L::template has<kLearnedX0>(in.mix1);
  const bool has_total = L::template has<kTotal>(up.d_total);
  const bool products = L::template has<kTotalScale>(up.total_scale);
  Sum<L, kLanes> of_scale, of_weight, of_mix0, of_mix1, of_product, of_x_in;
  const int64_t step = item_step<kLanes>();
  int64_t row = first_item<kLanes>();
  BackwardRow<L> next;
  if (L::kPrefetches && row < in.shape.rows) next = {in, up, row};
  for (; row < in.shape.rows; row += step) {
    const BackwardRow<L> here = L::kPrefetches ? next : BackwardRow<L>(in, up, row);
    if (L::kPrefetches) next = {in, up, row + step < in.shape.rows ? row + step : row};
    const int64_t at = row * size;
    RmsGradient<float> norm = {};
    if (normed) {
      float along = 0;
#pragma unroll
      for (int i = 0; i < L::kParts; ++i) {
        along += L::dot(here.dh.part_beforehand(i), here.x_in.part_beforehand(i), i, size);
      }
      norm = gradient.of(group_sum<kLanes>(along) * inverse, here.rstd, 1);
    }
#pragma unroll
    for (int i = 0; i < L::kParts; ++i) {
      Part d = L::template has<kXIn>(up.d_x_in) ? here.d_x_in.part(i) : Part::zero();
      if (L::template has<kXInScale>(up.x_in_scale)) {
        of_x_in.parts[i] = of_x_in.parts[i].plus(d, here.x_in.part(i));
        d = d.times(L::floats(up.x_in_scale, i, size));
      }
      if (normed) d = d.plus(norm.of_dn, here.dh.part(i)).plus(norm.of_x, here.x_in.part(i));
      if (learns && mixes) of_mix0.parts[i] = of_mix0.parts[i].plus(d, here.total.part(i));
      if (of_x0) of_mix1.parts[i] = of_mix1.parts[i].plus(d, here.x0.part(i));
      if (L::template has<kX0>(out.dx0)) {
        const bool scaled = L::template has<kLearnedX0>(in.mix1);
        L::store(scaled ? d.times(L::floats(in.mix1, i, size)) : d, out.dx0 + at, i, size);
      }
      if (mixes) d = d.times(L::floats(in.mix0, i, size));
      if (has_total && products) {
        const Part of_total = here.d_total.part(i);
        of_product.parts[i] = of_product.parts[i].plus(of_total, here.total.part(i));
        d = d.plus(L::floats(up.total_scale, i, size), of_total);
      } else if (has_total) {
        d = d.plus(1.0f, here.d_total.part(i));
      }
      L::store(d, out.dx + at, i, size);
      if (L::template has<kBranchScale>(in.branch_scale)) {
        of_scale.parts[i] = of_scale.parts[i].plus(d, here.branch.part(i));
        L::store(d.times(L::floats(in.branch_scale, i, size)), out.dbranch + at, i, size);
      }
      if (L::template has<kSkipWeight>(in.skip_weight)) {
        of_weight.parts[i] = of_weight.parts[i].plus(d, here.skip.part(i));
        L::store(d.times(L::floats(in.skip_weight, i, size)), out.dskip + at, i, size);
      }
    }
  }
  float* to = partials + blockIdx.x * parameters * size;
  const auto store = [&](const Sum<L, kLanes>& sum) {
    sum.store(size, to);
    to += size;
  };
  if (L::template has<kBranchScale>(in.branch_scale)) store(of_scale);
  if (L::template has<kSkipWeight>(in.skip_weight)) store(of_weight);
  if (learns && mixes) store(of_mix0);
  if (of_x0) store(of_mix1);
  if (products) store(of_product);
  if (L::template has<kXInScale>(up.x_in_scale)) store(of_x_in);
}

// The kernels for a set of operands. Those for one set are what layers ask for when factors of
// branches are folded into matrices: a first layer, such whose sum is a later layer's skip, others,
// such that take a skip; what stands before an MLP; the norm at the end.
template <typename T, int kVector, int kLanes, int kChunks>
struct Kernels {
  static constexpr bool kInLayers = std::is_same_v<T, bf16> && kVector > 1 && kLanes == kWarp;

  static auto forward(unsigned set) {
    return chosen<kBranch | kXIn, kMix | kXIn, kBranch | kMix | kX0 | kTotal | kXIn,
                  kBranch | kBranchScale | kX0 | kXIn,
                  kBranch | kBranchScale | kSkip | kSkipWeight | kX0 | kXIn>(
        set, [](auto one) { return residual_norm_forward<T, kVector, kLanes, kChunks, one.value>; },
        residual_norm_forward<T, kVector, kLanes, kChunks, kTested | (kAny & ~kLearned)>);
  }

  static auto backward(unsigned set) {
    return chosen<kH, kH | kXIn, kH | kXIn | kXInScale,
                  kH | kXIn | kTotal | kTotalScale | kMix | kLearned | kX0>(
        set,
        [](auto one) {
          return residual_norm_backward_rows<T, kVector, kLanes, kChunks, one.value>;
        },
        set & kSums
            ? residual_norm_backward_rows<T, kVector, kLanes, kChunks, kTested | kAny>
            : residual_norm_backward_rows<T, kVector, kLanes, kChunks, kTested | (kAny & ~kSums)>);
  }

 private:
  // kernel_for(a constant) of the set, or the one for the others.
  template <unsigned... kSets, typename KernelFor, typename Kernel>
  static Kernel chosen(unsigned set, const KernelFor& kernel_for, Kernel others) {
    Kernel kernel = others;
    if constexpr (kInLayers) {
      ((set == kSets ? void(kernel = kernel_for(Constant<int{kSets}>{})) : void()), ...);
    }
    return kernel;
  }
};

// body(vector, lanes, chunks) with the constants of a Row that fit rows of `width` elements.
template <typename T, typename Body>
const char* with_row_lanes(int64_t width, bool vectors, const Body& body) {
  if (width == 0) return nullptr;
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
  const unsigned set = (in.branch ? kBranch : 0) | (in.branch_scale ? kBranchScale : 0) |
                       (in.skip ? kSkip : 0) | (in.skip_weight ? kSkipWeight : 0) |
                       (in.mix0 ? kMix : 0) | (in.mix1 ? kX0 : 0) | (out.total ? kTotal : 0) |
                       (out.x_in ? kXIn : 0);
  return with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const Inputs<T> inputs(shape, in);
    const bool vectors = inputs.aligned_rows() && aligned({out.total, out.x_in, out.h}, {});
    return with_row_lanes<T>(shape.width, vectors, [&](auto vector, auto lanes, auto chunks) {
      using For = Kernels<T, decltype(vector)::value, decltype(lanes)::value,
                          decltype(chunks)::value>;
      return launch(For::forward(set), stepping_blocks(shape.rows, per_block(lanes.value)),
                    kThreads, stream, inputs, Outputs<T>(out));
    });
  });
}

const char* residual_norm_backward(const ResidualNormShape& shape, const ResidualNormInputs& in,
                                   const ResidualNormUpstream& upstream,
                                   const ResidualNormGradients& out, void* stream) {
  const unsigned set = (in.branch_scale ? kBranchScale : 0) | (in.skip_weight ? kSkipWeight : 0) |
                       (in.mix0 ? kMix : 0) | (in.mix1 ? kLearnedX0 : 0) | (out.dx0 ? kX0 : 0) |
                       (in.x ? kLearned : 0) | (upstream.d_total ? kTotal : 0) |
                       (upstream.total_scale ? kTotalScale : 0) | (upstream.d_x_in ? kXIn : 0) |
                       (upstream.x_in_scale ? kXInScale : 0) | (upstream.dh ? kH : 0);
  const int64_t parts = residual_parts(shape.rows).count;
  const int64_t parameters = residual_parameters(in, upstream);
  float* const partials = static_cast<float*>(out.partials);
  return with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const Inputs<T> inputs(shape, in);
    const bool vectors = inputs.aligned_rows() &&
                         aligned({upstream.x_in, upstream.d_total, upstream.d_x_in, upstream.dh,
                                  upstream.total_scale, upstream.x_in_scale},
                                 {}) &&
                         aligned({out.dx, out.dbranch, out.dskip, out.dx0}, {});
    return with_row_lanes<T>(shape.width, vectors, [&](auto vector, auto lanes, auto chunks) {
      using For = Kernels<T, decltype(vector)::value, decltype(lanes)::value,
                          decltype(chunks)::value>;
      const int64_t blocks =
          parameters ? parts : stepping_blocks(shape.rows, per_block(lanes.value));
      return launch(For::backward(set), blocks, kThreads, stream, inputs, Upstream<T>(upstream),
                    Gradients<T>(out), parameters, partials);
    });
  });
}

}  // namespace pgolf::cuda
