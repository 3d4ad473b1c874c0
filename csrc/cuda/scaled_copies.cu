// scaled_copies on a GPU: a group of threads takes a row, each of them a few columns, for which it keeps
// the sums of all copies in registers.
#include "scaled_copies.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace pgolf::cuda {
namespace {

constexpr int kMost = 12;                    // copies of one launch
constexpr int kGroup = 64;                   // threads that share a row
constexpr int kGroups = kThreads / kGroup;   // of a block

template <typename T>
struct Copies {
  const T* gradients[kMost];  // null where there is none
  const T* x;
  const float* factors;  // of the first of them
  T* dx;
  float* partials;  // likewise
  int64_t rows, width;
  int64_t parts, part_numbers;  // of all launches
  int count;
  bool adds;  // to what the launch before left in dx
};

// The sums of a block's groups for one copy, added up.
template <int kVector>
__device__ void store_sums(const float (&sums)[kVector], int columns, float* to) {
  __shared__ float of_groups[kGroups][kGroup * kVector];
  const int thread = static_cast<int>(threadIdx.x);
  __syncthreads();  // those before these have been read
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    of_groups[thread / kGroup][thread % kGroup * kVector + j] = sums[j];
  }
  __syncthreads();
  for (int col = thread; col < columns; col += kThreads) {
    float total = 0;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) total += of_groups[group][col];
    to[col] = total;
  }
}

// A block takes a part of the rows, and as many columns as its groups have room for.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) scaled_copies_backward_rows(Copies<T> copies) {
  constexpr int kColumns = kGroup * kVector;
  using Some = Vector<T, kVector>;
  __shared__ float factors[kMost][kColumns];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t part = blockIdx.x % copies.parts;
  const int64_t first = blockIdx.x / copies.parts * kColumns;
  const int64_t left = copies.width - first;
  const int columns = static_cast<int>(left < kColumns ? left : kColumns);
  for (int i = 0; i < copies.count; ++i) {
    for (int col = thread; col < columns; col += kThreads) {
      factors[i][col] = copies.factors[i * copies.width + first + col];
    }
  }
  __syncthreads();
  using Sums = float[kMost][kVector];
  Sums sums = {};
  const int own = thread % kGroup * kVector;
  if (own < columns) {
    const int64_t step = copies.parts * kGroups;
    for (int64_t row = part * kGroups + thread / kGroup; row < copies.rows; row += step) {
      const int64_t at = row * copies.width + first + own;
      const Some x = *reinterpret_cast<const Some*>(copies.x + at);
      Some given[kMost];
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        given[i] = {};
        if (copies.gradients[i] != nullptr) {
          given[i] = *reinterpret_cast<const Some*>(copies.gradients[i] + at);
        }
      }
      float dx[kVector] = {};
      if (copies.adds) {
        const Some before = *reinterpret_cast<const Some*>(copies.dx + at);
#pragma unroll
        for (int j = 0; j < kVector; ++j) dx[j] = widen(before.at[j]);
      }
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (copies.gradients[i] == nullptr) continue;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          const float g = widen(given[i].at[j]);
          dx[j] += factors[i][own + j] * g;
          sums[i][j] += g * widen(x.at[j]);
        }
      }
      Some rounded;
#pragma unroll
      for (int j = 0; j < kVector; ++j) rounded.at[j] = narrow<T>(dx[j]);
      *reinterpret_cast<Some*>(copies.dx + at) = rounded;
    }
  }
#pragma unroll
  for (int i = 0; i < kMost; ++i) {
    if (i < copies.count) {
      const int64_t to = part * copies.part_numbers + i * copies.width + first;
      store_sums<kVector>(sums[i], columns, copies.partials + to);
    }
  }
}

template <typename T, int kVector>
const char* launch_rows(const Copies<T>& copies, void* stream) {
  const int64_t tiles = blocks_for(copies.width, kGroup * kVector);
  return launch(scaled_copies_backward_rows<T, kVector>, copies.parts * tiles, kThreads, stream,
                copies);
}

}  // namespace

const char* scaled_copies_backward(const ScaledCopiesShape& shape, const ScaledCopiesInputs& in,
                                   const void* const* gradients, void* dx, void* partials,
                                   void* stream) {
  return with_element(shape.dtype, [&](auto element) -> const char* {
    using T = decltype(element);
    constexpr int kVector = kAccessBytes / sizeof(T);
    for (int begin = 0; begin == 0 || begin < shape.count; begin += kMost) {
      Copies<T> copies = {};
      copies.count = std::min(kMost, shape.count - begin);
      bool vectors = aligned({in.x, dx}, {shape.width * int64_t{sizeof(T)}});
      for (int i = 0; i < copies.count; ++i) {
        copies.gradients[i] = static_cast<const T*>(gradients[begin + i]);
        vectors = vectors && aligned({copies.gradients[i]}, {});
      }
      copies.x = static_cast<const T*>(in.x);
      copies.factors = static_cast<const float*>(in.factors) + begin * shape.width;
      copies.dx = static_cast<T*>(dx);
      copies.partials = static_cast<float*>(partials) + begin * shape.width;
      copies.rows = shape.rows;
      copies.width = shape.width;
      copies.parts = copies_parts(shape.rows).count;
      copies.part_numbers = shape.count * shape.width;
      copies.adds = begin > 0;
      const char* error =
          vectors ? launch_rows<T, kVector>(copies, stream) : launch_rows<T, 1>(copies, stream);
      if (error) return error;
    }
    return nullptr;
  });
}

}  // namespace pgolf::cuda
