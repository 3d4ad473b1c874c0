// In place of the CUDA runtime, for a module whose kernels are to be run by the PTX interpreter: a
// launch calls a hook with the kernel's name instead of a GPU.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <map>
#include <string>

namespace {

using Hook = int (*)(const char* kernel, const unsigned* sizes, size_t shared, void** arguments);

Hook hook = nullptr;

std::map<const void*, std::string>& names() {  // of kernels, by the address of their host function
  static std::map<const void*, std::string> table;
  return table;
}

}  // namespace

extern "C" {

void pgolf_ptx_set_hook(Hook new_hook) { hook = new_hook; }

// What nvcc has each object file call when the module is loaded.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  names()[host] = name;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  const auto found = names().find(function);
  if (hook == nullptr || found == names().end()) return cudaErrorInvalidDeviceFunction;
  const unsigned sizes[6] = {config->gridDim.x,  config->gridDim.y,  config->gridDim.z,
                             config->blockDim.x, config->blockDim.y, config->blockDim.z};
  const int failed = hook(found->second.c_str(), sizes, config->dynamicSmemBytes, arguments);
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t) { return "the interpreted kernel failed"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = 2;  // few blocks, of which each has several items
  return cudaSuccess;
}

// What <<<...>>> in a host function would need, which no launcher uses.
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { std::abort(); }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  std::abort();
}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { std::abort(); }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { std::abort(); }
}
