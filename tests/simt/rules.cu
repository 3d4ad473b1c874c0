// Kernels for test_emulator.py: some keep the rules, each of the others breaks one.
#include <cuda_runtime.h>

#include <exception>
#include <map>
#include <string>

namespace {

constexpr unsigned kAll = ~0u;

// --- what is allowed -----------------------------------------------------------------------------

__global__ void sum_of_block(int* out) {
  __shared__ int sums[2];
  int sum = static_cast<int>(threadIdx.x);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = sums[0] + sums[1];
}

__global__ void shuffles(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_sync(kAll, lane, lane + 1, 8);
  out[32 + lane] = __shfl_up_sync(kAll, lane, 3, 16);
  out[64 + lane] = __shfl_down_sync(kAll, lane, 3, 16);
  out[96 + lane] = __shfl_xor_sync(kAll, lane, 9, 8);
  out[128 + lane] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  out[160 + lane] = __any_sync(kAll, lane == 5) + 2 * __all_sync(kAll, lane < 31);
}

// Lanes outside of a mask take no part, and groups of lanes do not wait for each other.
__global__ void groups(int* out) {
  const int lane = static_cast<int>(threadIdx.x), group = lane / 8;
  int sum = lane;
  for (int i = 0; i < group; ++i) {
    for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFu << 8 * group, sum, step, 8);
  }
  out[lane] = sum;
}

__global__ void left_in_shared_memory(int* out) {
  __shared__ int once[4];
  auto* const dynamic = static_cast<int*>(simt::dynamic_shared());
  out[2 * blockIdx.x] = once[3];
  out[2 * blockIdx.x + 1] = dynamic[3];
  once[3] = dynamic[3] = 7;
}

__global__ void order(int* out) {
  __shared__ int count[1];
  if (threadIdx.x == 0) count[0] = 0;
  __syncthreads();
  out[threadIdx.x] = count[0]++;  // (a race on a GPU)
}

__global__ void places(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * 24 + thread] = static_cast<int>(100 * block + thread);
}

// --- what is not ---------------------------------------------------------------------------------

__global__ void no_barrier(int* out) {
  __shared__ int numbers[64];
  numbers[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = numbers[63 - threadIdx.x];
}

__global__ void barrier_after_return(int*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void diverged_barriers(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void lane_that_has_returned(int* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
}

__global__ void lane_at_a_barrier(int*) {
  if (threadIdx.x != 3) __syncwarp();
  __syncthreads();
}

__global__ void mask_without_itself(int* out) {
  if (threadIdx.x < 2) out[threadIdx.x] = __shfl_sync(1, 1, 0);
}

__global__ void inactive_source(int* out) {
  if (threadIdx.x < 4) out[threadIdx.x] = __shfl_down_sync(0xF, 1, 1);
}

__global__ void odd_width(int* out) { out[threadIdx.x] = __shfl_sync(kAll, 1, 0, 12); }

__global__ void different_masks(int*) { __syncwarp(threadIdx.x < 16 ? kAll : 0xFFFFu << 16 | 1); }

__global__ void different_collectives(int* out) {
  if (threadIdx.x % 2) {
    out[0] = __shfl_sync(kAll, 1, 0);
  } else {
    out[0] = __any_sync(kAll, 1);
  }
}

struct alignas(16) Four {
  int at[4];
};
__global__ void misaligned(int* out) {
  *reinterpret_cast<Four*>(out + threadIdx.x) = Four{};
}

__global__ void index_outside(int* out) {
  __shared__ int numbers[32];
  numbers[threadIdx.x + 1] = 1;
  out[0] = numbers[0];
}

using Kernel = void (*)(int*);
const std::map<std::string, Kernel> kKernels = {
    {"sum_of_block", sum_of_block},
    {"shuffles", shuffles},
    {"groups", groups},
    {"left_in_shared_memory", left_in_shared_memory},
    {"order", order},
    {"places", places},
    {"no_barrier", no_barrier},
    {"barrier_after_return", barrier_after_return},
    {"diverged_barriers", diverged_barriers},
    {"lane_that_has_returned", lane_that_has_returned},
    {"lane_at_a_barrier", lane_at_a_barrier},
    {"mask_without_itself", mask_without_itself},
    {"inactive_source", inactive_source},
    {"odd_width", odd_width},
    {"different_masks", different_masks},
    {"different_collectives", different_collectives},
    {"misaligned", misaligned},
    {"index_outside", index_outside},
};

}  // namespace

// Writes what CUDA or the emulator said about a launch; nothing where all went well.
extern "C" __attribute__((visibility("default"))) void start(
    const char* name, const unsigned* grid, const unsigned* block, size_t shared, int* out,
    char* said, size_t room) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid[0], grid[1], grid[2]);
  config.blockDim = dim3(block[0], block[1], block[2]);
  config.dynamicSmemBytes = shared;
  said[0] = 0;
  try {
    const cudaError_t error = cudaLaunchKernelEx(&config, kKernels.at(name), out);
    if (error != cudaSuccess) std::strncpy(said, cudaGetErrorString(error), room);
  } catch (const std::exception& e) {
    std::strncpy(said, e.what(), room);
  }
}

extern "C" __attribute__((visibility("default"))) int multiprocessors() {
  int device = -1, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}
