// Rows of a warp as they lie in memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/device.cuh"

namespace pgolf::cuda {

// A row that is needed later, as it lies in memory: bf16 take half of the registers of floats.
template <typename T, int kVector, int kChunks>
struct Packed {
  using Lanes = Row<T, kVector, kWarp, kChunks>;
  // Registers hold words; elements that come from branches would be taken apart.
  using Word = std::conditional_t<sizeof(T) * kVector % 4 == 0, uint32_t, T>;
  static constexpr int kWords = sizeof(T) * kVector / sizeof(Word);
  Vector<Word, kWords> chunks[kChunks];

  // Zeros where `there` is false, and beyond `size`.
  __device__ static Packed load(const T* from, int size, bool there) {
    Packed packed;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      packed.chunks[i] = {};
      const int place = Lanes::place(i);
      if (there && place < size) {
        packed.chunks[i] = *reinterpret_cast<const Vector<Word, kWords>*>(from + place);
      }
    }
    return packed;
  }

  __device__ Lanes unpacked() const {
    Lanes row;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) row.at[i * kVector + j] = widen(element(chunks[i], j));
    }
    return row;
  }

  // (By shifts, which widen() makes one instruction of.)
  __device__ static T element(const Vector<Word, kWords>& chunk, int i) {
    if constexpr (sizeof(T) == sizeof(Word)) {
      return bit_cast<T>(chunk.at[i]);
    } else {
      return {static_cast<uint16_t>(chunk.at[i / 2] >> (i % 2 * 16))};
    }
  }
};

}  // namespace pgolf::cuda
