/* Many callers of csrc/runtime's thread pool; some start a job within a task. Each task must run
 * once, and sanitizers must report nothing. Usage: thread_pool_stress callers jobs
 *
 * Its threads are made as the pool's are, so that it runs on Windows too (tests/cross_windows.sh). */
#define _GNU_SOURCE
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "runtime/clock.h"
#include "runtime/thread_pool.h"
#include "runtime/threads.h"

enum { MOST = 37 };

typedef struct {
    int count, depth;
    int done[MOST]; /* not atomic: no two threads may have the same task */
} batch;

static atomic_long wrong;
static atomic_int running_callers;
static int jobs;

static void run_batch(batch *b);

static void task(const void *context, int thread, ptrdiff_t i)
{
    batch *b = (batch *)context;
    b->done[i] += 1 + 0 * thread;
    if (b->depth && i == 3) {
        batch inner = {.count = 5};
        run_batch(&inner);
    }
}

static void run_batch(batch *b)
{
    qkv_run_tasks(task, NULL, b, b->count, 1 + b->count % 8, b->count % 3 == 0);
    for (int i = 0; i < b->count; i++) wrong += b->done[i] != 1;
}

static thread_result THREAD_CALL caller(void *number)
{
    for (int i = 0; i < jobs; i++) {
        batch b = {.count = 1 + (int)((size_t)number + i) % MOST, .depth = i % 16 == 0};
        qkv_notify_call_start();
        run_batch(&b);
    }
    atomic_fetch_sub(&running_callers, 1);
    return 0;
}

/* Two tasks that each wait for the other: some other thread must have taken one. */
static void meet(const void *context, int thread, ptrdiff_t i)
{
    atomic_int *arrived = (atomic_int *)context;
    const long long latest = nanoseconds() + 30000000000;
    (void)thread, (void)i;
    atomic_fetch_add(arrived, 1);
    while (atomic_load(arrived) < 2 && nanoseconds() < latest) yield_cpu();
    wrong += atomic_load(arrived) < 2;
}

int main(int argc, char **argv)
{
    os_thread threads[64];
    const int callers = argc > 1 ? atoi(argv[1]) : 16;
    jobs = argc > 2 ? atoi(argv[2]) : 1000;
    qkv_assume_cpus(8);
    running_callers = callers;
    for (int i = 0; i < callers; i++)
        if (!start_thread(&threads[i], caller, (void *)(size_t)i)) return 2;
    while (atomic_load(&running_callers)) yield_cpu();
    atomic_int arrived = 0;
    qkv_run_tasks(meet, NULL, &arrived, 2, 2, 0);
    printf("%ld wrong\n", atomic_load(&wrong));
    return wrong != 0;
}
