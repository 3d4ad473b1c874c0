// pack_bits on a GPU: the formula of pack_bits.h, one thread a group of eight codes.
#include "pack_bits.h"

#include <cuda_runtime.h>

#include "cuda/launch.h"

namespace pgolf::cuda {
namespace {

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

}  // namespace

const char* pack_bits(const int8_t* codes, uint8_t* packed, int64_t count, int bits, void* stream) {
  return launch(pack_kernel, blocks_for(group_count(count), kThreads), kThreads, stream, codes,
                packed, count, bits);
}

const char* unpack_bits(const uint8_t* packed, int8_t* codes, int64_t count, int bits,
                        void* stream) {
  return launch(unpack_kernel, blocks_for(group_count(count), kThreads), kThreads, stream, packed,
                codes, count, bits);
}

}  // namespace pgolf::cuda
