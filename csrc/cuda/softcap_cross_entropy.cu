// softcap_cross_entropy on a GPU: a warp or a block holds a row of logits in registers, where it
// becomes the row of their gradients, which is written over it. Memory is read and written once.
#include "softcap_cross_entropy.h"

#include <cuda_runtime.h>

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace pgolf::cuda {
namespace {

constexpr int kColumns = 1024;  // of a warp
constexpr int kWarps = kThreads / kWarp;
static_assert(kMaxLossColumns == kColumns * kWarps);

// The value of combine(x, y) over the warps of a block, the same in all threads.
template <typename Combine>
__device__ float over_warps(float x, float* shared, const Combine& combine) {
  __syncthreads();  // what was in `shared` is not needed any more
  if (this_lane() == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = shared[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) x = combine(x, shared[warp]);
  return x;
}

// kBlock: a block takes a row, of up to kMaxLossColumns; otherwise each of its warps takes one, of
// up to kColumns.
template <typename T, int kVector, bool kBlock>
__global__ void __launch_bounds__(kThreads)
    softcap_cross_entropy_rows(LossShape shape, T* z, const int64_t* targets, float* losses) {
  using Lanes = Row<T, kVector, kWarp, kColumns / kWarp / kVector>;
  __shared__ float shared[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t row = kBlock ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (row >= shape.rows) return;  // a whole warp, and never one of several that share a row
  const int begin = kBlock ? warp * kColumns : 0;
  const int left = static_cast<int>(shape.cols) - begin;
  const int size = left < 0 ? 0 : left < kColumns ? left : kColumns;
  const float cap = static_cast<float>(shape.cap);
  const auto logit = [=](float x) { return cap == 0 ? x : cap * std::tanh(x / cap); };

  T* const first = z + row * shape.cols + begin;
  const int64_t target = targets[row];
  const bool inside = target >= 0 && target < shape.cols, ignored = target == kIgnoredTarget;
  const float factor = ignored ? 0 : static_cast<float>(shape.factor);
  // (Read before any thread writes: there is a barrier, or the warp's shuffles, in between.)
  const float target_logit = inside ? logit(widen(z[row * shape.cols + target])) : NAN;
  Lanes lanes = Lanes::load(first, size);

  float greatest = -INFINITY;
#pragma unroll
  for (int i = 0; i < Lanes::kCount; ++i) {
    if (Lanes::place(i / kVector) < size && !(lanes.at[i] <= greatest)) greatest = lanes.at[i];
  }
  greatest = group_max<kWarp>(greatest);
  if (kBlock) {
    greatest = over_warps(greatest, shared, [](float x, float y) { return y <= x ? x : y; });
  }
  greatest = logit(greatest);

  float sum = 0;
#pragma unroll
  for (int i = 0; i < Lanes::kCount; ++i) {
    lanes.at[i] = logit(lanes.at[i]);
    if (Lanes::place(i / kVector) < size) sum += std::exp(lanes.at[i] - greatest);
  }
  sum = group_sum<kWarp>(sum);
  if (kBlock) sum = over_warps(sum, shared, [](float x, float y) { return x + y; });

  LossRow<float> result = loss_row(greatest, sum, target_logit, factor);
  if (threadIdx.x % (kBlock ? kThreads : kWarp) == 0) losses[row] = ignored ? 0 : result.loss;
  if (!shape.gradient) return;
  if (!inside && !ignored) result.scale = NAN;
#pragma unroll
  for (int i = 0; i < Lanes::kCount; ++i) {
    const float t = cap == 0 ? 0 : lanes.at[i] / cap;
    const bool hit = begin + Lanes::place(i / kVector) + i % kVector == target;
    const float share = std::exp(lanes.at[i] - greatest) * result.scale;
    lanes.at[i] = (share - (hit ? factor : 0)) * (1 - t * t);
  }
  lanes.store(first, size);
}

}  // namespace

const char* softcap_cross_entropy(const LossShape& shape, void* z, const int64_t* targets,
                                  void* losses, void* stream) {
  return with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kVector = kAccessBytes / sizeof(T);
    const bool vectors = aligned({z}, {shape.cols * int64_t{sizeof(T)}});
    const bool block = shape.cols > kColumns;
    const auto kernel = block ? vectors ? softcap_cross_entropy_rows<T, kVector, true>
                                        : softcap_cross_entropy_rows<T, 1, true>
                        : vectors ? softcap_cross_entropy_rows<T, kVector, false>
                                  : softcap_cross_entropy_rows<T, 1, false>;
    return launch(kernel, block ? shape.rows : blocks_for(shape.rows, kWarps), kThreads, stream,
                  shape, static_cast<T*>(z), targets, static_cast<float*>(losses));
  });
}

}  // namespace pgolf::cuda
