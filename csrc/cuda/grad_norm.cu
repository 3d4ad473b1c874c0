// The norm of all gradients on a GPU: a block sums a chunk, each thread in float and the block in
// double; then one block sums the chunks in their order.
#include <cmath>

#include "cuda/multi_tensor.cuh"
#include "multi_tensor.h"

namespace pgolf::cuda {
namespace {

__global__ void __launch_bounds__(kThreads)
    grad_norm_chunks(TensorList<GradientTensor> list, int64_t chunks, double* partials) {
  __shared__ double room[kThreads];
  const int64_t item = list.first_item + blockIdx.x;
  const GradientTensor t = list.tensors[tensor_of(list.tensors, list.count, item)];
  const int64_t begin = (item - t.first_item) * kChunk;
  const int64_t end = begin + kChunk < t.count ? begin + kChunk : t.count;
  float squares = 0;
  int bad = 0;
  for_elements(begin, end, all_aligned(t.data), static_cast<int>(threadIdx.x), kThreads,
               [&](auto elements, int64_t at) {
                 float x[decltype(elements)::count];
                 load_floats(t.data, t.dtype, at, x);
#pragma unroll
                 for (float value : x) {
                   squares += value * value;
                   bad += value - value == 0 ? 0 : 1;
                 }
               });
  const double sum = block_sum(squares, room);
  const double found = block_sum(bad, room);
  if (threadIdx.x == 0) {
    partials[item] = sum;
    partials[chunks + item] = found;
  }
}

__global__ void __launch_bounds__(kThreads)
    grad_norm_finish(const double* partials, int64_t chunks, float* norm, int64_t* bad) {
  __shared__ double room[kThreads];
  double squares = 0, found = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) {
    squares += partials[i];
    found += partials[chunks + i];
  }
  squares = block_sum(squares, room);
  found = block_sum(found, room);
  if (threadIdx.x == 0) {
    *norm = static_cast<float>(std::sqrt(squares));
    *bad = static_cast<int64_t>(found);
  }
}

}  // namespace

const char* grad_norm(const GradientTensor* tensors, int count, int64_t chunks, double* partials,
                      float* norm, int64_t* bad, void* stream) {
  const char* error = for_each_list<TensorList<GradientTensor>>(tensors, count, chunks, [&](const auto& list) {
    return launch(grad_norm_chunks, list.end_item - list.first_item, kThreads, stream, list, chunks,
                  partials);
  });
  if (error) return error;
  return launch(grad_norm_finish, 1, kThreads, stream, partials, chunks, norm, bad);
}

}  // namespace pgolf::cuda
