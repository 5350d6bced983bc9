/* Many callers of csrc/runtime's thread pool; some start a job within a task. Each task must run
 * once, and sanitizers must report nothing. Usage: thread_pool_stress callers jobs */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

#include "runtime/thread_pool.h"

enum { MOST = 37 };

typedef struct {
    int count, depth;
    int done[MOST]; /* not atomic: no two threads may have the same task */
} batch;

static atomic_long wrong;
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

static void *caller(void *number)
{
    for (int i = 0; i < jobs; i++) {
        batch b = {.count = 1 + (int)((size_t)number + i) % MOST, .depth = i % 16 == 0};
        qkv_notify_call_start();
        run_batch(&b);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[64];
    const int callers = argc > 1 ? atoi(argv[1]) : 16;
    jobs = argc > 2 ? atoi(argv[2]) : 1000;
    qkv_assume_cpus(8);
    for (int i = 0; i < callers; i++) pthread_create(&threads[i], NULL, caller, (void *)(size_t)i);
    for (int i = 0; i < callers; i++) pthread_join(threads[i], NULL);
    printf("%ld wrong\n", atomic_load(&wrong));
    return wrong != 0;
}
