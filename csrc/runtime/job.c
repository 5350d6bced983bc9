/* job.h: claiming tasks by a counter for each range; waiting by spinning, then on a condition. */
#include "job.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>

/* How long the caller spins for helpers that are at their last tasks, in nanoseconds, before it
 * gives its CPU away. A helper that another process keeps from running can then move there. */
#define SPIN_FOR_HELPERS 60000
/* How long it sleeps at most before it looks for signals again. */
#define LONGEST_SLEEP 50000000

static pthread_mutex_t leaving_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t helper_left = PTHREAD_COND_INITIALIZER;
static atomic_int sleeping_callers; /* of all jobs */

long long nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static ptrdiff_t min(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

void divide_tasks(job *j, ptrdiff_t count)
{
    const ptrdiff_t each = count / j->threads, more = count % j->threads;
    for (int i = 0; i < j->threads; i++) {
        atomic_store_explicit(&j->ranges[i].next, each * i + min(i, more), memory_order_relaxed);
        j->ranges[i].end = each * (i + 1) + min(i + 1, more);
    }
}

ptrdiff_t work_on(job *j, int thread)
{
    ptrdiff_t ran = 0;
    for (int k = 0; k < j->threads; k++) {
        task_range *range = &j->ranges[(thread + k) % j->threads];
        ptrdiff_t i;
        /* Others that have come to the end of a range only read its line. */
        if (k && atomic_load_explicit(&range->next, memory_order_relaxed) >= range->end) continue;
        while ((i = atomic_fetch_add_explicit(&range->next, 1, memory_order_relaxed)) < range->end)
            j->task(j->context, thread, i), ran++;
    }
    return ran;
}

void leave_job(job *j)
{
    atomic_fetch_sub(&j->running, 1);
    /* A caller counts itself as sleeping before it looks at `running` for the last time. */
    if (atomic_load(&sleeping_callers)) {
        pthread_mutex_lock(&leaving_mutex);
        pthread_cond_broadcast(&helper_left);
        pthread_mutex_unlock(&leaving_mutex);
    }
}

static void sleep_for_helpers(job *j)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += LONGEST_SLEEP;
    if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
    pthread_mutex_lock(&leaving_mutex);
    atomic_fetch_add(&sleeping_callers, 1);
    if (atomic_load(&j->running)) pthread_cond_timedwait(&helper_left, &leaving_mutex, &until);
    atomic_fetch_sub(&sleeping_callers, 1);
    pthread_mutex_unlock(&leaving_mutex);
}

void wait_for_helpers(job *j)
{
    if (!atomic_load_explicit(&j->running, memory_order_acquire)) return;
    const long long until = nanoseconds() + SPIN_FOR_HELPERS;
    for (int spins = 0; atomic_load_explicit(&j->running, memory_order_acquire); spins++) {
        if (spins < 1000) {
            pause_briefly();
            continue;
        }
        if (j->wait) j->wait(j->context);
        if (nanoseconds() < until)
            sched_yield(); /* a helper may be waiting for this CPU */
        else
            sleep_for_helpers(j);
    }
}
