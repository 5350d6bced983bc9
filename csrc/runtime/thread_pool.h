/* A small pool of threads for loops of tasks. Why not OpenMP alone: after a region libgomp's
 * workers spin for milliseconds on the cores that NumPy's BLAS wants next, or, told not to, sleep
 * and need tens of microseconds to wake (docs/architecture.md has the figures). Here an idle
 * worker spins shortly, offering its core to whoever wants it at every turn, and then sleeps.
 *
 * The pool is shared by all callers: one that finds too few idle workers runs on fewer threads,
 * so that many callers at once do not multiply the threads. */
#ifndef QKV_THREAD_POOL_H
#define QKV_THREAD_POOL_H

#include <stddef.h>

typedef void (*qkv_task)(const void *context, int thread, ptrdiff_t task);
typedef void (*qkv_wait)(const void *context);

/* task(context, thread, i) for 0 <= i < count, each once, on the calling thread and at most
 * threads - 1 workers; 0 <= thread < threads tells them apart. Each starts with a range of its
 * own, in rising order, and then helps the others. Returns when
 * all are done; while the calling thread waits for that, it calls wait(context), which may be NULL, again
 * and again. In a forked child everything runs on the calling thread. */
void qkv_run_tasks(qkv_task task, qkv_wait wait, const void *context, ptrdiff_t count,
                   int threads);

/* A call has begun that will have tasks soon: workers that are still awake wait for it. */
void qkv_notify_call_start(void);

/* Whether this process was forked from one that had loaded the library. */
int qkv_forked(void);

#endif
