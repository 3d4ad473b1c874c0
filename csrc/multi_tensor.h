// Passes over many tensors in one launch, for CPU and GPU: each tensor is cut into items (chunks of
// kChunk numbers, or rows) that are numbered through all of them. A description of a tensor holds
// the number of its first item.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "kernels.h"

namespace pgolf {

// Whether a number is neither infinite nor NaN.
PGOLF_HOST_DEVICE static inline bool is_finite(float x) { return x - x == 0; }

// Of grad_norm; contiguous, fp32 or bf16, as those of the other passes are.
struct GradientTensor {
  const void* data;
  int64_t count;
  int64_t first_item;  // chunks
  Dtype dtype;
};

constexpr int64_t kChunk = 4096;

PGOLF_HOST_DEVICE static inline int64_t chunks_of(int64_t count) {
  return count / kChunk + (count % kChunk != 0);
}

// Which of `count` tensors an item belongs to: the last one that begins at it or before. (One
// without items begins where the next one does.)
template <typename Tensor>
PGOLF_HOST_DEVICE static inline int tensor_of(const Tensor* tensors, int count, int64_t item) {
  int low = 0;
  for (int high = count; high - low > 1;) {
    const int middle = (low + high) / 2;
    if (tensors[middle].first_item <= item) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace pgolf
