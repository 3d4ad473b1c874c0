// Kernels whose executed instructions of a kind are known from their source, whatever nvcc makes of
// the rest: fused multiply-adds that nothing can leave out, loads, stores and barriers.
#include <cuda_runtime.h>

__device__ inline float three(float x, float y) {
#pragma unroll
  for (int i = 0; i < 3; ++i) asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(x) : "f"(y));
  return x;
}

// 3 multiply-adds, a load and a store of 16 bytes, a barrier.
__global__ void __launch_bounds__(256) straight(const float4* x, float4* y) {
  float4 v = x[threadIdx.x];
  v.x = three(v.x, v.y);
  __syncthreads();
  y[threadIdx.x] = v;
}

// n trips of 3 multiply-adds, a load and a store.
__global__ void __launch_bounds__(96) looped(const float* x, float* y, int n) {
#pragma unroll 1
  for (int i = 0; i < n; ++i) y[i] = three(x[i], 2.0f);
}

// n trips of m trips of 3, and of 3 more; a store for each of the n.
__global__ void nested(const float* x, float* y, int n, int m) {
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    float sum = x[i];
#pragma unroll 1
    for (int j = 0; j < m; ++j) sum = three(sum, 2.0f);
    y[i] = three(sum, 3.0f);
  }
}

// The quotient calls a subroutine for rare arguments.
__global__ void divided(const float* x, float* y) { y[0] = three(x[0] / x[1], 2.0f); }

// One load more where there is another operand, and 3 multiply-adds.
__global__ void optional(const float* x, const float* more, float* y) {
  float sum = x[threadIdx.x];
  if (more) sum += three(more[threadIdx.x], 2.0f);
  y[threadIdx.x] = sum;
}

// As the compiler likes it: a loop for many, and others or none for what is left. 8 stores.
__global__ void unrolled(const float* x, float* y, int n) {
  for (int i = 0; i < n; ++i) {
    float v;
    asm volatile("fma.rn.f32 %0, %1, %1, %1;" : "=f"(v) : "f"(x[i]));
    y[i] = v;
  }
}

// Four loads, then their sum; and four, each at the place that the one before it names.
__global__ void together(const float* x, float* y) {
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v[i]) : "l"(x + threadIdx.x + 1024 * i));
  }
  y[threadIdx.x] = v[0] + v[1] + v[2] + v[3];
}
__global__ void chained(const int* x, int* y) {
  int at = threadIdx.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) at = x[at];
  y[threadIdx.x] = at;
}
