// What Muon does before Newton-Schulz, on a GPU: a warp a row.
#include "cuda/multi_tensor.cuh"
#include "newton_schulz.h"
#include "param_update.h"

namespace pgolf::cuda {
namespace {

using Matrices = TensorList<MomentumMatrix>;

constexpr int kWarps = kThreads / kWarp;

__device__ inline int this_warp() { return static_cast<int>(threadIdx.x) / kWarp; }

template <bool kRowNorm>
__global__ void __launch_bounds__(kThreads)
    muon_momentum_rows(Matrices list, MuonMomentumShape shape, const UpdateScalars* scalars,
                       const float* norm, float* squares) {
  const int64_t item = list.first_item + static_cast<int64_t>(blockIdx.x) * kWarps + this_warp();
  if (item >= list.end_item) return;
  const MomentumMatrix t = list.tensors[tensor_of(list.tensors, list.count, item)];
  const MomentumStep step = momentum_step(*scalars, *norm);
  const int64_t begin = (item - t.first_item) * t.cols;
  const bool wide = all_aligned(t.grad, t.momentum, t.x) && t.cols % kWide == 0;
  float sum = 0;
  for_elements(begin, begin + t.cols, wide, this_lane(), kWarp, [&](auto elements, int64_t at) {
    constexpr int kCount = decltype(elements)::count;
    float x[kCount], buffer[kCount];
    load_floats(t.grad, t.grad_dtype, at, x);
    load_floats(t.momentum, t.momentum_dtype, at, buffer);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = muon_direction(step, x[i], shape.nesterov, buffer[i]);
      sum += x[i] * x[i];
    }
    if (step.stores) store_floats(buffer, t.momentum, t.momentum_dtype, at);
    store_floats(x, t.x, shape.x_dtype, at);
  });
  double squares_of_row = group_sum<kWarp>(sum);
  if constexpr (kRowNorm) {
    const auto factor = static_cast<float>(row_norm_factor(squares_of_row));
    // A lane reads what it has written itself.
    for_elements(begin, begin + t.cols, wide, this_lane(), kWarp, [&](auto elements, int64_t at) {
      float x[decltype(elements)::count];
      load_floats(t.x, shape.x_dtype, at, x);
#pragma unroll
      for (float& value : x) value *= factor;
      store_floats(x, t.x, shape.x_dtype, at);
    });
  }
  if (this_lane() == 0) squares[item] = static_cast<float>(squares_of_row);
}

}  // namespace

const char* muon_momentum(const MuonMomentumShape& shape, const MomentumMatrix* matrices,
                          const UpdateScalars* scalars, const float* norm, float* squares,
                          void* stream) {
  const int count = static_cast<int>(shape.matrices);
  const auto kernel = shape.row_norm ? muon_momentum_rows<true> : muon_momentum_rows<false>;
  return for_each_list<Matrices>(matrices, count, shape.rows, [&](const auto& list) {
    return launch(kernel, blocks_for(list.end_item - list.first_item, kWarps), kThreads, stream,
                  list, shape, scalars, norm, squares);
  });
}

}  // namespace pgolf::cuda
