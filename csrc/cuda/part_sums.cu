// part_sums on a GPU: a block takes a few columns of a matrix, each of its threads every so many rows.
#include "part_sums.h"

#include "cuda/multi_tensor.cuh"

namespace pgolf::cuda {
namespace {

constexpr int kColumns = kPartSumsColumns;
constexpr int kRows = kThreads / kColumns;  // that a block reads at once

using List = TensorList<PartSumsMatrix, 64>;  // a model has fewer vectors

template <typename T>
__global__ void __launch_bounds__(kThreads) part_sums_columns(List list) {
  __shared__ float sums[kThreads];
  const int64_t item = list.first_item + blockIdx.x;
  const PartSumsMatrix m = list.tensors[tensor_of(list.tensors, list.count, item)];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t col = (item - m.first_item) * kColumns + thread % kColumns;
  const T* const parts = static_cast<const T*>(m.parts);
  float sum = 0;
  if (col < m.cols) {
#pragma unroll 4
    for (int64_t row = thread / kColumns; row < m.rows; row += kRows) {
      sum += widen(parts[row * m.cols + col]);
    }
  }
  sums[thread] = sum;
  for (int step = kThreads / 2; step >= kColumns; step /= 2) {
    __syncthreads();
    if (thread < step) sums[thread] += sums[thread + step];
  }
  if (thread < kColumns && col < m.cols) static_cast<T*>(m.sums)[col] = narrow<T>(sums[thread]);
}

}  // namespace

const char* part_sums(const PartSumsMatrix* matrices, int count, int64_t items, Dtype dtype,
                      void* stream) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    return for_each_list<List>(matrices, count, items, [&](const auto& list) {
      return launch(part_sums_columns<T>, list.end_item - list.first_item, kThreads, stream, list);
    });
  });
}

}  // namespace pgolf::cuda
