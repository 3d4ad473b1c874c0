// For formulas that CPU and GPU kernels share.
#pragma once

#ifdef __CUDACC__
#define PGOLF_HOST_DEVICE __host__ __device__
#else
#define PGOLF_HOST_DEVICE
#endif
