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

/* log.c: one JSON object a line, from counting_open to counting_close. */
void log_launch(const char *api, const char *name, dim3 grid, dim3 block, size_t shared,
                const void *stream);
void log_wait(const char *call);
void log_copy(const char *kind, size_t bytes);
void log_gemm(const char *call, const char *operations, long m, long n, long k, long batch,
              int bits_a, int bits_b, int bits_c, int reads_c);
void refuse(const char *what) __attribute__((noreturn));

/* memory.c: device memory is host memory that is committed when it is touched, so hardly ever. */
void *memory_take(size_t bytes);
void memory_give(void *address);
size_t memory_used(void);
int memory_is_device(const void *address);

/* facts.c */
int device_attribute(CUdevice_attribute attribute);

#endif
