// What the launchers of the CUDA kernels share on the host.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "element.h"
#include "kernels.h"

namespace pgolf::cuda {

constexpr int kThreads = 256;

// Starts `kernel` on `blocks` blocks of `threads`; nullptr, or the text of the error. Nothing is
// started for no blocks, which CUDA calls an error.
template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
                   Arguments... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > INT32_MAX) return "more work than a grid of blocks can take";
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Blocks of `per_block` items for all of them.
inline int64_t blocks_for(int64_t items, int64_t per_block) {
  return items / per_block + (items % per_block != 0);
}

// The same for kernels that step through what a grid of as many blocks as there can be leaves. (The
// emulator of the tests has few, so that they do.)
#ifndef PGOLF_MAX_BLOCKS
#define PGOLF_MAX_BLOCKS INT32_MAX
#endif
inline int64_t stepping_blocks(int64_t items, int64_t per_block) {
  return std::min<int64_t>(blocks_for(items, per_block), PGOLF_MAX_BLOCKS);
}

// Whether rows can be moved 16 bytes at a time: all addresses and distances (in bytes) allow it.
inline bool aligned(std::initializer_list<const void*> addresses,
                    std::initializer_list<int64_t> bytes) {
  std::uintptr_t all = 0;
  for (const void* address : addresses) all |= reinterpret_cast<std::uintptr_t>(address);
  for (int64_t distance : bytes) all |= static_cast<std::uintptr_t>(distance);
  return all % 16 == 0;
}

// A number for a template's argument that a lambda passes on.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

// body(T{}) for the type T of `dtype`, which is fp32 or bf16.
template <typename Body>
const char* with_element(Dtype dtype, const Body& body) {
  return dtype == Dtype::bf16 ? body(bf16{}) : body(float{});
}

}  // namespace pgolf::cuda
