// Threads: torch's own OpenMP pool where one is loaded, else threads of ours for the length of a call.
//
// A second OpenMP runtime beside torch's would be the worst of all: its idle workers spin on the cores that the other's
// need. So no OpenMP is linked; the one that torch loaded is looked up among the loaded libraries.

#include "parallel.hpp"

#include <stdlib.h>
#include <string.h>

#include "api.h"

#if defined(_WIN32)
#include <malloc.h>
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#else
#include <pthread.h>
#endif
#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#elif defined(__APPLE__)
#include <dlfcn.h>
#endif

float* ba_allocate(int64_t floats) {
    if (floats < 16) floats = 16;
    const size_t bytes = static_cast<size_t>(ba_padded(floats)) * sizeof(float);
#if defined(_WIN32)
    void* memory = _aligned_malloc(bytes, 64);
#else
    void* memory = NULL;
    if (posix_memalign(&memory, 64, bytes) != 0) memory = NULL;
#endif
#if defined(BA_POISON)
    if (memory != NULL) memset(memory, 0xff, bytes);  // NaN, as float and as bfloat16
#endif
    return static_cast<float*>(memory);
}

void ba_release(float* memory) {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    free(memory);
#endif
}

namespace {

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__linux__)
int look(struct dl_phdr_info* info, size_t, void* found) {
    const char* name = info->dlpi_name;
    if (name == NULL) return 0;
    const char* file = strrchr(name, '/');
    file = file == NULL ? name : file + 1;
    if (strncmp(file, "libgomp", 7) != 0 && strncmp(file, "libiomp5", 8) != 0 && strncmp(file, "libomp", 6) != 0)
        return 0;
    // torch brings its own copy; another package's copy is another pool.
    const bool of_torch = strstr(name, "torch") != NULL;
    const char** best = static_cast<const char**>(found);
    if (*best == NULL || of_torch) *best = name;
    return of_torch ? 1 : 0;
}

Parallel find() {
    const char* name = NULL;
    dl_iterate_phdr(look, &name);
    if (name == NULL) return NULL;
    void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    return library == NULL ? NULL : reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel"));
}
#elif defined(__APPLE__)
Parallel find() { return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }
#else
Parallel find() { return NULL; }
#endif

Parallel pool() {
    // Looked up until found: torch may be loaded after this library. A race finds the same thing twice.
    static Parallel found = NULL;
    Parallel known = __atomic_load_n(&found, __ATOMIC_RELAXED);
    if (known == NULL) {
        known = find();
        __atomic_store_n(&found, known, __ATOMIC_RELAXED);
    }
    return known;
}

struct Team {
    int64_t next, n, floats;
    ba_task task;
    void* context;
    int64_t failed;
};

void work(void* argument) {
    Team* team = static_cast<Team*>(argument);
    int64_t task = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED);
    if (task >= team->n) return;
    float* scratch = ba_allocate(team->floats);
    if (scratch == NULL) {
        __atomic_store_n(&team->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (; task < team->n; task = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED))
        team->task(team->context, task, scratch);
    ba_release(scratch);
}

#if defined(_WIN32)
typedef HANDLE Thread;

DWORD WINAPI work_in_thread(void* argument) {
    work(argument);
    return 0;
}

bool start(Thread* thread, Team* team) {
    *thread = CreateThread(NULL, 0, work_in_thread, team, 0, NULL);
    return *thread != NULL;
}

void wait_for(Thread thread) {
    WaitForSingleObject(thread, INFINITE);
    CloseHandle(thread);
}
#else
typedef pthread_t Thread;

void* work_in_thread(void* argument) {
    work(argument);
    return NULL;
}

bool start(Thread* thread, Team* team) { return pthread_create(thread, NULL, work_in_thread, team) == 0; }

void wait_for(Thread thread) { pthread_join(thread, NULL); }
#endif

}  // namespace

int64_t ba_parallel(int64_t threads, int64_t n, int64_t floats, ba_task task, void* context) {
    if (n <= 0) return BA_OK;
    Team team = {0, n, floats, task, context, 0};
    if (threads > n) threads = n;
    if (threads <= 1) {
        work(&team);
    } else if (Parallel parallel = pool()) {
        parallel(work, &team, static_cast<unsigned>(threads), 0);
    } else {
        enum { MOST = 63 };
        Thread others[MOST];
        int64_t started = 0;
        for (; started < threads - 1 && started < MOST; ++started)
            if (!start(&others[started], &team)) break;  // fewer threads, then
        work(&team);
        for (int64_t i = 0; i < started; ++i) wait_for(others[i]);
    }
    return team.failed ? BA_NO_MEMORY : BA_OK;
}

extern "C" int64_t ba_pool(void) { return pool() != NULL; }
