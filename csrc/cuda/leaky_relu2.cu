// leaky_relu2 on a GPU, forward and backward: the formula of leaky_relu2.h. A group of lanes takes
// the 32 elements of one word of signs, 16 bytes a lane, so that no two groups write one word.
#include "leaky_relu2.h"

#include <cuda_runtime.h>

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace pgolf::cuda {
namespace {

template <typename T, int kVector>
struct WordLanes {
  static constexpr int kLanes = kBitsPerWord / kVector;
  using Elements = Row<T, kVector, kLanes, 1>;

  int64_t row, at;  // the row, and the first element of the word
  int size;         // elements of the word

  __device__ WordLanes(const LeakyRelu2Shape& shape, int64_t word) {
    const Divided place = divide(word, sign_words(shape.cols));
    const int64_t first = place.rest * kBitsPerWord;
    const int64_t left = shape.cols - first;
    row = place.quotient;
    at = row * shape.cols + first;
    size = left < kBitsPerWord ? static_cast<int>(left) : kBitsPerWord;
  }

  __device__ float rstd(const LeakyRelu2Shape& shape) const {
    return shape.rstd ? static_cast<const float*>(shape.rstd)[row] : 1.0f;
  }
  // The bit of element i of this lane.
  __device__ static uint32_t bit(int i) { return uint32_t{1} << (Elements::place(0) + i); }
};

// The bits of all lanes of a group.
template <int kLanes>
__device__ inline uint32_t group_or(uint32_t bits) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    bits |= __shfl_xor_sync(group_mask<kLanes>(), bits, step, kLanes);
  }
  return bits;
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    leaky_relu2_words(LeakyRelu2Shape shape, const T* pre, T* post, uint32_t* bits) {
  using Word = WordLanes<T, kVector>;
  const int64_t words = shape.rows * sign_words(shape.cols);
  const float slope = static_cast<float>(shape.slope);
  for (int64_t w = first_item<Word::kLanes>(); w < words; w += item_step<Word::kLanes>()) {
    const Word word(shape, w);
    const float rstd = word.rstd(shape);
    auto x = Word::Elements::load(pre + word.at, word.size);
    uint32_t positive = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float scaled = x.at[i] * rstd;
      positive |= scaled > 0 ? Word::bit(i) : 0;
      x.at[i] = leaky_relu2_value(scaled, slope);
    }
    x.template store<true>(post + word.at, word.size);
    positive = group_or<Word::kLanes>(positive);
    if (group_lane<Word::kLanes>() == 0) bits[w] = positive;
  }
}

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    leaky_relu2_backward_words(LeakyRelu2Shape shape, const T* dpost, const T* post,
                               const uint32_t* bits, T* dpre) {
  using Word = WordLanes<T, kVector>;
  const int64_t words = shape.rows * sign_words(shape.cols);
  const float slope = static_cast<float>(shape.slope);
  for (int64_t w = first_item<Word::kLanes>(); w < words; w += item_step<Word::kLanes>()) {
    const Word word(shape, w);
    const float rstd = word.rstd(shape);
    const uint32_t positive = bits[w];
    const auto value = Word::Elements::load(post + word.at, word.size);
    auto d = Word::Elements::load(dpost + word.at, word.size);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const bool above = (positive & Word::bit(i)) != 0;
      d.at[i] = d.at[i] * leaky_relu2_derivative(value.at[i], above, slope) * rstd;
    }
    d.template store<true>(dpre + word.at, word.size);
  }
}

// Starts the kernel for 16 bytes a lane, or for one element where that cannot be.
template <typename T, typename Kernel, typename... Arguments>
const char* start(const LeakyRelu2Shape& shape, bool vectors, Kernel wide, Kernel narrow,
                  void* stream, Arguments... arguments) {
  constexpr int kVector = kAccessBytes / sizeof(T);
  const int64_t words = shape.rows * sign_words(shape.cols);
  const int64_t per_block = kThreads * (vectors ? kVector : 1) / kBitsPerWord;
  return launch(vectors ? wide : narrow, stepping_blocks(words, per_block), kThreads, stream, shape,
                arguments...);
}

}  // namespace

const char* leaky_relu2(const LeakyRelu2Shape& shape, const void* pre, void* post, uint32_t* bits,
                        void* stream) {
  return with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const bool vectors = aligned({pre, post}, {shape.cols * int64_t{sizeof(T)}});
    return start<T>(shape, vectors, leaky_relu2_words<T, kAccessBytes / sizeof(T)>,
                    leaky_relu2_words<T, 1>, stream, static_cast<const T*>(pre),
                    static_cast<T*>(post), bits);
  });
}

const char* leaky_relu2_backward(const LeakyRelu2Shape& shape, const void* dpost, const void* post,
                                 const uint32_t* bits, void* dpre, void* stream) {
  return with_element(shape.dtype, [&](auto element) {
    using T = decltype(element);
    const bool vectors = aligned({dpost, post, dpre}, {shape.cols * int64_t{sizeof(T)}});
    return start<T>(shape, vectors, leaky_relu2_backward_words<T, kAccessBytes / sizeof(T)>,
                    leaky_relu2_backward_words<T, 1>, stream, static_cast<const T*>(dpost),
                    static_cast<const T*>(post), bits, static_cast<T*>(dpre));
  });
}

}  // namespace pgolf::cuda
