// Computes: threads that share loops with as little waiting as the system allows
// Shapes: at most 256 threads; an epoch and one cursor a thread
// Runs: gemcut_parallel (pool.h); the caller works too
// Schedule: static split with work stealing; waiting is a spin of some tens of microseconds, then a futex
// Invariants: no chunk is done twice or left out; a thread that computes nothing uses no processor
//
// A loop is published by raising `epoch`. Every participant p owns the chunks [p * n / threads, (p + 1) * n / threads)
// and takes them by advancing its cursor. A cursor holds the epoch in its upper half, so a thread that wakes up late
// cannot take chunks of a loop that is over: its compare-exchange fails. Therefore nobody has to wait until a sleeping
// thread has woken. If it is late, its chunks are done by others.
//
// The spin covers the gap between two layers. After it a process that computes nothing uses no processor, and other
// programs get theirs.
#include "pool.h"

#include <atomic>
#include <pthread.h>
#include <time.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int MAX_THREADS = 256;
constexpr int64_t SPIN_NANOSECONDS = 40000;

struct alignas(64) Cursor {
    std::atomic<uint64_t> value{0};  // epoch << 32 | next chunk
};

struct Loop {
    gemcut_task task;
    void* context;
    int64_t items, grain, chunks;
    int threads;
};

// The current loop, which late threads may read while the next one is written: hence words that are whole.
struct Shared {
    std::atomic<uint64_t> words[6];

    void write(const Loop& loop) {
        const uint64_t values[6] = {uint64_t(reinterpret_cast<uintptr_t>(loop.task)),
                                    uint64_t(reinterpret_cast<uintptr_t>(loop.context)),
                                    uint64_t(loop.items), uint64_t(loop.grain), uint64_t(loop.chunks),
                                    uint64_t(loop.threads)};
        for (int i = 0; i < 6; ++i) words[i].store(values[i], std::memory_order_relaxed);
    }

    Loop read() const {
        uint64_t values[6];
        for (int i = 0; i < 6; ++i) values[i] = words[i].load(std::memory_order_relaxed);
        return {reinterpret_cast<gemcut_task>(uintptr_t(values[0])), reinterpret_cast<void*>(uintptr_t(values[1])),
                int64_t(values[2]), int64_t(values[3]), int64_t(values[4]), int(values[5])};
    }
};

struct Pool {
    alignas(64) std::atomic<uint32_t> epoch{0};
    alignas(64) std::atomic<int32_t> asleep{0};
    alignas(64) std::atomic<uint32_t> done{0};      // chunks of the current loop
    std::atomic<uint32_t> caller_sleeps{0};
    alignas(64) std::atomic<bool> busy{false};
    std::atomic<int> started{0};                    // worker threads, without the caller
    Shared loop{};
    int cursors_used = 0;                           // by the loop before
    Cursor cursors[MAX_THREADS];
#if !defined(__linux__)
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
#endif
};

Pool pool;

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// Sleeps while `word` holds `seen`; may return early.
void sleep_while(std::atomic<uint32_t>& word, uint32_t seen) {
#if defined(__linux__)
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
#else
    pthread_mutex_lock(&pool.mutex);
    while (word.load() == seen) pthread_cond_wait(&pool.condition, &pool.mutex);
    pthread_mutex_unlock(&pool.mutex);
#endif
}

// Wakes up to `count` threads that sleep on `word`, which has changed.
void wake(std::atomic<uint32_t>& word, int count) {
#if defined(__linux__)
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
#else
    (void)word, (void)count;
    pthread_mutex_lock(&pool.mutex);
    pthread_cond_broadcast(&pool.condition);
    pthread_mutex_unlock(&pool.mutex);
#endif
}

// Spins until `word` differs from `seen`, for SPIN_NANOSECONDS at most. Returns whether it does.
bool spin_while(std::atomic<uint32_t>& word, uint32_t seen) {
    const int64_t end = now() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < 32; ++i) {
            if (word.load(std::memory_order_acquire) != seen) return true;
            relax();
        }
    } while (now() < end);
    return false;
}

void run_chunk(const Loop& loop, int64_t chunk, int worker) {
    const int64_t begin = chunk * loop.grain;
    const int64_t end = begin + loop.grain < loop.items ? begin + loop.grain : loop.items;
    loop.task(loop.context, begin, end, worker);
}

