/* A loop of tasks that several threads share: who takes which task, and when all are done.
 *
 * The caller is thread 0; its helpers come from the library's own pool (thread_pool.c) or from an
 * OpenMP team that is awake anyway (openmp_team.c). */
#ifndef QKV_JOB_H
#define QKV_JOB_H

#include <stdatomic.h>
#include <stddef.h>

#include "clock.h"
#include "thread_pool.h"

#define MAX_HELPERS 255

typedef struct { /* the range of tasks that a thread starts with, on a cache line of its own */
    _Alignas(64) _Atomic ptrdiff_t next;
    ptrdiff_t end;
} task_range;

typedef struct {
    qkv_task task;
    qkv_wait wait; /* what the caller does now and then while it waits, or NULL */
    const void *context;
    task_range *ranges; /* one for each thread */
    int threads;
    long long began;    /* nanoseconds() when it was handed out */
    struct worker **hired; /* of the own pool: thread i is hired[i - 1] */
    atomic_int running; /* helpers that have not yet left */
} job;

/* Tells the CPU that the thread spins. */
void pause_briefly(void);

/* Divides `count` tasks among the job's threads. */
void divide_tasks(job *j, ptrdiff_t count);

/* Runs the tasks of the thread's range, then what is left of the others' ranges; returns how
 * many. Neighbouring tasks share inputs, so a range for each thread keeps those in one core's
 * cache. */
ptrdiff_t work_on(job *j, int thread);

/* A helper's last act: the caller may return now, and the job is gone. */
void leave_job(job *j);

/* The caller waits until all helpers have left. */
void wait_for_helpers(job *j);

/* Runs the tasks on the caller and at most j->threads - 1 members of an OpenMP team of its, if one
 * is likely to be awake, or `always`. Returns 0, and has done nothing, if not. */
int run_on_openmp_team(job *j, ptrdiff_t count, int always);

#endif
