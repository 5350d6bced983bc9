/* threads.h on POSIX threads: Linux, macOS and others. */
#if !defined(_WIN32)
#define _GNU_SOURCE
#include "threads.h"

#include <limits.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"

#define SECOND 1000000000LL

long long nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * SECOND + t.tv_nsec;
}

int start_thread(os_thread *t, thread_result (*run)(void *), void *argument)
{
#if defined(__linux__)
    pthread_t *id = &t->id;
#else
    pthread_t of_thread, *id = &of_thread;
    (void)t;
#endif
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int failed = pthread_create(id, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) return 0;
    pthread_detach(*id);
    return 1;
}

#if defined(__linux__)
void keep_off_this_cpu(os_thread *t)
{
    const int here = sched_getcpu();
    if (here < 0 || sched_getaffinity(0, sizeof t->cpus, &t->cpus)) return;
    cpu_set_t others = t->cpus;
    CPU_CLR(here, &others);
    t->restricted = CPU_COUNT(&others) && !pthread_setaffinity_np(t->id, sizeof others, &others);
}

void lift_restriction(os_thread *self)
{
    if (self->restricted) pthread_setaffinity_np(self->id, sizeof self->cpus, &self->cpus);
    self->restricted = 0;
}
#else
void keep_off_this_cpu(os_thread *t) { (void)t; }
void lift_restriction(os_thread *self) { (void)self; }
#endif

void lock(os_mutex *m) { pthread_mutex_lock(m); }
void unlock(os_mutex *m) { pthread_mutex_unlock(m); }
void wait_on(os_condition *c, os_mutex *m) { pthread_cond_wait(c, m); }
void signal_one(os_condition *c) { pthread_cond_signal(c); }
void signal_all(os_condition *c) { pthread_cond_broadcast(c); }

void wait_on_for(os_condition *c, os_mutex *m, long long timeout)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    const long long end = until.tv_nsec + timeout;
    until.tv_sec += (time_t)(end / SECOND);
    until.tv_nsec = (long)(end % SECOND);
    pthread_cond_timedwait(c, m, &until);
}

void yield_cpu(void) { sched_yield(); }

int count_cpus(void)
{
#if defined(__linux__)
    cpu_set_t cpus;
    if (!sched_getaffinity(0, sizeof cpus, &cpus)) return CPU_COUNT(&cpus);
#endif
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 && online < INT_MAX ? (int)online : 0;
}

void call_after_fork(void (*in_child)(void)) { pthread_atfork(NULL, NULL, in_child); }
#else
typedef int qkv_nothing_here; /* a file must declare something */
#endif
