// Computes: a loop over items, shared by threads
// Shapes: items [0, n) in chunks of `grain`
// Runs: every kernel of this library, from any Python thread with the GIL released
// Schedule: static split with work stealing (Blumofe and Leiserson 1999); pool.cpp says how threads wait
// Invariants: gemcut_parallel returns when all items are done; a call from inside a task runs alone
#pragma once
#include "gemcut.h"

// Computes items [begin, end) of a loop. `worker` is 0 (the caller) ... threads - 1: an index for scratch memory.
typedef void (*gemcut_task)(void* context, int64_t begin, int64_t end, int worker);

// Runs `task` over [0, items) in chunks of `grain` items (the last may be shorter) on at most `threads` threads, the
// caller among them, and returns when all is done. Each thread owns a range of chunks and, when through with it, takes
// chunks from the others, so that a thread that the system keeps waiting holds up one chunk at most.
// A call from inside a task, or while another thread's loop has the pool, is computed by the caller alone.
GEMCUT_EXPORT void gemcut_parallel(gemcut_task task, void* context, int64_t items, int64_t grain, int threads);
