// token_sums on a GPU: a block takes some columns of an id, a group of lanes each kStreams-th of its
// tokens, so that a frequent id has many rows on their way. All sums are in one order.
#include "token_sums.h"

#include <cuda_runtime.h>

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace pgolf::cuda {
namespace {

constexpr int kLanes = 8;  // 128 bytes of a row
constexpr int kStreams = kThreads / kLanes;

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    token_sums_columns(TokenSumsShape shape, const int64_t* __restrict__ order,
                       const int64_t* __restrict__ bounds, const T* __restrict__ x,
                       const float* __restrict__ divisors, T* __restrict__ sums) {
  using Columns = Row<T, kVector, kLanes, 1>;
  constexpr int kColumns = kLanes * kVector;
  __shared__ float parts[kStreams][kColumns];
  const int thread = static_cast<int>(threadIdx.x), stream = thread / kLanes;
  const int64_t of_row = (shape.width - 1) / kColumns + 1;
  for (int64_t item = blockIdx.x; item < shape.vocab * of_row; item += gridDim.x) {
    const Divided place = divide(item, of_row);
    const int64_t column = place.rest * kColumns, left = shape.width - column;
    const int size = static_cast<int>(left < kColumns ? left : kColumns);
    const int64_t end = bounds[place.quotient + 1];
    Columns sum = Columns::zero();
#pragma unroll 4
    for (int64_t i = bounds[place.quotient] + stream; i < end; i += kStreams) {
      const int64_t token = order[i];
      const float factor = divisors ? 1.0f / divisors[token] : 1.0f;
      sum = sum.plus(factor, Columns::load(x + token * shape.stride + column, size));
    }
    __syncthreads();  // the parts of the item before have been read
    sum.store_floats(parts[stream]);
    __syncthreads();
    if (thread < size) {
      float total = 0;
      for (int i = 0; i < kStreams; ++i) total += parts[i][thread];
      sums[place.quotient * shape.width + column + thread] = narrow<T>(total);
    }
  }
}

}  // namespace

const char* token_sums(const TokenSumsShape& shape, const TokenOrder& tokens, const void* x,
                       const void* divisors, void* sums, void* stream) {
  if (shape.width == 0) return nullptr;
  return with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const auto start = [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      const int64_t items = shape.vocab * blocks_for(shape.width, kLanes * kVector);
      return launch(token_sums_columns<T, kVector>, stepping_blocks(items, 1), kThreads, stream,
                    shape, tokens.order, tokens.bounds, static_cast<const T*>(x),
                    static_cast<const float*>(divisors), static_cast<T*>(sums));
    };
    const int64_t bytes = sizeof(T);
    const bool vectors = aligned({x}, {shape.stride * bytes, shape.width * bytes});
    return vectors ? start(Constant<kAccessBytes / sizeof(T)>{}) : start(Constant<1>{});
  });
}

}  // namespace pgolf::cuda
