// The second step of sums over tokens: kernels write a row of sums for each of fixed parts of the
// work, and these rows are added up in one fixed order, so that nothing depends on the GPU's size.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"

namespace pgolf::cuda {

// Of a block: 32 bytes of a row, the least that memory moves. Where there are few, one a block lets
// more multiprocessors than one take part.
constexpr int kSumColumns = 8;

// out[c] = the sum over `rows` of partials (rows, cols)
template <int kColumns>
static __global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(const float* partials, int64_t rows, int64_t cols, float* out) {
  __shared__ float sums[kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kColumns + thread % kColumns;
  float sum = 0;
  if (col < cols) {
#pragma unroll 4
    for (int64_t row = thread / kColumns; row < rows; row += kThreads / kColumns) {
      sum += partials[row * cols + col];
    }
  }
  sums[thread] = sum;
  for (int step = kThreads / 2; step >= kColumns; step /= 2) {
    __syncthreads();
    if (thread < step) sums[thread] += sums[thread + step];
  }
  if (thread < kColumns && col < cols) out[col] = sums[thread];
}

template <int kColumns = kSumColumns>
static inline const char* sum_rows(const float* partials, int64_t rows, int64_t cols, float* out,
                                   void* stream) {
  return launch(sum_rows_kernel<kColumns>, blocks_for(cols, kColumns), kThreads, stream, partials,
                rows, cols, out);
}

}  // namespace pgolf::cuda
