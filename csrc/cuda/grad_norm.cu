// The norm of all gradients on a GPU: a block sums a chunk, each thread in float and the block in
// double; then one block sums the chunks in their order.
#include <cmath>

#include "cuda/multi_tensor.cuh"
#include "multi_tensor.h"

namespace pgolf::cuda {
namespace {

// Both sums over a block, in its first thread: within warps, then the warps' in their order. Once in
// a kernel: nothing keeps a second call from writing over what the first thread has yet to read.
template <typename Count>
__device__ inline void sum_in_first(double& squares, Count& bad) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ double squares_of[kWarps];
  __shared__ Count bad_of[kWarps];
  squares = group_sum<kWarp>(squares);
  bad = group_sum<kWarp>(bad);
  if (this_lane() == 0) {
    squares_of[threadIdx.x / kWarp] = squares;
    bad_of[threadIdx.x / kWarp] = bad;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) {
    squares += squares_of[warp];
    bad += bad_of[warp];
  }
}

__global__ void __launch_bounds__(kThreads)
    grad_norm_chunks(TensorList<GradientTensor> list, int64_t chunks, double* partials) {
  const int64_t item = list.first_item + blockIdx.x;
  const GradientTensor t = list.tensors[tensor_of(list.tensors, list.count, item)];
  const int64_t begin = (item - t.first_item) * kChunk;
  const int64_t end = begin + kChunk < t.count ? begin + kChunk : t.count;
  const auto for_values = [&](const auto& take) {
    for_elements(begin, end, all_aligned(t.data), static_cast<int>(threadIdx.x), kThreads,
                 [&](auto elements, int64_t at) {
                   float x[decltype(elements)::count];
                   load_floats(t.data, t.dtype, at, x);
#pragma unroll
                   for (float value : x) take(value);
                 });
  };
  float squares = 0;
  for_values([&](float value) { squares += value * value; });
  // A sum that is finite has nothing else in it; one that is not may only be too large.
  int bad = 0;
  if (!is_finite(squares)) for_values([&](float value) { bad += is_finite(value) ? 0 : 1; });
  double sum = squares;
  sum_in_first(sum, bad);
  if (threadIdx.x == 0) {
    partials[item] = sum;
    partials[chunks + item] = bad;
  }
}

__global__ void __launch_bounds__(kThreads)
    grad_norm_finish(const double* partials, int64_t chunks, float* norm, int64_t* bad) {
  double squares = 0, found = 0;
  for (int64_t i = threadIdx.x; i < chunks; i += kThreads) {
    squares += partials[i];
    found += partials[chunks + i];
  }
  sum_in_first(squares, found);
  if (threadIdx.x == 0) {
    *norm = static_cast<float>(std::sqrt(squares));
    *bad = static_cast<int64_t>(found);
  }
}

}  // namespace

const char* grad_norm(const GradientTensor* tensors, int count, int64_t chunks, double* partials,
                      float* norm, int64_t* bad, void* stream) {
  using List = TensorList<GradientTensor>;
  const char* error = for_each_list<List>(tensors, count, chunks, [&](const auto& list) {
    return launch(grad_norm_chunks, list.end_item - list.first_item, kThreads, stream, list, chunks,
                  partials);
  });
  if (error) return error;
  return launch(grad_norm_finish, 1, kThreads, stream, partials, chunks, norm, bad);
}

}  // namespace pgolf::cuda
