// Sharing work among threads, and their scratch memory.
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef void (*ba_task)(void* context, int64_t task, float* scratch);

// Runs tasks 0 ... n-1 on up to `threads` threads, each with `floats` of its own aligned memory (uninitialised).
// Returns BA_OK, or BA_NO_MEMORY if a thread got none; then not every task has run.
int64_t ba_parallel(int64_t threads, int64_t n, int64_t floats, ba_task task, void* context);

// Aligned memory for `floats` numbers, NULL where there is none.
float* ba_allocate(int64_t floats);
void ba_release(float* memory);

static inline int64_t ba_padded(int64_t floats) { return (floats + 15) / 16 * 16; }  // whole cache lines
