// A kernel of the interpreter's own tests: sums of rows over a block, by shuffles and shared memory.
struct Rows {
  const float* x;
  int columns;
  float factor;
};

extern "C" __global__ void block_sum(Rows rows, float* sums) {
  __shared__ float partial[4];
  extern __shared__ float copy[];
  float sum = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows.columns; i += blockDim.x) {
    copy[i] = rows.x[blockIdx.x * rows.columns + i];
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < rows.columns; i += blockDim.x) {
    sum += copy[rows.columns - 1 - i];  // what another thread has copied
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_up_sync(~0u, sum, step);
  if (threadIdx.x % 32 == 31) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = rows.factor * (partial[0] + partial[1] + partial[2] + partial[3]);
  }
}
