// A pool of threads that share loops. See pool.cpp for how it waits.
#pragma once
#include "gemcut.h"

// Computes items [begin, end) of a loop. `worker` is 0 (the caller) ... threads - 1: an index for scratch memory.
typedef void (*gemcut_task)(void* context, int64_t begin, int64_t end, int worker);

// Runs `task` over [0, items) in pieces of `grain` items (the last may be shorter) on at most `threads` threads, the
// caller among them, and returns when all is done. Each thread owns one run of pieces and, when through with it, takes
// pieces from the others, so that a thread that the system keeps waiting holds up one piece at most.
// A call from inside a task, or while another thread's loop has the pool, is computed by the caller alone.
GEMCUT_EXPORT void gemcut_parallel(gemcut_task task, void* context, int64_t items, int64_t grain, int threads);
