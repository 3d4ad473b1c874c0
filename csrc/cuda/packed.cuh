// Rows of a group of lanes as they lie in memory, until they are needed: bf16 take half of the
// registers of floats.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/device.cuh"

namespace pgolf::cuda {

// Element i of some that lie in words, in the type that T computes in. Of two bf16 in a word the
// first is in its lower half, and each becomes the upper half of a float.
template <typename T, typename Word, int kWords>
__device__ inline compute_t<T> widened(const Vector<Word, kWords>& words, int i) {
  if constexpr (sizeof(T) == sizeof(Word)) {
    return widen(bit_cast<T>(words.at[i]));
  } else {
    const uint32_t two = words.at[i / 2];
    return bit_cast<float>(i % 2 ? two & 0xFFFF0000u : two << 16);
  }
}

template <typename T, int kVector, int kLanes, int kChunks>
struct Packed {
  using Lanes = Row<T, kVector, kLanes, kChunks>;
  // Registers hold words; elements that come from branches would be taken apart.
  using Word = std::conditional_t<sizeof(T) * kVector % 4 == 0, uint32_t, T>;
  static constexpr int kWords = sizeof(T) * kVector / sizeof(Word);
  using Chunk = Vector<Word, kWords>;
  Chunk chunks[kChunks];

  // Zeros where `there` is false, and beyond `size`.
  __device__ static Packed load(const T* from, int size, bool there) {
    Packed packed = {};
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int place = Lanes::place(i);
      if (there && place < size) packed.chunks[i] = *reinterpret_cast<const Chunk*>(from + place);
    }
    return packed;
  }

  __device__ static Packed rounded(const Lanes& row) {
    Packed packed;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      Vector<T, kVector> elements;
#pragma unroll
      for (int j = 0; j < kVector; ++j) elements.at[j] = narrow<T>(row.at[i * kVector + j]);
      packed.chunks[i] = bit_cast<Chunk>(elements);
    }
    return packed;
  }

  __device__ Lanes unpacked() const {
    Lanes row;
#pragma unroll
    for (int i = 0; i < Lanes::kCount; ++i) {
      row.at[i] = widened<T>(chunks[i / kVector], i % kVector);
    }
    return row;
  }

  // To global memory, by one instruction a chunk.
  __device__ void store(T* to, int size) const {
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int place = Lanes::place(i);
      if (place < size) store_global(chunks[i], reinterpret_cast<Word*>(to + place));
    }
  }
};

}  // namespace pgolf::cuda
