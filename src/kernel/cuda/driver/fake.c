// A driver and a compiler for tests, where there is no GPU. It has two devices whose memory is the CPU's, and one kernel,
// x[i] = 3 y[i], whatever the source says. It is stricter than a real one: work waits in its queue until somebody waits
// for it, memory must not be freed before that, copies come from pinned memory only, and every call needs its context.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NO_DEVICE = 101, BAD_IMAGE = 200, BAD_CONTEXT = 201, NOT_FOUND = 500, BUSY = 600 };

struct Memory { uint64_t at, size; int pinned; };
struct Work { int kind; uint64_t to, from, n; long *event; };
enum { COPY, KERNEL, EVENT };

static struct { int device; long retained; } contexts[2] = {{0, 0}, {1, 0}};
static _Thread_local void *current;
static struct Memory memory[1024];
static struct Work queue[1024];
static int queued, events, modules, compiled;

// What was not given back.
int fakeLive(void) {
    int live = events + modules + contexts[0].retained + contexts[1].retained;
    for (int i = 0; i < 1024; i++) live += memory[i].at != 0;
    return live;
}
int fakeCompiled(void) { return compiled; }

static void *find(uint64_t at, uint64_t n, int pinned) {
    for (int i = 0; i < 1024; i++) {
        struct Memory *m = &memory[i];
        if (m->at && m->pinned == pinned && m->at <= at && at + n <= m->at + m->size) return m;
    }
    return 0;
}
static int take(uint64_t *at, uint64_t n, int pinned) {
    if (!current) return BAD_CONTEXT;
    if (n == 0) return INVALID;
    if (n > 1ull << 40) return NO_MEMORY;
    for (int i = 0; i < 1024; i++) {
        if (memory[i].at) continue;
        void *p = malloc(n);
        memset(p, 0xa5, n);
        memory[i] = (struct Memory){(uint64_t)(uintptr_t)p, n, pinned};
        *at = memory[i].at;
        return OK;
    }
    return NO_MEMORY;
}
static int give(uint64_t at, int pinned) {
    if (!current) return BAD_CONTEXT;
    if (queued) return BUSY;
    struct Memory *m = find(at, 1, pinned);
    if (!m || m->at != at) return INVALID;
    free((void *)(uintptr_t)at);
    m->at = 0;
    return OK;
}
// Does all that is queued, up to an event if one is given.
static void work(long *event) {
    int done = 0;
    while (done < queued) {
        struct Work w = queue[done++];
        if (w.kind == COPY) memcpy((void *)(uintptr_t)w.to, (void *)(uintptr_t)w.from, w.n);
        if (w.kind == KERNEL)
            for (uint64_t i = 0; i < w.n; i++) ((uint64_t *)(uintptr_t)w.to)[i] = 3 * ((uint64_t *)(uintptr_t)w.from)[i];
        if (w.kind == EVENT && --*w.event == 0 && w.event == event) break;
    }
    memmove(queue, queue + done, (queued - done) * sizeof *queue);
    queued -= done;
}

