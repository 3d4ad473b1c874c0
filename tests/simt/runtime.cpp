// The functions that cuda_runtime.h declares.
#include "machine.h"

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = simt::kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = simt::kMaxSharedBytes;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
  }
  return "unrecognized error code";
}

namespace simt {

uint64_t meet(Collective kind, unsigned mask, uint64_t value, int argument, int width, Site site) {
  return Machine::get().meet(kind, mask, value, argument, width, site);
}

void block_barrier(Site site) { Machine::get().block_barrier(site); }

void* dynamic_shared() { return Machine::get().dynamic_shared(); }

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                   void (*thread)(const void*), const void* context) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const bool sizes = grid.x != 0 && grid.y != 0 && grid.z != 0 && threads != 0;
  if (!sizes || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 || threads > kMaxThreads ||
      block.x > 1024 || block.y > 1024 || block.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  if (config.dynamicSmemBytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  Machine::get().launch(config, kernel, thread, context);
  return cudaSuccess;
}

}  // namespace simt
