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

// Within 1 unit in the last place. (A division that rounds correctly calls a function for numbers
// that are no factor of a row, and puts registers into memory for it.)
__device__ inline float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    token_sums_columns(TokenSumsShape shape, uint32_t items, const int32_t* __restrict__ order,
                       const int32_t* __restrict__ bounds, const T* __restrict__ x,
                       const float* __restrict__ divisors, T* __restrict__ sums) {
  using Columns = Row<T, kVector, kLanes, 1>;
  constexpr int kColumns = kLanes * kVector;
  constexpr int kAtOnce = kVector > 1 ? 4 : 1;  // rows on their way
  __shared__ float parts[kStreams][kColumns];
  const int thread = static_cast<int>(threadIdx.x), stream = thread / kLanes;
  const auto of_row = static_cast<uint32_t>((shape.width - 1) / kColumns + 1);
  for (uint32_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t id = item / of_row;
    const int64_t column = int64_t{item % of_row} * kColumns, left = shape.width - column;
    const int size = static_cast<int>(left < kColumns ? left : kColumns);
    const int64_t begin = int64_t{bounds[id]} + stream, end = bounds[id + 1];
    Columns sum = Columns::zero();
#pragma unroll kAtOnce
    for (int64_t i = begin; i < end; i += kStreams) {
      const int64_t token = order[i];
      const float factor = divisors ? reciprocal(divisors[token]) : 1.0f;
      sum = sum.plus(factor, Columns::load(x + token * shape.stride + column, size));
    }
    __syncthreads();  // the parts of the item before have been read
    sum.store_floats(parts[stream]);
    __syncthreads();
    if (thread < size) {
      float total = 0;
      for (int i = 0; i < kStreams; ++i) total += parts[i][thread];
      sums[id * shape.width + column + thread] = narrow<T>(total);
    }
  }
}

}  // namespace

const char* token_sums(const TokenSumsShape& shape, const TokenOrder& tokens, const void* x,
                       const void* divisors, void* sums, void* stream) {
  if (shape.width == 0) return nullptr;
  return with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const auto start = [&](auto vector) -> const char* {
      constexpr int kVector = decltype(vector)::value;
      const int64_t items = shape.vocab * blocks_for(shape.width, kLanes * kVector);
      if (items > INT32_MAX) return "more sums than a grid of blocks can take";
      return launch(token_sums_columns<T, kVector>, stepping_blocks(items, 1), kThreads, stream,
                    shape, static_cast<uint32_t>(items), tokens.order, tokens.bounds,
                    static_cast<const T*>(x), static_cast<const float*>(divisors),
                    static_cast<T*>(sums));
    };
    const int64_t bytes = sizeof(T);
    const bool vectors = aligned({x}, {shape.stride * bytes, shape.width * bytes});
    return vectors ? start(Constant<kAccessBytes / sizeof(T)>{}) : start(Constant<1>{});
  });
}

}  // namespace pgolf::cuda
