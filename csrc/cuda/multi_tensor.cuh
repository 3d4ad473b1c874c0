// Passes over many tensors in one launch: the list of tensors travels in the kernel's arguments, so
// that no copy and no allocation comes before it. Elements are fp32 or bf16, known at run time: all
// threads of a block work on one tensor and take the same way.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "multi_tensor.h"

namespace pgolf::cuda {

constexpr int64_t kArgumentBytes = 32764;  // of a kernel, since CUDA 12.1 and sm_70
constexpr int kWide = 4;                   // elements that a thread moves at once

// As many tensors as fit beside other arguments, unless fewer are said to be enough.
template <typename Tensor, int kTensors = (kArgumentBytes - 256) / sizeof(Tensor)>
struct TensorList {
  static constexpr int kMost = kTensors;
  int count;
  int64_t first_item, end_item;
  Tensor tensors[kMost];
};

// launch_list(list) for parts of the tensors that fit into a List, `items` in all of them.
template <typename List, typename Tensor, typename Launch>
const char* for_each_list(const Tensor* tensors, int count, int64_t items,
                          const Launch& launch_list) {
  for (int begin = 0; begin < count; begin += List::kMost) {
    List list = {};
    list.count = std::min(List::kMost, count - begin);
    std::copy(tensors + begin, tensors + begin + list.count, list.tensors);
    const int end = begin + list.count;
    list.first_item = tensors[begin].first_item;
    list.end_item = end < count ? tensors[end].first_item : items;
    if (const char* error = launch_list(list)) return error;
  }
  return nullptr;
}

// kCount elements from number `at` on, which is aligned to as many, as floats and back.
template <int kCount>
__device__ inline void load_floats(const void* from, Dtype dtype, int64_t at, float (&to)[kCount]) {
  if (dtype == Dtype::bf16) {
    const auto x = *reinterpret_cast<const Vector<bf16, kCount>*>(
        static_cast<const bf16*>(from) + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = widen(x.at[i]);
  } else {
    const auto x = *reinterpret_cast<const Vector<float, kCount>*>(
        static_cast<const float*>(from) + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] = x.at[i];
  }
}

template <int kCount>
__device__ inline void store_floats(const float (&from)[kCount], void* to, Dtype dtype,
                                    int64_t at) {
  if (dtype == Dtype::bf16) {
    Vector<bf16, kCount> x;
#pragma unroll
    for (int i = 0; i < kCount; ++i) x.at[i] = round_to_bf16(from[i]);
    *reinterpret_cast<Vector<bf16, kCount>*>(static_cast<bf16*>(to) + at) = x;
  } else {
    Vector<float, kCount> x;
#pragma unroll
    for (int i = 0; i < kCount; ++i) x.at[i] = from[i];
    *reinterpret_cast<Vector<float, kCount>*>(static_cast<float*>(to) + at) = x;
  }
}

// Whether all that is not null is aligned to 16 bytes.
template <typename... Pointers>
__device__ inline bool all_aligned(Pointers... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) | ...) % kAccessBytes) == 0;
}

template <int kCount>
struct Elements {
  static constexpr int count = kCount;
};

// body(Elements<n>{}, at) for the elements [begin, end) of a tensor, `threads` of which this is
// `thread` sharing them: kWide at a time where `wide` says that addresses are aligned (`begin` is a
// multiple of kWide), and what is left one by one.
template <typename Index, typename Body>
__device__ inline void for_elements(Index begin, Index end, bool wide, int thread, int threads,
                                    const Body& body) {
  const Index middle = wide ? end - (end - begin) % kWide : begin;
  for (Index at = begin + thread * kWide; at < middle; at += threads * kWide) {
    body(Elements<kWide>{}, at);
  }
  for (Index at = middle + thread; at < end; at += threads) body(Elements<1>{}, at);
}

}  // namespace pgolf::cuda
