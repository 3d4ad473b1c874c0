// What the CUDA kernels share on the device: 16-byte accesses, groups of lanes, sums over them.
//
// A row of numbers lies across a group of kLanes lanes (a power of two), kVector elements at a time:
// element (chunk kLanes + lane) kVector + i is number chunk kVector + i of its lane. Groups within a
// warp do not wait for each other, so those of one warp may take different ways; a group of more
// lanes is a whole block of kLanes threads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "element.h"

namespace pgolf::cuda {

constexpr int kWarp = 32;
constexpr int kAccessBytes = 16;  // the widest that a lane moves at once

// kCount elements that are read or written by one instruction.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T at[kCount];
};

// Writes them to global memory at once. (An assignment is no order: nvcc takes a vector apart whose
// elements come from branches, and then stores them one by one.)
template <typename T, int kCount>
__device__ inline void store_global(const Vector<T, kCount>& from, T* to) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(from) == kAccessBytes) {
    const auto words = bit_cast<Vector<uint32_t, 4>>(from);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(words.at[0]), "r"(words.at[1]), "r"(words.at[2]), "r"(words.at[3])
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Vector<T, kCount>*>(to) = from;
}

// The same where `wanted`, without a branch.
template <typename T, int kCount>
__device__ inline void store_global_if(bool wanted, const Vector<T, kCount>& from, T* to) {
  static_assert(sizeof(from) == kAccessBytes);
#if defined(__CUDA_ARCH__)
  const auto words = bit_cast<Vector<uint32_t, 4>>(from);
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.b32 wanted, %5, 0;\n\t"
      "@wanted st.global.v4.b32 [%0], {%1, %2, %3, %4};\n\t}" ::"l"(__cvta_generic_to_global(to)),
      "r"(words.at[0]), "r"(words.at[1]), "r"(words.at[2]), "r"(words.at[3]),
      "r"(static_cast<int>(wanted))
      : "memory");
#else
  if (wanted) *reinterpret_cast<Vector<T, kCount>*>(to) = from;
#endif
}

// Reads 16 bytes of global memory that no kernel writes meanwhile: no store of this kernel holds the
// read up, as it would if it could be to the same address.
template <typename To>
__device__ inline To load_constant(const void* from) {
  static_assert(sizeof(To) == kAccessBytes);
  return bit_cast<To>(__ldg(static_cast<const uint4*>(from)));
}

__device__ inline int this_lane() { return static_cast<int>(threadIdx.x) % kWarp; }

// This thread's place in its group, and the mask of the group's lanes in the warp.
template <int kLanes>
__device__ inline int group_lane() {
  return static_cast<int>(threadIdx.x) % kLanes;
}
template <int kLanes>
__device__ inline unsigned group_mask() {
  static_assert(kLanes <= kWarp);
  constexpr unsigned kAll = kLanes == kWarp ? ~0u : (1u << (kLanes % kWarp)) - 1;
  return kAll << (this_lane() - group_lane<kLanes>());
}

// combine(x, y) over what the lanes of a group have, the same bits in each of them. `kTogether`: all
// lanes of the warp are here, whichever groups they are of.
template <int kLanes, bool kTogether, typename F, typename Combine>
__device__ inline F over_group(F x, const Combine& combine) {
  if constexpr (kLanes > kWarp) {
    __shared__ F of_warps[kLanes / kWarp];
    x = over_group<kWarp, true>(x, combine);
    __syncthreads();  // those before these have been read
    if (this_lane() == 0) of_warps[threadIdx.x / kWarp] = x;
    __syncthreads();
    x = of_warps[0];
#pragma unroll
    for (int i = 1; i < kLanes / kWarp; ++i) x = combine(x, of_warps[i]);
  } else {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      const unsigned lanes = kTogether ? ~0u : group_mask<kLanes>();
      x = combine(x, __shfl_xor_sync(lanes, x, step, kLanes));
    }
  }
  return x;
}

template <int kLanes, bool kTogether = false, typename F>
__device__ inline F group_sum(F x) {
  return over_group<kLanes, kTogether>(x, [](F a, F b) { return a + b; });
}

// NaN if there is one.
template <int kLanes, typename F>
__device__ inline F group_max(F x) {
  return over_group<kLanes, false>(x, [](F a, F b) { return b > a || b != b ? b : a; });
}