// Does own chunks, then those of the others. `loop` was read after `epoch` was seen. Cursors are closed before the next
// loop is written (see gemcut_parallel), so a successful exchange proves that the copy is whole and of this epoch.
void work(uint32_t epoch, const Loop& loop, int self) {
    for (int turn = 0; turn < loop.threads; ++turn) {
        const int owner = (self + turn) % loop.threads;
        std::atomic<uint64_t>& cursor = pool.cursors[owner].value;
        const uint64_t end = uint64_t(loop.chunks) * (owner + 1) / loop.threads;
        uint64_t seen = cursor.load(std::memory_order_acquire);
        while (uint32_t(seen >> 32) == epoch && (seen & 0xffffffffu) < end) {
            if (!cursor.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
            run_chunk(loop, int64_t(seen & 0xffffffffu), self);
            const uint32_t finished = pool.done.fetch_add(1) + 1;
            if (finished == uint32_t(loop.chunks) && pool.caller_sleeps.load()) wake(pool.done, 1);
            seen = cursor.load(std::memory_order_acquire);
        }
        if (uint32_t(seen >> 32) != epoch) return;
    }
}

void* worker_main(void* argument) {
    const int self = int(reinterpret_cast<intptr_t>(argument));
    uint32_t seen = 0;
    for (;;) {
        if (pool.epoch.load(std::memory_order_acquire) == seen && !spin_while(pool.epoch, seen)) {
            pool.asleep.fetch_add(1);
            while (pool.epoch.load() == seen) sleep_while(pool.epoch, seen);
            pool.asleep.fetch_sub(1);
        }
        seen = pool.epoch.load(std::memory_order_acquire);
        // The fields may be those of a later loop, half written: work() finds that out before it uses the task.
        const Loop loop = pool.loop.read();
        std::atomic_thread_fence(std::memory_order_acquire);
        if (self < loop.threads) work(seen, loop, self);
    }
    return nullptr;
}

// A child of fork() has no worker threads: it starts its own when it needs them. If another thread's loop was running,
// its remaining chunks are nobody's here: the first worker would find the loop's epoch current and do them.
void after_fork_in_child() {
    for (Cursor& cursor : pool.cursors) cursor.value.store(0);
    pool.started.store(0);
    pool.asleep.store(0);
    pool.caller_sleeps.store(0);
    pool.busy.store(false);
}

// Has at least `count` workers started if the system allows; returns how many there are.
int start_workers(int count) {
    static std::atomic<bool> hooked{false};
    if (!hooked.exchange(true)) pthread_atfork(nullptr, nullptr, after_fork_in_child);
    int have = pool.started.load();
    while (have < count) {
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
        pthread_t thread;
        const int failed =
            pthread_create(&thread, &attributes, worker_main, reinterpret_cast<void*>(intptr_t(have + 1)));
        pthread_attr_destroy(&attributes);
        if (failed) break;
        pool.started.store(++have);
    }
    return have;
}

void run_alone(const Loop& loop) {
    for (int64_t chunk = 0; chunk < loop.chunks; ++chunk) run_chunk(loop, chunk, 0);
}

}  // namespace

GEMCUT_EXPORT void gemcut_parallel(gemcut_task task, void* context, int64_t items, int64_t grain, int threads) {
    if (items <= 0) return;
    if (grain < 1) grain = 1;
    if ((items + grain - 1) / grain > 0x7fffffff) grain = items / 0x40000000 + 1;
    Loop loop{task, context, items, grain, (items + grain - 1) / grain, threads};
    if (loop.threads > MAX_THREADS) loop.threads = MAX_THREADS;
    if (loop.threads > loop.chunks) loop.threads = int(loop.chunks);
    if (loop.threads < 2 || pool.busy.exchange(true, std::memory_order_acquire)) return run_alone(loop);
    const int have = start_workers(loop.threads - 1) + 1;
    if (loop.threads > have) loop.threads = have;
    if (loop.threads < 2) {
        pool.busy.store(false, std::memory_order_release);
        return run_alone(loop);
    }

    const uint32_t epoch = pool.epoch.load() + 1;
    for (int p = 0; p < pool.cursors_used; ++p) {
        pool.cursors[p].value.store(uint64_t(epoch) << 32 | 0xffffffffu, std::memory_order_relaxed);
    }
    pool.cursors_used = loop.threads;
    // Whoever reads a word of the new loop finds the old cursors closed (pairs with the fence in worker_main).
    std::atomic_thread_fence(std::memory_order_release);
    pool.loop.write(loop);
    pool.done.store(0);
    for (int p = 0; p < loop.threads; ++p) {
        const uint64_t first = uint64_t(loop.chunks) * p / loop.threads;
        pool.cursors[p].value.store(uint64_t(epoch) << 32 | first, std::memory_order_release);
    }
    pool.epoch.store(epoch);
    // Workers beyond those of this loop may sleep on: but a futex wakes any of them, so all are woken.
    if (pool.asleep.load() > 0) wake(pool.epoch, pool.started.load());
    work(epoch, loop, 0);

    const uint32_t chunks = uint32_t(loop.chunks);
    const int64_t spin_end = now() + SPIN_NANOSECONDS;
    uint32_t finished;
    while ((finished = pool.done.load(std::memory_order_acquire)) != chunks) {
        if (now() < spin_end) {
            for (int i = 0; i < 16 && pool.done.load(std::memory_order_acquire) != chunks; ++i) relax();
            continue;
        }
        pool.caller_sleeps.store(1);
        if ((finished = pool.done.load()) != chunks) sleep_while(pool.done, finished);
        pool.caller_sleeps.store(0);
    }
    pool.busy.store(false, std::memory_order_release);
}
