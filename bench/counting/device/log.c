/* The log: who reads it wants exact counts, so a line is whole or the process ends. */
#include "device.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

/* The works of graphs are done again from these lines: `stream` is where, and ends them. */
void work_do(const struct work *work, const void *stream) {
    if (work->to)
        memmove(work->to, work->from, work->bytes);
    line("%s, \"stream\": %zu}", work->line, (size_t)stream);
}

static void queue(struct work work, const void *stream, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (vasprintf(&work.line, format, arguments) < 0)
        refuse("a launch without host memory");
    va_end(arguments);
    if (graph_takes(work, stream))
        return;
    work_do(&work, stream);
    free(work.line);
}

/* A line that stands for work on a stream: it is captured as a launch is. Returns the error of one. */
EXPORT int counting_work(const char *json, const void *stream) {
    cudaError_t error = capture_allows("counting_work", stream);
    if (!error) /* without its brace */
        queue((struct work){0}, stream, "%.*s", (int)strlen(json) - 1, json);
    return error;
}

void log_launch(const char *api, const char *name, dim3 grid, dim3 block, size_t shared,
                const char *arguments, const void *stream) {
    if (api[0] == 'r')
        __atomic_fetch_add(&kernels, 1, __ATOMIC_RELAXED);
    queue((struct work){0}, stream,
          "{\"kind\": \"kernel\", \"api\": \"%s\", \"name\": \"%s\", \"grid\": [%u, %u, %u], "
          "\"block\": [%u, %u, %u], \"shared\": %zu, \"arguments\": [%s]",
          api, name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared, arguments);
}

void log_wait(const char *call) { line("{\"kind\": \"wait\", \"name\": \"%s\"}", call); }

void log_copy(const char *kind, void *to, const void *from, size_t bytes, int host,
              const void *stream) {
    queue((struct work){.to = host ? to : NULL, .from = from, .bytes = bytes}, stream,
          "{\"kind\": \"%s\", \"bytes\": %zu, \"arguments\": [%zu, %zu]", kind, bytes, (size_t)to,
          (size_t)from);
}

void log_memset(void *to, size_t bytes, const void *stream) {
    queue((struct work){0}, stream,
          "{\"kind\": \"memset\", \"bytes\": %zu, \"arguments\": [%zu]", bytes, (size_t)to);
}

void log_gemm(const char *call, const char *operations, long m, long n, long k, long batch,
              int bits_a, int bits_b, int bits_c, int reads_c, const void *a, const void *b,
              const void *c, const void *stream) {
    long bits = m * k * bits_a + k * n * bits_b + m * n * bits_c * (reads_c ? 2 : 1);
    queue((struct work){0}, stream,
          "{\"kind\": \"gemm\", \"name\": \"%s\", \"operations\": \"%s\", \"m\": %ld, "
          "\"n\": %ld, \"k\": %ld, \"batch\": %ld, \"bytes\": %ld, "
          "\"arguments\": [%zu, %zu, %zu]",
          call, operations, m, n, k, batch, batch * bits / 8, (size_t)a, (size_t)b, (size_t)c);
}

void log_graph(size_t works, const void *stream) {
    line("{\"kind\": \"graph\", \"works\": %zu, \"stream\": %zu}", works, (size_t)stream);
}

void refuse(const char *what) {
    fprintf(stderr, "counting device: %s is not among the calls that it can count\n", what);
    fflush(NULL);
    _Exit(70);
}
