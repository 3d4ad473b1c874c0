// How the kernels of residual_norm go through rows: which operands one is made for, and when it reads
// them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "cuda/packed.cuh"

namespace pgolf::cuda {
namespace {

// What a call may have, or wants: what it has is a set of these.
enum Operand : unsigned {
  kBranch = 1 << 0,
  kBranchScale = 1 << 1,
  kSkip = 1 << 2,
  kSkipWeight = 1 << 3,
  kMix = 1 << 4,
  kTotal = 1 << 5,  // it, or its gradient
  kXIn = 1 << 6,
  kH = 1 << 7,       // its gradient
  kLearned = 1 << 8,   // total, for the gradient of mix
  kX0 = 1 << 9,        // with its factor; its gradient
  kLearnedX0 = 1 << 10,  // that factor, where the gradient is not left to who made x0
  kTotalScale = 1 << 11,
  kXInScale = 1 << 12
};
// Parameters, whose gradients are sums over tokens. Sums take registers from rows, so one of the two
// gradients for any operands has none of these.
constexpr unsigned kSums = kBranchScale | kSkipWeight | kLearned | kTotalScale | kXInScale;
// Kernels are made for the sets that the layers of a transformer ask for. Those for everything else
// have sets with this mark, and ask each pointer of such a set whether it is there.
constexpr unsigned kTested = 1 << 13;
constexpr unsigned kAny = kTested - 1;

// The blocks that a multiprocessor is to have room for: as many as registers allow without spills.
constexpr int resident_blocks(int vector, int lanes, unsigned set) {
  if (vector == 1) return 1;
  if (set & kTested) return set & kLearned ? 1 : 3;
  return set & (kLearned | kSkip | kXInScale) ? 2 : 3;
}

// How a kernel for the operands kSet goes through rows. One for one set requests all rows before it
// uses any, so that it waits for memory once, and then computes them chunk by chunk; one for any
// set, whose rows would not fit into registers, reads a row where it is used.
template <typename T, int kVector, int kLanes, int kChunks, unsigned kSet>
struct Layout {
  using Element = T;
  static constexpr bool kAhead = (kSet & kTested) == 0;
  static constexpr bool kPrefetches = kAhead && (kSet & kLearned) == 0;
  static constexpr int kParts = kAhead ? kChunks : 1;
  using Part = Row<T, kVector, kLanes, kChunks / kParts>;
  using Words = Vector<uint32_t, kAccessBytes / sizeof(uint32_t)>;
  static_assert(!kAhead || std::is_same_v<T, bf16>);

  // Whether there is this operand, or output, whose pointer is null if it is tested and not there.
  template <unsigned kOperand>
  __device__ static bool has(const void* pointer) {
    if constexpr ((kSet & kOperand) == 0) return false;
    if constexpr (kAhead) return true;
    return pointer != nullptr;
  }

  // Where this lane's elements of a part begin. What lies beyond the row is read from the row's end:
  // that needs no condition, and no zeros.
  __device__ static int place(int part) { return part * kLanes * Part::kCount + Part::place(0); }
  __device__ static unsigned place_within(int part, int size) {
    const int last = size - kVector;
    return static_cast<unsigned>(place(part) < last ? place(part) : last);
  }

  // Floats at the places of a part. They are read anew for every row, as a store may be to the same
  // address: kept, they would take registers from rows.
  __device__ static Part floats(const float* from, int part, int size) {
    if constexpr (kAhead) {
      unsigned first = place_within(part, size);
#if defined(__CUDA_ARCH__)
      asm volatile("" : "+r"(first));  // nor are their addresses kept
#endif
      using Four = Vector<float, 4>;
      Part row;
#pragma unroll
      for (unsigned i = 0; i < kVector; i += 4) {
        const auto four = *reinterpret_cast<const Four*>(from + first + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) row.at[i + j] = four.at[j];
      }
      return row;
    } else {
      return Part::load_floats(from, size);
    }
  }

  // What this lane adds to the inner product of two rows by these parts of them.
  __device__ static float dot(const Part& x, const Part& y, int part, int size) {
    const float sum = x.lane_dot(y);
    return !kAhead || place(part) < size ? sum : 0.0f;
  }

  __device__ static void store(const Part& row, T* to, int part, int size) {
    if constexpr (kAhead) {
      Vector<T, kVector> rounded;
#pragma unroll
      for (int i = 0; i < kVector; ++i) rounded.at[i] = narrow<T>(row.at[i]);
      store_global_if(place(part) < size, rounded, to + place_within(part, size));
    } else {
      row.store(to, size);
    }
  }
};

// A row of a tensor that there may be.
template <typename L>
class Source {
 public:
  Source() = default;
  // The row that begins at element `at`, if the tensor is there.
  __device__ Source(const typename L::Element* tensor, int64_t at, int size, bool there)
      : tensor_(tensor), at_(at), size_(size) {
    if constexpr (L::kAhead) {
      if (!there) return;
#pragma unroll
      for (int i = 0; i < L::kParts; ++i) {
        words_[i] = load_constant<typename L::Words>(tensor + at + L::place_within(i, size));
      }
    }
  }

  __device__ typename L::Part part(int index) const {
    if constexpr (L::kAhead) {
      typename L::Part part;
#pragma unroll
      for (int i = 0; i < L::Part::kCount; ++i) {
        part.at[i] = widened<typename L::Element>(words_[index], i);
      }
      return part;
    } else {
      return L::Part::load(tensor_ + at_, size_);
    }
  }

  // The same for a use before others. By instructions of its own, as the compiler would keep what it
  // converted for the others, in twice as many registers.
  __device__ typename L::Part part_beforehand(int index) const {
#if defined(__CUDA_ARCH__)
    if constexpr (L::kAhead) {
      typename L::Part part;
#pragma unroll
      for (int i = 0; i < L::Part::kCount; ++i) {
        uint32_t bits;
        asm("prmt.b32 %0, %1, 0, %2;"
            : "=r"(bits)
            : "r"(words_[index].at[i / 2]), "r"(i % 2 ? 0x3244 : 0x1044));
        part.at[i] = bit_cast<float>(bits);
      }
      return part;
    }
#endif
    return part(index);
  }

 private:
  const typename L::Element* tensor_;
  int64_t at_;
  int size_;
  typename L::Words words_[L::kParts];  // (Of bf16, each would be kept in a register of its own.)
};

// What the rows of a group of lanes add to the gradient of a parameter.
template <typename L, int kLanes>
struct Sum {
  typename L::Part parts[L::kParts];

  __device__ Sum() {
#pragma unroll
    for (auto& part : parts) part = L::Part::zero();
  }

  // to[c] = the sum over the block's groups of column c.
  __device__ void store(int size, float* to) const {
    constexpr int kWidth = kLanes * L::kParts * L::Part::kCount;
    __shared__ float sums[kThreads / kLanes * kWidth];
    const int thread = static_cast<int>(threadIdx.x);
    __syncthreads();  // the sums before these have been read
#pragma unroll
    for (int i = 0; i < L::kParts; ++i) {
      parts[i].store_floats(sums + thread / kLanes * kWidth + L::place(i) - L::Part::place(0));
    }
    __syncthreads();
    for (int col = thread; col < size; col += kThreads) {
      float total = 0;
      for (int first = 0; first < kThreads / kLanes * kWidth; first += kWidth) {
        total += sums[first + col];
      }
      to[col] = total;
    }
  }
};

}  // namespace
}  // namespace pgolf::cuda
