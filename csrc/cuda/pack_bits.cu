// pack_bits on a GPU: the formula of pack_bits.h, one thread a group of eight codes.
#include "pack_bits.h"

#include <cuda_runtime.h>

#include "kernels.h"

namespace pgolf::cuda {
namespace {

constexpr int kThreads = 256;

__device__ int64_t this_group() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__global__ void pack_kernel(const int8_t* codes, uint8_t* packed, int64_t count, int bits) {
  const int64_t group = this_group();
  if (group < group_count(count)) pack_group(codes, packed, count, bits, group);
}

__global__ void unpack_kernel(const uint8_t* packed, int8_t* codes, int64_t count, int bits) {
  const int64_t group = this_group();
  if (group < group_count(count)) unpack_group(packed, codes, count, bits, group);
}

template <typename In, typename Out>
const char* launch(void (*kernel)(const In*, Out*, int64_t, int), const In* in, Out* out,
                   int64_t count, int bits, void* stream) {
  if (count == 0) return nullptr;  // a grid of no blocks is an error
  const int64_t blocks = (group_count(count) + kThreads - 1) / kThreads;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, in, out, count, bits);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* pack_bits(const int8_t* codes, uint8_t* packed, int64_t count, int bits, void* stream) {
  return launch(pack_kernel, codes, packed, count, bits, stream);
}

const char* unpack_bits(const uint8_t* packed, int8_t* codes, int64_t count, int bits,
                        void* stream) {
  return launch(unpack_kernel, packed, codes, count, bits, stream);
}

}  // namespace pgolf::cuda
