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
    *address = memory_take(bytes);
    return *address || !bytes ? cudaSuccess : cudaErrorMemoryAllocation;
}

EXPORT cudaError_t cudaFree(void *address) {
    memory_give(address);
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    *address = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    return *address ? cudaSuccess : cudaErrorMemoryAllocation;
}

EXPORT cudaError_t cudaFreeHost(void *address) {
    free(address);
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned flags) {
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostUnregister(void *address) { return cudaSuccess; }

EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes,
                                            const void *address) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type =
        memory_is_device(address) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    attributes->devicePointer = (void *)address;
    return cudaSuccess;
}

/* Copies that the host takes part in are real: what it wrote and no kernel was to change, it reads
 * back. Between two places of the device nothing is moved, as no kernel fills them. */
static cudaError_t copy(void *to, const void *from, size_t bytes) {
    int to_device = memory_is_device(to), from_device = memory_is_device(from);
    log_copy(!to_device ? (from_device ? "memcpy_to_host" : "memcpy_on_host")
                        : (from_device ? "memcpy_on_device" : "memcpy_to_device"),
             bytes);
    if (!to_device || !from_device)
        memmove(to, from, bytes);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    return copy(to, from, bytes);
}

EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes,
                                   enum cudaMemcpyKind kind, cudaStream_t stream) {
    return copy(to, from, bytes);
}

EXPORT cudaError_t cudaMemset(void *address, int value, size_t bytes) {
    log_copy("memset", bytes);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void *address, int value, size_t bytes, cudaStream_t stream) {
    return cudaMemset(address, value, bytes);
}

EXPORT cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes,
                                      size_t offset, enum cudaMemcpyKind kind) {
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    *address = memory_take(1);
    return *address ? cudaSuccess : cudaErrorMemoryAllocation;
}
