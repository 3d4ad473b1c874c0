// What Muon does before Newton-Schulz, on the CPU: a row at a time.
#include <algorithm>

#include "cpu/numbers.h"
#include "host/parallel.h"
#include "kernels.h"
#include "multi_tensor.h"
#include "newton_schulz.h"
#include "param_update.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

// Writes the row's direction and new momentum; the sum of the direction's squares.
double direct_row(const MuonMomentumShape& shape, const MomentumMatrix& t,
                  const MomentumStep& step, int64_t row) {
  double squares = 0;
  for (int64_t at = row * t.cols, end = at + t.cols; at < end; at += kRun) {
    const int64_t count = std::min(kRun, end - at);
    float x[kRun], buffer[kRun];
    load_run(t.grad, t.grad_dtype, at, count, x);
    load_run(t.momentum, t.momentum_dtype, at, count, buffer);
    for (int64_t i = 0; i < count; ++i) {
      x[i] = muon_direction(step, x[i], shape.nesterov, buffer[i]);
    }
    if (step.stores) store_run(buffer, t.momentum, t.momentum_dtype, at, count);
    store_run(x, t.x, shape.x_dtype, at, count);
    squares += sum_of_squares(x, count);
  }
  return squares;
}

void scale_row(const MomentumMatrix& t, Dtype dtype, float factor, int64_t row) {
  for (int64_t at = row * t.cols, end = at + t.cols; at < end; at += kRun) {
    const int64_t count = std::min(kRun, end - at);
    float x[kRun];
    load_run(t.x, dtype, at, count, x);
    for (int64_t i = 0; i < count; ++i) x[i] *= factor;
    store_run(x, t.x, dtype, at, count);
  }
}

}  // namespace

void muon_momentum(const MuonMomentumShape& shape, const MomentumMatrix* matrices,
                   const UpdateScalars* scalars, const float* norm, float* squares, int threads) {
  if (shape.rows == 0) return;
  const int count = static_cast<int>(shape.matrices);
  const MomentumStep step = momentum_step(*scalars, *norm);
  const int64_t bytes = matrices[0].cols * 16;  // about: the matrices differ
  parallel_for(shape.rows, bytes, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const MomentumMatrix& t = matrices[tensor_of(matrices, count, item)];
      const int64_t row = item - t.first_item;
      double sum = direct_row(shape, t, step, row);
      if (shape.row_norm) {
        scale_row(t, shape.x_dtype, static_cast<float>(row_norm_factor(sum)), row);
      }
      squares[item] = static_cast<float>(sum);
    }
  });
}

}  // namespace pgolf::cpu::PGOLF_ISA
