/* The counting device: what its parts share. See README.md in this folder. */
#ifndef COUNTING_DEVICE_H
#define COUNTING_DEVICE_H

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stddef.h>

#if CUDART_VERSION < 13000
#error "the counting device is written for the headers of CUDA 13"
#endif

/* Everything else has hidden visibility: a stand-in must not capture a symbol by accident. */
#define EXPORT __attribute__((visibility("default")))

#define DEVICE_NAME "pgolf counting device (H100)"
#define DEVICE_MEMORY ((size_t)85017755648) /* what an H100 80GB HBM3 reports */
#define MULTIPROCESSORS 132

/* log.c: one JSON object a line, from counting_open to counting_close. Work that is queued on a stream
 * that is capturing goes into its graph instead, and into the log whenever that is launched. */
struct work {
    char *line;       /* without its end, which names the stream it runs on */
    void *to;         /* of a copy that the host takes part in; else NULL */
    const void *from;
    size_t bytes;
};
void log_launch(const char *api, const char *name, dim3 grid, dim3 block, size_t shared,
                const char *arguments, const void *stream);
void log_wait(const char *call);
void log_copy(const char *kind, void *to, const void *from, size_t bytes, int host,
              const void *stream);
void log_memset(void *to, size_t bytes, const void *stream);
void log_gemm(const char *call, const char *operations, long m, long n, long k, long batch,
              int bits_a, int bits_b, int bits_c, int reads_c, const void *a, const void *b,
              const void *c, const void *stream);
void log_graph(size_t works, const void *stream);
void work_do(const struct work *work, const void *stream);
void refuse(const char *what) __attribute__((noreturn));

/* graph.c: what a capture forbids is an error of the call, and spoils the capture. */
cudaError_t capture_allows(const char *call, const void *stream); /* work on a stream */
cudaError_t capture_allows_unsafe(const char *call);              /* as cudaMalloc */
cudaError_t capture_allows_wait(const char *call, const void *stream);
cudaError_t capture_forbids(cudaError_t error, const char *call, const char *why);
int is_capturing(const void *stream);
int graph_takes(struct work work, const void *stream); /* whether the stream is capturing */

/* memory.c: device memory is host memory that is committed when it is touched, so hardly ever. */
void *memory_take(size_t bytes);
void memory_give(void *address);
size_t memory_used(void);
int memory_is_device(const void *address);
int memory_is_pinned(const void *address);

/* facts.c */
int device_attribute(CUdevice_attribute attribute);

#endif
