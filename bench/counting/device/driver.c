/* libcuda: Triton's kernels, Inductor's and pgolf's, are loaded and launched here. */
#include "device.h"

#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static CUcontext const context = (CUcontext)1;

EXPORT CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 0; return CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = device_attribute(attribute);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *out, CUdevice device) {
    *out = context;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext *out) { *out = context; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext wanted) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxPushCurrent_v2(CUcontext wanted) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxPopCurrent_v2(CUcontext *out) { *out = context; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "error of the counting device";
    return CUDA_SUCCESS;
}
EXPORT CUresult cuGetErrorName(CUresult error, const char **text) {
    *text = "counting device";
    return CUDA_SUCCESS;
}
EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute,
                                      CUdeviceptr address) {
    if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        return CUDA_ERROR_NOT_SUPPORTED;
    *(CUdeviceptr *)value = address;
    return CUDA_SUCCESS;
}

/* ---- kernels: a function is its name and the sizes of its parameters, which its ELF file has ---- */

#define MOST_PARAMETERS 128

struct function {
    const char *name;
    int count;
    int sizes[MOST_PARAMETERS]; /* in bytes */
};

static const Elf64_Shdr *section(const char *image, const char *name) {
    const Elf64_Ehdr *head = (const Elf64_Ehdr *)image;
    const Elf64_Shdr *all = (const Elf64_Shdr *)(image + head->e_shoff);
    const char *names = image + all[head->e_shstrndx].sh_offset;
    for (int i = 0; i < head->e_shnum; i++)
        if (!strcmp(names + all[i].sh_name, name))
            return all + i;
    return NULL;
}

/* Attributes of a kernel: a form, a number and two bytes; form 4 has so many bytes more. Number 23 is
 * of one parameter: 4 bytes, 2 of its place, 2 of its offset, and its size from bit 18 of the rest. */
static void read_parameters(struct function *function, const char *image) {
    char wanted[512];
    snprintf(wanted, sizeof wanted, ".nv.info.%s", function->name);
    const Elf64_Shdr *found = section(image, wanted);
    const char *at = found ? image + found->sh_offset : NULL;
    const char *end = found ? at + found->sh_size : NULL;
    while (at < end) {
        int form = at[0], number = at[1];
        unsigned short more, place;
        unsigned flags;
        memcpy(&more, at + 2, 2);
        if (form == 4 && number == 23) {
            memcpy(&place, at + 8, 2);
            memcpy(&flags, at + 12, 4);
            if (place >= MOST_PARAMETERS)
                refuse("so many parameters");
            function->sizes[place] = flags >> 18;
            if (place >= function->count)
                function->count = place + 1;
        }
        at += form == 4 ? 4 + more : 4;
    }
}

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    if (memcmp(image, ELFMAG, SELFMAG))
        refuse("a kernel that is no ELF file");
    const Elf64_Ehdr *head = image;
    size_t size = head->e_shoff + (size_t)head->e_shnum * head->e_shentsize;
    const Elf64_Shdr *all = (const Elf64_Shdr *)((const char *)image + head->e_shoff);
    for (int i = 0; i < head->e_shnum; i++)
        if (all[i].sh_type != SHT_NOBITS && all[i].sh_offset + all[i].sh_size > size)
            size = all[i].sh_offset + all[i].sh_size;
    *module = malloc(size);
    memcpy(*module, image, size);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoad(CUmodule *module, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file)
        return CUDA_ERROR_FILE_NOT_FOUND;
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    *module = malloc(size);
    size_t got = fread(*module, 1, size, file);
    fclose(file);
    return got == (size_t)size ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count,
                                   CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}
EXPORT CUresult cuModuleUnload(CUmodule module) {
    free(module);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleGetFunction(CUfunction *out, CUmodule module, const char *name) {
    struct function *function = calloc(1, sizeof *function);
    if (!function)
        return CUDA_ERROR_OUT_OF_MEMORY;
    function->name = strdup(name);
    read_parameters(function, (const char *)module);
    *out = (CUfunction)function;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute,
                                   CUfunction function) {
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute,
                                   int value) {
    return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
    return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction function,
                                                            int block_size, size_t shared) {
    *blocks = 2;
    return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function,
                                             const CUlaunchConfig *config) {
    *clusters = MULTIPROCESSORS / 2;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                               unsigned grid_z, unsigned block_x, unsigned block_y,
                               unsigned block_z, unsigned shared, CUstream stream,
                               void **arguments, void **extra) {
    dim3 grid = {grid_x, grid_y, grid_z}, block = {block_x, block_y, block_z};
    const struct function *called = (const struct function *)function;
    if (capture_allows(called->name, stream))
        return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    char values[24 * MOST_PARAMETERS] = "", *end = values;
    for (int i = 0; i < called->count; i++) {
        size_t value = 0; /* of a larger one, a descriptor of a tensor, nothing */
        if (called->sizes[i] <= (int)sizeof value)
            memcpy(&value, arguments[i], called->sizes[i]);
        end += sprintf(end, "%s%zu", i ? ", " : "", value);
    }
    log_launch("driver", called->name, grid, block, shared, values, stream);
    return CUDA_SUCCESS;
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function,
                                 void **arguments, void **extra) {
    return cuLaunchKernel(function, config->gridDimX, config->gridDimY, config->gridDimZ,
                          config->blockDimX, config->blockDimY, config->blockDimZ,
                          config->sharedMemBytes, config->hStream, arguments, extra);
}
EXPORT CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                                          unsigned grid_z, unsigned block_x, unsigned block_y,
                                          unsigned block_z, unsigned shared, CUstream stream,
                                          void **arguments) {
    return cuLaunchKernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared,
                          stream, arguments, NULL);
}

/* A descriptor of a tensor for TMA: nothing reads it. */
EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type,
                                       cuuint32_t rank, void *address, const cuuint64_t *sizes,
                                       const cuuint64_t *strides, const cuuint32_t *box,
                                       const cuuint32_t *element_strides,
                                       CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion promotion,
                                       CUtensorMapFloatOOBfill fill) {
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}

/* Libraries that torch loads name these; no counted program calls them. */
#define NEVER_CALLED(name) EXPORT void name##_(void) __asm__(#name); \
    void name##_(void) { refuse(#name); }
NEVER_CALLED(cuTensorMapEncodeIm2col)
NEVER_CALLED(cuLinkCreate_v2)
NEVER_CALLED(cuLinkAddData_v2)
NEVER_CALLED(cuLinkComplete)
NEVER_CALLED(cuMemGetAddressRange_v2)
