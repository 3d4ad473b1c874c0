/* Streams, events and graphs: nothing is pending, ever; a stream that is captured records its work.
 *
 * What CUDA forbids inside a capture fails here too, says why, and spoils the capture. In one thing this
 * is stricter: on a GPU work on the legacy stream, beside the capture of a stream that does not wait
 * for it, as torch's, runs at once and is missing from the graph. */
#include "device.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

struct CUgraph_st {
    struct work *works;
    size_t count, room;
    int owners; /* as a graph, and of those that can be launched */
};

struct capture {
    struct CUgraph_st *graph;
    struct stream *origin;
    enum cudaStreamCaptureMode mode;
    unsigned long long id;
    pthread_t thread;
    int spoilt;
};

struct stream {
    struct capture *capture;
    unsigned long works, joined; /* in this capture; how many of them its origin waits for */
    struct stream *next;
};

struct event {
    struct capture *capture; /* that its last record was in */
    struct stream *stream;
    unsigned long works;
};

static struct stream *streams;
static struct capture *captures[16]; /* those that go on */
static int capture_count;
static unsigned long long last_id;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread enum cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
static __thread cudaError_t last_error;
static __thread char reason[512];

/* NULL, 1 and 2 are the default streams' handles. */
static struct stream *known(const void *stream) {
    return (size_t)stream > 2 ? (struct stream *)stream : NULL;
}

static struct capture *capture_of(const void *stream) {
    struct stream *found = known(stream);
    return found ? found->capture : NULL;
}

static struct capture *capture_of_thread(void) {
    for (int i = 0; i < capture_count; i++)
        if (captures[i]->mode != cudaStreamCaptureModeRelaxed &&
            pthread_equal(captures[i]->thread, pthread_self()))
            return captures[i];
    return NULL;
}

/* Events outlive the captures that they name, which are never freed. */
static int goes_on(const struct capture *capture) {
    for (int i = 0; i < capture_count; i++)
        if (captures[i] == capture)
            return 1;
    return 0;
}

/* ---- what a capture forbids ---- */

static cudaError_t fail(struct capture *capture, cudaError_t error, const char *call,
                        const char *why) {
    if (capture)
        capture->spoilt = 1;
    snprintf(reason, sizeof reason, "%s in a capture: %s", call, why);
    return last_error = error;
}

cudaError_t capture_forbids(cudaError_t error, const char *call, const char *why) {
    return fail(capture_count ? captures[capture_count - 1] : NULL, error, call, why);
}

int is_capturing(const void *stream) { return capture_of(stream) != NULL; }

cudaError_t capture_allows(const char *call, const void *stream) {
    if (capture_count && !known(stream))
        return capture_forbids(cudaErrorStreamCaptureImplicit, call, "it is on the legacy stream");
    return cudaSuccess;
}

cudaError_t capture_allows_unsafe(const char *call) {
    if (mode == cudaStreamCaptureModeRelaxed)
        return cudaSuccess;
    struct capture *own = capture_of_thread();
    if (own)
        return fail(own, cudaErrorStreamCaptureUnsupported, call, "it is not allowed there");
    for (int i = 0; i < capture_count && mode == cudaStreamCaptureModeGlobal; i++)
        if (captures[i]->mode == cudaStreamCaptureModeGlobal)
            return fail(captures[i], cudaErrorStreamCaptureUnsupported, call,
                        "no thread may do it there");
    return cudaSuccess;
}

cudaError_t capture_allows_wait(const char *call, const void *stream) {
    struct capture *capture = capture_of(stream);
    if (capture)
        return fail(capture, cudaErrorStreamCaptureUnsupported, call, "the host may not wait");
    return capture_allows_unsafe(call);
}

int graph_takes(struct work work, const void *stream) {
    struct capture *capture = capture_of(stream);
    if (!capture)
        return 0;
    struct CUgraph_st *graph = capture->graph;
    pthread_mutex_lock(&lock);
    if (graph->count == graph->room) {
        graph->room = 2 * graph->room + 64;
        graph->works = realloc(graph->works, graph->room * sizeof work);
        if (!graph->works)
            refuse("a graph without host memory");
    }
    graph->works[graph->count++] = work;
    known(stream)->works++;
    pthread_mutex_unlock(&lock);
    return 1;
}