// The numbers of one row that a lane of the group holds, in the type that T computes in. Those
// beyond the row's size are zero.
template <typename T, int kVector, int kLanes, int kChunks>
struct Row {
  using F = compute_t<T>;
  static constexpr int kCount = kVector * kChunks;
  F at[kCount];

  // The first element of a chunk of this lane.
  __device__ static int place(int chunk) {
    return (chunk * kLanes + group_lane<kLanes>()) * kVector;
  }

  __device__ static Row zero() {
    Row row;
#pragma unroll
    for (int i = 0; i < kCount; ++i) row.at[i] = F(0);
    return row;
  }

  // The chunk's elements, from an address that is aligned to kVector of them.
  __device__ void load_chunk(int chunk, const T* from) {
    const auto loaded = *reinterpret_cast<const Vector<T, kVector>*>(from);
#pragma unroll
    for (int i = 0; i < kVector; ++i) at[chunk * kVector + i] = widen(loaded.at[i]);
  }

  // `size` is a multiple of kVector, and `from` is aligned to kVector elements.
  __device__ static Row load(const T* from, int size) {
    Row row = zero();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (place(chunk) < size) row.load_chunk(chunk, from + place(chunk));
    }
    return row;
  }

  // To global or shared memory; `kGlobal`: to global memory, by one instruction a chunk.
  template <bool kGlobal = false>
  __device__ void store(T* to, int size) const {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (place(chunk) < size) {
        Vector<T, kVector> rounded;
#pragma unroll
        for (int i = 0; i < kVector; ++i) rounded.at[i] = narrow<T>(at[chunk * kVector + i]);
        if constexpr (kGlobal) {
          store_global(rounded, to + place(chunk));
        } else {
          *reinterpret_cast<Vector<T, kVector>*>(to + place(chunk)) = rounded;
        }
      }
    }
  }

  // Floats (parameters, whatever T is) at the places of a row's elements. `from` is aligned to
  // kVector elements of T.
  __device__ static Row load_floats(const float* from, int size) {
    constexpr int kAtOnce = kVector < 4 ? kVector : 4;
    Row row = zero();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      if (place(chunk) < size) {
#pragma unroll
        for (int i = 0; i < kVector; i += kAtOnce) {
          const float* const first = from + place(chunk) + i;
          const auto loaded = *reinterpret_cast<const Vector<float, kAtOnce>*>(first);
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) row.at[chunk * kVector + i + j] = loaded.at[j];
        }
      }
    }
    return row;
  }

  // At the places of a row's elements, as they are.
  __device__ void store_floats(float* to) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[place(i / kVector) + i % kVector] = at[i];
  }

  // What this lane adds to the inner product with another row.
  __device__ F lane_dot(const Row& other) const {
    F sum = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += at[i] * other.at[i];
    return sum;
  }

  // The inner product with another row, the same bits in every lane of the group.
  template <bool kTogether = false>
  __device__ F dot(const Row& other) const {
    return group_sum<kLanes, kTogether>(lane_dot(other));
  }

  // this + factor row
  __device__ Row plus(F factor, const Row& row) const {
    Row result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) result.at[i] = at[i] + factor * row.at[i];
    return result;
  }

  // this factors, element by element
  __device__ Row times(const Row& factors) const {
    Row result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) result.at[i] = at[i] * factors.at[i];
    return result;
  }

  // this + factors row, element by element
  __device__ Row plus(const Row& factors, const Row& row) const {
    Row result;
#pragma unroll
    for (int i = 0; i < kCount; ++i) result.at[i] = at[i] + factors.at[i] * row.at[i];
    return result;
  }
};

// n / d and what is left, for n, d >= 0. (A GPU divides numbers of 64 bits by a long function, of 32
// bits by a short one.)
struct Divided {
  int64_t quotient, rest;
};
__device__ inline Divided divide(int64_t n, int64_t d) {
  if (((n | d) >> 32) == 0) {
    const auto quotient = static_cast<uint32_t>(n) / static_cast<uint32_t>(d);
    return {quotient, static_cast<uint32_t>(n) % static_cast<uint32_t>(d)};
  }
  return {n / d, n % d};
}

// The first item of a group, where a block has blockDim.x / kLanes groups, and what to add for the
// next one: a grid covers any number of items.
template <int kLanes>
__device__ inline int64_t first_item() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
}
template <int kLanes>
__device__ inline int64_t item_step() {
  return static_cast<int64_t>(gridDim.x) * (blockDim.x / kLanes);
}

}  // namespace pgolf::cuda