int cuInit(unsigned flags) { return flags ? INVALID : OK; }
int cuGetErrorString(int code, const char **text) { *text = code == NO_MEMORY ? "out of memory" : "an error"; return OK; }
int cuDeviceGetCount(int *n) { *n = 2; return OK; }
int cuDeviceGet(int *device, int n) { *device = n; return n < 0 || n > 1 ? NO_DEVICE : OK; }
int cuDeviceGetAttribute(int *x, int what, int device) { *x = what == 75 ? 9 : what == 76 ? 0 : 1; return device > 1 ? NO_DEVICE : OK; }
int cuDevicePrimaryCtxRetain(void **context, int device) { contexts[device].retained++; *context = &contexts[device]; return OK; }
int cuDevicePrimaryCtxRelease_v2(int device) { return contexts[device].retained-- > 0 ? OK : BAD_CONTEXT; }
int cuCtxGetCurrent(void **context) { *context = current; return OK; }
int cuCtxSetCurrent(void *context) { current = context; return OK; }
int cuMemAlloc_v2(uint64_t *at, size_t n) { return take(at, n, 0); }
int cuMemFree_v2(uint64_t at) { return give(at, 0); }
int cuMemHostAlloc(void **at, size_t n, unsigned flags) { return flags ? INVALID : take((uint64_t *)at, n, 1); }
int cuMemFreeHost(void *at) { return give((uint64_t)(uintptr_t)at, 1); }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t n, void *stream) {
    uint64_t host = (uint64_t)(uintptr_t)from;
    if (!current || stream) return BAD_CONTEXT;
    if (!find(to, n, 0) || !find(host, n, 1)) return INVALID;
    queue[queued++] = (struct Work){COPY, to, host, n, 0};
    return OK;
}
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t n) {
    if (!current) return BAD_CONTEXT;
    if (!find(from, n, 0)) return INVALID;
    work(0);
    memcpy(to, (void *)(uintptr_t)from, n);
    return OK;
}
int cuEventCreate(void **event, unsigned flags) { events++; *event = calloc(1, sizeof(long)); return flags == 2 && current ? OK : INVALID; }
int cuEventRecord(void *event, void *stream) {
    if (!current || stream) return BAD_CONTEXT;
    ++*(long *)event;
    queue[queued++] = (struct Work){EVENT, 0, 0, 0, event};
    return OK;
}
int cuEventSynchronize(void *event) { if (*(long *)event) work(event); return OK; }
int cuEventDestroy_v2(void *event) { events--; free(event); return OK; }
int cuStreamSynchronize(void *stream) { work(0); return stream || !current ? BAD_CONTEXT : OK; }
int cuModuleLoadData(void **module, const void *image) {
    *module = &modules;
    if (!current) return BAD_CONTEXT;
    if (memcmp(image, "FAKE", 4)) return BAD_IMAGE;
    modules++;
    return OK;
}
int cuModuleUnload(void *module) { modules--; return module == &modules ? OK : INVALID; }
int cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = module;
    return module == &modules && !strcmp(name, "pass") ? OK : NOT_FOUND;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **arguments, void **extra) {
    if (!current || stream) return BAD_CONTEXT;
    if (function != &modules || gy * gz * by * bz != 1 || gx == 0 || bx != 512 || shared || extra) return INVALID;
    uint64_t x[3];
    for (int i = 0; i < 3; i++) x[i] = *(uint64_t *)arguments[i];
    if (x[2] > (uint64_t)gx * bx || !find(x[0], 8 * x[2], 0) || !find(x[1], 8 * x[2], 0)) return INVALID;
    queue[queued++] = (struct Work){KERNEL, x[0], x[1], x[2], 0};
    return OK;
}

// The compiler. A source that has `#error` in it fails.
static const char *source;
int nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return OK; }
int nvrtcGetNumSupportedArchs(int *n) { *n = 2; return OK; }
int nvrtcGetSupportedArchs(int *all) { all[0] = 75; all[1] = 90; return OK; }
const char *nvrtcGetErrorString(int code) { return code == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR"; }
int nvrtcCreateProgram(void **program, const char *text, const char *name, int n, const char **headers, const char **names) {
    source = text;
    *program = &source;
    return strcmp(name, "pass.cu") || n || headers || names;
}
int nvrtcCompileProgram(void *program, int n, const char **options) {
    int own = 0;
    for (int i = 0; i < n; i++) own += !strcmp(options[i], "--gpu-architecture=sm_90");
    compiled++;
    return !own || program != &source ? 5 : strstr(source, "#error") ? 6 : OK;
}
int nvrtcDestroyProgram(void **program) { *program = 0; return OK; }
int nvrtcGetProgramLogSize(void *program, size_t *n) { *n = 64; return program != &source; }
int nvrtcGetProgramLog(void *program, char *text) { snprintf(text, 64, "pass.cu(2): error: as it says\n"); return program != &source; }
int nvrtcGetCUBINSize(void *program, size_t *n) { *n = 5; return program != &source; }
int nvrtcGetCUBIN(void *program, char *image) { memcpy(image, "FAKE", 5); return program != &source; }
int nvrtcGetPTXSize(void *program, size_t *n) { *n = 0; return program != 0; }
int nvrtcGetPTX(void *program, char *image) { return program != image; }
