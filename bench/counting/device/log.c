/* The log: who reads it wants exact counts, so a line is whole or the process ends. */
#include "device.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static FILE *log_file;
static unsigned long kernels; /* launched by libtorch and pgolf's extension, so not counting Triton's */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Called by name (ctypes) in the one process that is counted. Its children, compilers among them,
 * never open a log, so that they cannot write into this one. Returns 0, or -1 if it can't. */
EXPORT int counting_open(const char *path) {
    log_file = fopen(path, "w");
    return log_file ? 0 : -1;
}

EXPORT int counting_close(void) {
    int failed = log_file ? fclose(log_file) : -1;
    log_file = NULL;
    return failed;
}

EXPORT const char *counting_name(void) { return DEVICE_NAME; }

static void line(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    pthread_mutex_lock(&lock);
    if (log_file && (vfprintf(log_file, format, arguments) < 0 || fputc('\n', log_file) == EOF)) {
        perror("counting device: cannot write its log");
        abort();
    }
    pthread_mutex_unlock(&lock);
    va_end(arguments);
}

/* A line of the caller's, in its place among the launches: say, the phase that begins. */
EXPORT void counting_note(const char *json) { line("%s", json); }

/* How many kernels of torch's own and of pgolf's extension were launched so far. */
EXPORT unsigned long counting_kernels(void) { return kernels; }

void log_launch(const char *api, const char *name, dim3 grid, dim3 block, size_t shared,
                const void *stream) {
    if (api[0] == 'r')
        __atomic_fetch_add(&kernels, 1, __ATOMIC_RELAXED);
    line("{\"kind\": \"kernel\", \"api\": \"%s\", \"name\": \"%s\", \"grid\": [%u, %u, %u], "
         "\"block\": [%u, %u, %u], \"shared\": %zu, \"stream\": %zu}",
         api, name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared,
         (size_t)stream);
}

void log_wait(const char *call) { line("{\"kind\": \"wait\", \"name\": \"%s\"}", call); }

void log_copy(const char *kind, size_t bytes) {
    line("{\"kind\": \"%s\", \"bytes\": %zu}", kind, bytes);
}

void log_gemm(const char *call, const char *operations, long m, long n, long k, long batch,
              int bits_a, int bits_b, int bits_c, int reads_c) {
    long bits = m * k * bits_a + k * n * bits_b + m * n * bits_c * (reads_c ? 2 : 1);
    line("{\"kind\": \"gemm\", \"name\": \"%s\", \"operations\": \"%s\", \"m\": %ld, \"n\": %ld, "
         "\"k\": %ld, \"batch\": %ld, \"bytes\": %ld}",
         call, operations, m, n, k, batch, batch * bits / 8);
}

void refuse(const char *what) {
    fprintf(stderr, "counting device: %s is not among the calls that it can count\n", what);
    fflush(NULL);
    _Exit(70);
}
