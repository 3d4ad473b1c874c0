/* Device memory. Allocations reserve addresses only; no kernel runs, so pages stay untouched. */
#include "device.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define MOST_BLOCKS 65536
#define GRANULARITY ((size_t)2 << 20) /* of cudaMalloc on a GPU of 80 GB */

static struct {
    char *start;
    size_t size;
} blocks[MOST_BLOCKS];
static int block_count;
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void *memory_take(size_t bytes) {
    size_t size = (bytes + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
    void *start = NULL;
    pthread_mutex_lock(&lock);
    if (size && used + size <= DEVICE_MEMORY && block_count < MOST_BLOCKS) {
        start = mmap(NULL, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (start == MAP_FAILED) {
            start = NULL;
        } else {
            blocks[block_count].start = start;
            blocks[block_count++].size = size;
            used += size;
        }
    }
    pthread_mutex_unlock(&lock);
    return start;
}

void memory_give(void *address) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < block_count; i++) {
        if (blocks[i].start == address) {
            munmap(address, blocks[i].size);
            used -= blocks[i].size;
            blocks[i] = blocks[--block_count];
            break;
        }
    }
    pthread_mutex_unlock(&lock);
}

size_t memory_used(void) { return used; }

int memory_is_device(const void *address) {
    int found = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < block_count && !found; i++) {
        const char *start = blocks[i].start, *at = address;
        found = at >= start && at < start + blocks[i].size;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

EXPORT cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = DEVICE_MEMORY;
    *free_bytes = DEVICE_MEMORY - memory_used();
    return cudaSuccess;
}

EXPORT cudaError_t cudaMalloc(void **address, size_t bytes) {
    cudaError_t error = capture_allows_unsafe(__func__);
    if (error)
        return error;
    *address = memory_take(bytes);
    return *address || !bytes ? cudaSuccess : cudaErrorMemoryAllocation;
}

EXPORT cudaError_t cudaFree(void *address) {
    cudaError_t error = address ? capture_allows_unsafe(__func__) : cudaSuccess;
    if (error)
        return error;
    memory_give(address);
    return cudaSuccess;
}

/* ---- page-locked memory ---- */

#define MOST_PINNED 4096

static struct {
    char *start;
    size_t size;
} pinned[MOST_PINNED];
static int pinned_count;

static void pin(void *start, size_t size) {
    pthread_mutex_lock(&lock);
    if (pinned_count == MOST_PINNED)
        refuse("so many page-locked blocks");
    pinned[pinned_count].start = start;
    pinned[pinned_count++].size = size;
    pthread_mutex_unlock(&lock);
}

static void unpin(const void *start) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < pinned_count; i++) {
        if (pinned[i].start == start) {
            pinned[i] = pinned[--pinned_count];
            break;
        }
    }
    pthread_mutex_unlock(&lock);
}

int memory_is_pinned(const void *address) {
    int found = 0;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < pinned_count && !found; i++) {
        const char *start = pinned[i].start, *at = address;
        found = at >= start && at < start + pinned[i].size;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

EXPORT cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    cudaError_t error = capture_allows_unsafe(__func__);
    if (error)
        return error;
    *address = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (!*address)
        return cudaErrorMemoryAllocation;
    pin(*address, bytes);
    return cudaSuccess;
}

EXPORT cudaError_t cudaFreeHost(void *address) {
    unpin(address);
    free(address);
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned flags) {
    cudaError_t error = capture_allows_unsafe(__func__);
    if (!error)
        pin(address, bytes);
    return error;
}

EXPORT cudaError_t cudaHostUnregister(void *address) {
    unpin(address);
    return cudaSuccess;
}

EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes,
                                            const void *address) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = memory_is_device(address)   ? cudaMemoryTypeDevice
                       : memory_is_pinned(address) ? cudaMemoryTypeHost
                                                   : cudaMemoryTypeUnregistered;
    attributes->devicePointer = (void *)address;
    return cudaSuccess;
}

/* Copies that the host takes part in are real: what it wrote and no kernel was to change, it reads
 * back. Between two places of the device nothing is moved, as no kernel fills them. */
static cudaError_t copy(const char *call, void *to, const void *from, size_t bytes,
                        cudaStream_t stream) {
    int to_device = memory_is_device(to), from_device = memory_is_device(from);
    cudaError_t error = capture_allows(call, stream);
    if (!error && is_capturing(stream) && ((!to_device && !memory_is_pinned(to)) ||
                                           (!from_device && !memory_is_pinned(from))))
        error = capture_forbids(cudaErrorStreamCaptureUnsupported, call,
                                "of host memory that is not page-locked");
    if (!error)
        log_copy(!to_device ? (from_device ? "memcpy_to_host" : "memcpy_on_host")
                            : (from_device ? "memcpy_on_device" : "memcpy_to_device"),
                 to, from, bytes, !to_device || !from_device, stream);
    return error;
}

EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    cudaError_t error = capture_allows_unsafe(__func__);
    return error ? error : copy(__func__, to, from, bytes, NULL);
}

EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes,
                                   enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(__func__, to, from, bytes, stream);
}

EXPORT cudaError_t cudaMemsetAsync(void *address, int value, size_t bytes, cudaStream_t stream) {
    cudaError_t error = capture_allows(__func__, stream);
    if (!error)
        log_memset(address, bytes, stream);
    return error;
}

EXPORT cudaError_t cudaMemset(void *address, int value, size_t bytes) {
    cudaError_t error = capture_allows_unsafe(__func__);
    return error ? error : cudaMemsetAsync(address, value, bytes, NULL);
}

EXPORT cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes,
                                      size_t offset, enum cudaMemcpyKind kind) {
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    *address = memory_take(1);
    return *address ? cudaSuccess : cudaErrorMemoryAllocation;
}
