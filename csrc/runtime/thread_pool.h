/* Loops of tasks on several threads: a small pool's, or those of an OpenMP team of another library
 * while it is awake anyway (openmp_team.c).
 *
 * Why not OpenMP alone: after a parallel region libgomp's workers spin for milliseconds on the
 * cores that NumPy's BLAS wants next; told not to, they sleep and need tens of microseconds to wake
 * (docs/threading.md has the figures). An idle worker of this pool spins for a short time and then
 * sleeps.
 *
 * All callers share the pool. A caller that finds too few idle workers runs on fewer threads, so
 * concurrent callers do not multiply the threads. */
#ifndef QKV_THREAD_POOL_H
#define QKV_THREAD_POOL_H

#include <stddef.h>

typedef void (*qkv_task)(const void *context, int thread, ptrdiff_t task);
typedef void (*qkv_wait)(const void *context);

/* Calls task(context, thread, i) once for each 0 <= i < count and returns when all are done, on the
 * calling thread and at most threads - 1 others. `thread` numbers them from 0, the calling thread.
 * Each thread starts with a range of its own, in rising order, and then helps the others. While the
 * calling thread waits for helpers, it calls wait(context) repeatedly; wait may be NULL.
 *
 * is_short: the loop takes less time than to wake a thread for it. Then this is only done where
 * calls follow each other so fast that the thread stays awake. In a forked child all tasks run on
 * the calling thread. The symbol is exported: threadpoolctl knows the library by it. */
#if defined(__GNUC__) && !defined(_WIN32)
__attribute__((visibility("default")))
#endif
void qkv_run_tasks(qkv_task task, qkv_wait wait, const void *context, ptrdiff_t count, int threads,
                   int is_short);

/* How many CPUs the calling thread may use, by its affinity. */
int qkv_usable_cpus(void);

/* Has qkv_usable_cpus say so from now on; 0 ends that. For tests on a machine with few CPUs. */
void qkv_assume_cpus(int count);

/* Which threads help the caller: with AUTO, those of an OpenMP team of another library while they
 * are awake, else the pool's. */
enum { QKV_THREADING_AUTO, QKV_THREADING_POOL, QKV_THREADING_OPENMP };
void qkv_set_threading(int choice);

/* How many loops of tasks have run on such a team. */
long qkv_team_jobs(void);

/* Says that a call has begun that will have tasks soon: workers that are awake stay awake for it.
 */
void qkv_notify_call_start(void);

/* Whether this process was forked from one that had loaded the library. */
int qkv_forked(void);

#endif
