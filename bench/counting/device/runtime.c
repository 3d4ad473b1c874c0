/* libcudart: torch's own kernels and those of pgolf's extension are registered and launched here. */
#include "device.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

/* ---- one device, without a driver behind it ---- */

EXPORT cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
EXPORT cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0;
    return cudaSuccess;
}
/* ---- kernels: registered by constructors of the libraries that hold them, found by their host function ---- */

#define BUCKETS (1u << 18) /* libtorch_cuda registers some 60,000 */

static struct {
    const void *function;
    const char *name;
} kernels[BUCKETS];
static unsigned kernel_count;

static unsigned bucket_of(const void *function) {
    unsigned i = (unsigned)(((size_t)function >> 4) * 2654435761u) % BUCKETS;
    while (kernels[i].function && kernels[i].function != function)
        i = (i + 1) % BUCKETS;
    return i;
}

EXPORT void **__cudaRegisterFatBinary(void *binary) {
    static void *module;
    return &module;
}
EXPORT void __cudaRegisterFatBinaryEnd(void **module) {}
EXPORT void __cudaUnregisterFatBinary(void **module) {}
EXPORT void __cudaRegisterVar(void **module, char *variable, char *address, const char *name,
                              int external, size_t size, int constant, int global) {}
EXPORT void __cudaRegisterManagedVar(void **module, void **variable, char *address,
                                     const char *name, int external, size_t size, int constant,
                                     int global) {}
EXPORT void __cudaRegisterFunction(void **module, const char *function, char *device_function,
                                   const char *name, int threads, void *thread_id, void *block_id,
                                   void *block_dim, void *grid_dim, int *warp_size) {
    if (++kernel_count >= BUCKETS)
        refuse("so many kernels");
    unsigned i = bucket_of(function);
    kernels[i].function = function;
    kernels[i].name = name;
}

static cudaError_t start(const void *function, dim3 grid, dim3 block, size_t shared,
                         cudaStream_t stream) {
    const char *name = kernels[bucket_of(function)].name;
    cudaError_t error = capture_allows(name ? name : "?", stream);
    if (!error)
        log_launch("runtime", name ? name : "?", grid, block, shared, "", stream);
    return error;
}

EXPORT cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                                    size_t shared, cudaStream_t stream) {
    return start(function, grid, block, shared, stream);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function,
                                       void **arguments) {
    return start(function, config->gridDim, config->blockDim, config->dynamicSmemBytes,
                 config->stream);
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments,
                                      size_t shared, cudaStream_t stream) {
    return start(kernel, grid, block, shared, stream);
}
EXPORT cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute,
                                        int value) {
    return cudaSuccess;
}
EXPORT cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel,
                                                   enum cudaFuncAttribute attribute, int value,
                                                   int device) {
    return cudaSuccess;
}

/* `kernel<<<...>>>` pushes its configuration; the stub that nvcc writes pops it. */
static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} configurations[8];
static __thread int depth;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                            struct CUstream_st *stream) {
    if (depth == 8)
        refuse("a launch inside eight others");
    configurations[depth].grid = grid;
    configurations[depth].block = block;
    configurations[depth].shared = shared;
    configurations[depth++].stream = stream;
    return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared,
                                              void *stream) {
    depth--;
    *grid = configurations[depth].grid;
    *block = configurations[depth].block;
    *shared = configurations[depth].shared;
    *(void **)stream = configurations[depth].stream;
    return cudaSuccess;
}

/* torch asks for driver functions by their name without the version that cuda.h appends. */
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function,
                                                    unsigned version, unsigned long long flags,
                                                    enum cudaDriverEntryPointQueryResult *result) {
    char versioned[128];
    snprintf(versioned, sizeof versioned, "%s_v2", symbol);
    *function = dlsym(RTLD_DEFAULT, symbol);
    if (!*function)
        *function = dlsym(RTLD_DEFAULT, versioned);
    if (result)
        *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
