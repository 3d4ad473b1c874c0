// The norm of all gradients on the CPU: a sum for each chunk, then the sums in their order.
#include <algorithm>
#include <cmath>

#include "cpu/numbers.h"
#include "host/parallel.h"
#include "kernels.h"
#include "multi_tensor.h"

namespace pgolf::cpu::PGOLF_ISA {
namespace {

int64_t not_finite(const float* x, int64_t count) {
  int bad = 0;
  for (int64_t i = 0; i < count; ++i) bad += !is_finite(x[i]);
  return bad;
}

void sum_chunk(const GradientTensor& t, int64_t chunk, double& squares, double& bad) {
  const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, t.count);
  squares = bad = 0;
  for (int64_t at = begin; at < end; at += kRun) {
    const int64_t count = std::min(kRun, end - at);
    float x[kRun];
    load_run(t.data, t.dtype, at, count, x);
    squares += sum_of_squares(x, count);
    bad += static_cast<double>(not_finite(x, count));
  }
}

}  // namespace

void grad_norm(const GradientTensor* tensors, int count, int64_t chunks, double* partials,
               float* norm, int64_t* bad, int threads) {
  parallel_for(chunks, kChunk * int64_t{sizeof(float)}, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const GradientTensor& t = tensors[tensor_of(tensors, count, item)];
      sum_chunk(t, item - t.first_item, partials[item], partials[chunks + item]);
    }
  });
  double squares = 0, found = 0;
  for (int64_t item = 0; item < chunks; ++item) {
    squares += partials[item];
    found += partials[chunks + item];
  }
  *norm = static_cast<float>(std::sqrt(squares));
  *bad = static_cast<int64_t>(found);
}

}  // namespace pgolf::cpu::PGOLF_ISA