EXPORT cudaError_t cudaPeekAtLastError(void) { return last_error; }
EXPORT cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
EXPORT const char *cudaGetErrorName(cudaError_t error) { return "counting device"; }
EXPORT const char *cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorMemoryAllocation)
        return "the counting device is out of memory";
    return error >= cudaErrorStreamCaptureUnsupported && error <= cudaErrorStreamCaptureWrongThread
               ? reason
               : "error of the counting device";
}

/* ---- streams ---- */

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    struct stream *made = calloc(1, sizeof *made);
    if (!made)
        return cudaErrorMemoryAllocation;
    pthread_mutex_lock(&lock);
    made->next = streams;
    streams = made;
    pthread_mutex_unlock(&lock);
    *stream = (cudaStream_t)made;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    return cudaStreamCreateWithPriority(stream, 0, 0);
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
    return capture_allows_wait(__func__, stream);
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    cudaError_t error = capture_allows_wait(__func__, stream);
    if (!error)
        log_wait(__func__);
    return error;
}
EXPORT cudaError_t cudaDeviceSynchronize(void) {
    if (capture_count)
        return capture_forbids(cudaErrorStreamCaptureUnsupported, __func__,
                               "the host may not wait");
    log_wait(__func__);
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    if (is_capturing(stream))
        refuse("a call of the host in a graph");
    function(data);
    return cudaSuccess;
}

/* ---- events ---- */

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = calloc(1, sizeof(struct event));
    return *event ? cudaSuccess : cudaErrorMemoryAllocation;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) {
    return cudaEventCreateWithFlags(event, 0);
}
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream,
                                            unsigned flags) {
    struct event *recorded = (struct event *)event;
    cudaError_t error = capture_allows(__func__, stream);
    if (error)
        return error;
    *recorded = (struct event){capture_of(stream), known(stream), 0};
    if (recorded->capture)
        recorded->works = recorded->stream->works;
    return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
    struct event *asked = (struct event *)event;
    if (asked->capture)
        return fail(asked->capture, cudaErrorCapturedEvent, __func__, "it has no answer");
    return capture_allows_unsafe(__func__);
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    struct event *asked = (struct event *)event;
    if (asked->capture)
        return fail(asked->capture, cudaErrorCapturedEvent, __func__, "it never comes");
    cudaError_t error = capture_allows_unsafe(__func__);
    if (!error)
        log_wait(__func__);
    return error;
}
/* Not a time: whoever compares candidates finds them equal and keeps the first. */
EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    *milliseconds = 1.0f;
    return cudaSuccess;
}

/* A stream that waits for one that is captured joins the capture; the first one has to wait for it
 * before the capture ends. */
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    struct stream *waiting = known(stream);
    struct event *awaited = (struct event *)event;
    if (is_capturing(stream) && awaited->capture != waiting->capture)
        return fail(waiting->capture, cudaErrorStreamCaptureIsolation, __func__,
                    "the event is from outside");
    if (!awaited->capture)
        return cudaSuccess;
    if (!goes_on(awaited->capture))
        return fail(NULL, cudaErrorCapturedEvent, __func__, "it never comes");
    if (!waiting)
        return fail(awaited->capture, cudaErrorStreamCaptureImplicit, __func__,
                    "the legacy stream would join it");
    pthread_mutex_lock(&lock);
    if (!waiting->capture)
        waiting->works = waiting->joined = 0;
    waiting->capture = awaited->capture;
    waiting->works++;
    if (awaited->stream != waiting && awaited->stream->joined < awaited->works)
        awaited->stream->joined = awaited->works;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

