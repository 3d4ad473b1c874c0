// What Muon does before Newton-Schulz, on a GPU. First a warp a row: momentum, direction and the sum
// of its squares; then a block some rows of a matrix: the matrix's norm from all its sums, and the
// scale of the rows.
#include <vector>

#include "cuda/multi_tensor.cuh"
#include "newton_schulz.h"
#include "param_update.h"

namespace pgolf::cuda {
namespace {

using Matrices = TensorList<MomentumMatrix>;

constexpr int kWarps = kThreads / kWarp;
constexpr int64_t kBlockRows = 32;  // that a block scales: it reads the sums of all rows

__device__ inline int this_warp() { return static_cast<int>(threadIdx.x) / kWarp; }

__global__ void __launch_bounds__(kThreads)
    muon_momentum_rows(Matrices list, MuonMomentumShape shape, const UpdateScalars* scalars,
                       const float* norm, double* squares) {
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
  sum = group_sum<kWarp>(sum);
  if (this_lane() == 0) squares[t.first_row + item - t.first_item] = sum;
}

// Items are blocks of kBlockRows rows of a matrix.
__global__ void __launch_bounds__(kThreads)
    muon_momentum_scale(Matrices list, MuonMomentumShape shape, const double* squares) {
  const int64_t item = list.first_item + blockIdx.x;
  const MomentumMatrix t = list.tensors[tensor_of(list.tensors, list.count, item)];
  const double* rows = squares + t.first_row;
  double total = 0;
  for (int64_t row = threadIdx.x; row < t.rows; row += kThreads) {
    const double divisor = shape.row_norm ? row_norm_divisor(rows[row]) : 1;
    total += rows[row] / divisor / divisor;
  }
  const double matrix = matrix_norm_divisor(group_sum<kThreads>(total), shape.safety);
  const bool wide = all_aligned(t.x) && t.cols % kWide == 0;
  const int64_t first = (item - t.first_item) * kBlockRows;
  const int64_t end = first + kBlockRows < t.rows ? first + kBlockRows : t.rows;
  for (int64_t row = first + this_warp(); row < end; row += kWarps) {
    const double divisor = shape.row_norm ? row_norm_divisor(rows[row]) : 1;
    const float factor = static_cast<float>(1 / (divisor * matrix));
    const int64_t begin = row * t.cols;
    for_elements(begin, begin + t.cols, wide, this_lane(), kWarp, [&](auto elements, int64_t at) {
      float x[decltype(elements)::count];
      load_floats(t.x, shape.x_dtype, at, x);
#pragma unroll
      for (float& value : x) value *= factor;
      store_floats(x, t.x, shape.x_dtype, at);
    });
  }
}

}  // namespace

const char* muon_momentum(const MuonMomentumShape& shape, const MomentumMatrix* matrices,
                          const UpdateScalars* scalars, const float* norm, double* squares,
                          void* stream) {
  const int count = static_cast<int>(shape.matrices);
  const char* error = for_each_list<Matrices>(matrices, count, shape.rows, [&](const auto& list) {
    return launch(muon_momentum_rows, blocks_for(list.end_item - list.first_item, kWarps), kThreads,
                  stream, list, shape, scalars, norm, squares);
  });
  if (error) return error;
  std::vector<MomentumMatrix> in_blocks(matrices, matrices + count);
  int64_t blocks = 0;
  for (MomentumMatrix& t : in_blocks) {
    t.first_item = blocks;
    blocks += blocks_for(t.rows, kBlockRows);
  }
  return for_each_list<Matrices>(in_blocks.data(), count, blocks, [&](const auto& list) {
    return launch(muon_momentum_scale, list.end_item - list.first_item, kThreads, stream, list,
                  shape, squares);
  });
}

}  // namespace pgolf::cuda
