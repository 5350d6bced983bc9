/* Measures what the thread pool costs: waking threads, claiming tasks, finishing a loop. The figures
 * are in docs/threading.md.
 *
 *     gcc -O2 -std=gnu11 -Icsrc benches/thread_costs.c csrc/runtime/{job,openmp_team,thread_pool}.c \
 *         -pthread -ldl -o thread_costs && ./thread_costs
 */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "runtime/thread_pool.h"

enum { ROUNDS = 300 };

static atomic_llong begun[256]; /* when each thread began its first task of a loop */
static long long work;          /* nanoseconds of a task */

static long long now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void task(const void *context, int thread, ptrdiff_t i)
{
    (void)context;
    (void)i;
    const long long begin = work ? now() : 0;
    if (work && !begun[thread]) begun[thread] = begin;
    while (work && now() < begin + work) continue;
}

static int ascending(const void *a, const void *b)
{
    const long long x = *(const long long *)a, y = *(const long long *)b;
    return (x > y) - (x < y);
}

static long long median(long long *x, int n)
{
    qsort(x, n, sizeof *x, ascending);
    return n ? x[n / 2] : -1;
}

/* Prints how long after the call its first and its last thread began, and how much longer than its
 * share of the work the loop took. */
static void starts(const char *label, int threads, int pause)
{
    long long first[ROUNDS], last[ROUNDS], extra[ROUNDS];
    int came = 0;
    work = 100000;
    for (int round = 0; round < ROUNDS; round++) {
        if (pause) usleep(pause);
        for (int i = 0; i < threads; i++) begun[i] = 0;
        const long long begin = now();
        qkv_run_tasks(task, NULL, NULL, 4 * threads, threads, 0);
        extra[round] = now() - begin - 4 * work;
        first[round] = begun[0] - begin;
        long long latest = 0;
        int all = 1;
        for (int i = 0; i < threads; i++) {
            if (begun[i] > latest) latest = begun[i];
            all &= begun[i] != 0;
        }
        if (all) last[came++] = latest - begin;
    }
    printf("%3d threads, %-8s the caller begins after %5.1f us, the last one after %6.1f us (all "
           "did in %3d of %d loops); the loop takes %6.1f us more than its work\n",
           threads, label, 1e-3 * median(first, ROUNDS), 1e-3 * median(last, came), came, ROUNDS, 1e-3 * median(extra, ROUNDS));
}

/* Prints what a task costs that does nothing. */
static void claims(int threads)
{
    const ptrdiff_t tasks = 1000000;
    long long each[9];
    work = 0;
    for (int i = 0; i < 9; i++) {
        const long long begin = now();
        qkv_run_tasks(task, NULL, NULL, tasks, threads, 0);
        each[i] = now() - begin;
    }
    printf("%3d threads: %5.1f ns for a task, of each thread\n", threads,
           (double)median(each, 9) * threads / (double)tasks);
}

int main(void)
{
    const int cpus = qkv_usable_cpus();
    qkv_set_threading(QKV_THREADING_POOL);
    for (int threads = 2; threads <= cpus; threads *= 2) {
        starts("awake", threads, 0);
        starts("asleep", threads, 5000);
    }
    for (int threads = 1; threads <= cpus; threads *= 2) claims(threads);
    return 0;
}
