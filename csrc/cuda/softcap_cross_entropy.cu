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

// 2^x and 1 / x by an instruction each, which may be off by 2 units in the last place, and by 1.
__device__ inline float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}
__device__ inline float fast_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

// A curve: where on it the cap puts a z, and of a place exp(l - m), m being the l of another place,
// and dl/dz. This one is for any cap, and for none, in full accuracy; its places are logits.
struct AnyCap {
  static constexpr bool kBounded = false;
  float cap;

  __device__ float place(float z) const { return cap == 0 ? z : cap * std::tanh(z / cap); }
  __device__ float power(float l, float origin) const { return std::exp(l - origin); }
  __device__ float slope(float l) const {
    const float t = cap == 0 ? 0 : l / cap;
    return 1 - t * t;
  }
};

// For z that were rounded to bf16, beside which its error in l is small: some 1e-7 cap. A place is
//   r = 1 / (1 + exp(2 z / cap));   tanh(z / cap) = 1 - 2 r,   dl/dz = 4 (r - r^2)
// so that l - m = 2 cap (origin - r). m need not be the greatest: powers lie between exp(-2 cap)
// and exp(2 cap), and of the caps that it takes not even kMaxLossColumns of them leave a float.
struct BoundedCap {
  static constexpr bool kBounded = true;
  float rate, width;  // of the exponents of 2: 2 log2(e) / cap, and 2 cap log2(e)

  explicit BoundedCap(double cap)
      : rate(static_cast<float>(2 * kLog2E / cap)), width(static_cast<float>(2 * kLog2E * cap)) {}
  static bool takes(double cap) { return cap >= 1 && cap <= 32; }

  __device__ float place(float z) const { return fast_reciprocal(1 + fast_exp2(z * rate)); }
  __device__ float power(float r, float origin) const { return fast_exp2((origin - r) * width); }
  __device__ float slope(float r) const { return 4 * (r - r * r); }

 private:
  static constexpr double kLog2E = 1.4426950408889634;
};

// kBlock: a block takes a row, of up to kMaxLossColumns; otherwise each of its warps takes one, of
// up to kColumns.
template <typename T, int kVector, bool kBlock, typename Curve>
__global__ void __launch_bounds__(kThreads)
    softcap_cross_entropy_rows(LossShape shape, Curve curve, T* z, const int64_t* targets,
                               float* losses) {
  using Lanes = Row<T, kVector, kWarp, kColumns / kWarp / kVector>;
  constexpr int kGroup = kBlock ? kThreads : kWarp;  // that takes a row
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t row = kBlock ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (row >= shape.rows) return;  // a whole warp, and never one of several that share a row
  const int begin = kBlock ? warp * kColumns : 0;
  const int left = static_cast<int>(shape.cols) - begin;
  const int size = left < 0 ? 0 : left < kColumns ? left : kColumns;
  T* const first = z + row * shape.cols;
  Lanes lanes = Lanes::load(first + begin, size);
  __syncwarp();  // all loads of the row go out before one is waited for, which is the target's
  const int64_t target = targets[row];
  const bool inside = target >= 0 && target < shape.cols, ignored = target == kIgnoredTarget;
  const float factor = ignored ? 0 : static_cast<float>(shape.factor);
  // (Read before any thread writes: there is a barrier, or the warp's shuffles, in between.)
  const float target_place = curve.place(inside ? widen(first[target]) : 0);

  // (A target's loss is never below 0 so: the sum has its own power in it, which is 1.)
  float origin = target_place;
  if constexpr (!Curve::kBounded) {
    float greatest = -INFINITY;
#pragma unroll
    for (int i = 0; i < Lanes::kCount; ++i) {
      if (Lanes::place(i / kVector) < size && !(lanes.at[i] <= greatest)) greatest = lanes.at[i];
    }
    origin = curve.place(group_max<kGroup>(greatest));
  }

  float sum = 0;
#pragma unroll
  for (int i = 0; i < Lanes::kCount; ++i) {
    const float place = curve.place(lanes.at[i]), power = curve.power(place, origin);
    if (Lanes::place(i / kVector) < size) sum += power;
    lanes.at[i] = power * curve.slope(place);
  }
  sum = group_sum<kGroup>(sum);

  const int thread = group_lane<kGroup>();
  LossRow<float> result = loss_row(origin, sum, target_place, factor);
  if (ignored) result.loss = 0;
  if (!inside && !ignored) result.loss = result.scale = NAN;
  if (thread == 0) losses[row] = result.loss;
  if (!shape.gradient) return;
#pragma unroll
  for (int i = 0; i < Lanes::kCount; ++i) lanes.at[i] *= result.scale;
  lanes.store(first + begin, size);
  // The target's own gradient comes over what the same thread has just stored there.
  const int at = static_cast<int>(target);
  const int owner = at / kColumns * kWarp + at % kColumns / kVector % kWarp;
  if (inside && thread == owner) {
    const float share = curve.power(target_place, origin) * result.scale;
    first[target] = narrow<T>((share - factor) * curve.slope(target_place));
  }
}

template <typename T, typename Curve>
const char* launch_rows(const LossShape& shape, const Curve& curve, void* z, const int64_t* targets,
                        void* losses, void* stream) {
  constexpr int kVector = kAccessBytes / sizeof(T);
  const bool vectors = aligned({z}, {shape.cols * int64_t{sizeof(T)}});
  const bool block = shape.cols > kColumns;
  const auto kernel = block ? vectors ? softcap_cross_entropy_rows<T, kVector, true, Curve>
                                      : softcap_cross_entropy_rows<T, 1, true, Curve>
                      : vectors ? softcap_cross_entropy_rows<T, kVector, false, Curve>
                                : softcap_cross_entropy_rows<T, 1, false, Curve>;
  return launch(kernel, block ? shape.rows : blocks_for(shape.rows, kWarps), kThreads, stream,
                shape, curve, static_cast<T*>(z), targets, static_cast<float*>(losses));
}

}  // namespace

const char* softcap_cross_entropy(const LossShape& shape, void* z, const int64_t* targets,
                                  void* losses, void* stream) {
  if (shape.dtype == Dtype::bf16 && BoundedCap::takes(shape.cap)) {
    return launch_rows<bf16>(shape, BoundedCap(shape.cap), z, targets, losses, stream);
  }
  return with_element(shape.dtype, [&](auto element) {
    const AnyCap curve{static_cast<float>(shape.cap)};
    return launch_rows<decltype(element)>(shape, curve, z, targets, losses, stream);
  });
}

}  // namespace pgolf::cuda