/* ---- captures ---- */

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *wanted) {
    enum cudaStreamCaptureMode before = mode;
    mode = *wanted;
    *wanted = before;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode wanted) {
    struct stream *origin = known(stream);
    if (!origin)
        return fail(NULL, cudaErrorStreamCaptureUnsupported, __func__, "of the legacy stream");
    if (origin->capture)
        return fail(origin->capture, cudaErrorIllegalState, __func__, "the stream is captured");
    if (capture_count == sizeof captures / sizeof captures[0])
        refuse("so many captures");
    struct capture *made = calloc(1, sizeof *made);
    struct CUgraph_st *graph = calloc(1, sizeof *graph);
    if (!made || !graph)
        return cudaErrorMemoryAllocation;
    graph->owners = 1;
    *made = (struct capture){graph, origin, wanted, ++last_id, pthread_self(), 0};
    captures[capture_count++] = made;
    origin->capture = made;
    origin->works = origin->joined = 0;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream,
                                         enum cudaStreamCaptureStatus *status) {
    struct capture *capture = capture_of(stream);
    *status = !capture          ? cudaStreamCaptureStatusNone
              : capture->spoilt ? cudaStreamCaptureStatusInvalidated
                                : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream,
                                            enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *graph,
                                            const cudaGraphNode_t **nodes,
                                            const cudaGraphEdgeData **edges, size_t *count) {
    struct capture *capture = capture_of(stream);
    if (id)
        *id = capture ? capture->id : 0;
    if (graph)
        *graph = capture ? capture->graph : NULL;
    if (count)
        *count = 0;
    return cudaStreamIsCapturing(stream, status);
}

static void give(struct CUgraph_st *graph) {
    if (--graph->owners)
        return;
    for (size_t i = 0; i < graph->count; i++)
        free(graph->works[i].line);
    free(graph->works);
    free(graph);
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out) {
    struct capture *capture = capture_of(stream);
    *out = NULL;
    if (!capture)
        return fail(NULL, cudaErrorIllegalState, __func__, "there is none");
    if (capture->origin != known(stream))
        return fail(capture, cudaErrorStreamCaptureUnmatched, __func__, "another stream began it");
    if (capture->mode != cudaStreamCaptureModeRelaxed &&
        !pthread_equal(capture->thread, pthread_self()))
        return fail(capture, cudaErrorStreamCaptureWrongThread, __func__, "another thread began it");
    cudaError_t error = cudaSuccess;
    if (capture->spoilt) /* `reason` says with what */
        error = last_error = cudaErrorStreamCaptureInvalidated;
    for (struct stream *each = streams; each; each = each->next) {
        if (each->capture != capture)
            continue;
        if (!error && each != capture->origin && each->joined < each->works)
            error = fail(capture, cudaErrorStreamCaptureUnjoined, __func__,
                         "a stream that joined it is not waited for");
        each->capture = NULL;
    }
    for (int i = 0; i < capture_count; i++)
        if (captures[i] == capture)
            captures[i] = captures[--capture_count];
    if (error)
        give(capture->graph);
    else
        *out = capture->graph;
    return error;
}

/* ---- graphs ---- */

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *out, cudaGraph_t graph,
                                                 unsigned long long flags) {
    graph->owners++;
    *out = (cudaGraphExec_t)graph;
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph,
                                        unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(out, graph, flags);
}
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    give(graph);
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    give((cudaGraph_t)graph);
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    if (nodes)
        refuse("what a graph holds");
    *count = graph->count;
    return cudaSuccess;
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t launched, cudaStream_t stream) {
    const struct CUgraph_st *graph = (const struct CUgraph_st *)launched;
    cudaError_t error = capture_allows(__func__, stream);
    if (error)
        return error;
    if (is_capturing(stream))
        refuse("a graph in a graph");
    log_graph(graph->count, stream);
    for (size_t i = 0; i < graph->count; i++)
        work_do(graph->works + i, stream);
    return cudaSuccess;
}

#define NEVER_CALLED(name) EXPORT void name##_(void) __asm__(#name); \
    void name##_(void) { refuse(#name); }
NEVER_CALLED(cudaStreamBeginCaptureToGraph)
NEVER_CALLED(cudaStreamUpdateCaptureDependencies)
NEVER_CALLED(cudaGraphAddNode)
NEVER_CALLED(cudaGraphConditionalHandleCreate)
NEVER_CALLED(cudaGraphNodeGetDependencies)
NEVER_CALLED(cudaGraphRetainUserObject)
NEVER_CALLED(cudaUserObjectCreate)
NEVER_CALLED(cudaUserObjectRelease)
