/* job.h: claiming tasks by a counter for each range; waiting by spinning, then on a condition. */
#define _GNU_SOURCE
#include "job.h"

#include "threads.h"

/* How long the caller spins for helpers that are at their last tasks, in nanoseconds, before it
 * gives its CPU away. A helper that another process keeps from running can then move there. */
#define SPIN_FOR_HELPERS 60000
/* How long it sleeps at most, in nanoseconds, before it looks for signals again. */
#define LONGEST_SLEEP 50000000

static os_mutex leaving_mutex = MUTEX_INITIALIZER;
static os_condition helper_left = CONDITION_INITIALIZER;
static atomic_int sleeping_callers; /* of all jobs */

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
        lock(&leaving_mutex);
        signal_all(&helper_left);
        unlock(&leaving_mutex);
    }
}

static void sleep_for_helpers(job *j)
{
    lock(&leaving_mutex);
    atomic_fetch_add(&sleeping_callers, 1);
    if (atomic_load(&j->running)) wait_on_for(&helper_left, &leaving_mutex, LONGEST_SLEEP);
    atomic_fetch_sub(&sleeping_callers, 1);
    unlock(&leaving_mutex);
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
            yield_cpu(); /* a helper may be waiting for this CPU */
        else
            sleep_for_helpers(j);
    }
}
