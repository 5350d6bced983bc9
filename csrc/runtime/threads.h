/* What the thread pool needs of the operating system: threads_posix.c and threads_windows.c.
 *
 * A file that includes this defines _GNU_SOURCE before any header. */
#ifndef QKV_THREADS_H
#define QKV_THREADS_H

#if defined(_WIN32)
typedef struct {
    void *state;
} os_mutex; /* an SRWLOCK */
typedef struct {
    void *state;
} os_condition; /* a CONDITION_VARIABLE */
typedef unsigned long thread_result;
#define THREAD_CALL __stdcall
#define MUTEX_INITIALIZER {0}
#define CONDITION_INITIALIZER {0}
#else
#include <pthread.h>
#include <sched.h>
typedef pthread_mutex_t os_mutex;
typedef pthread_cond_t os_condition;
typedef void *thread_result;
#define THREAD_CALL
#define MUTEX_INITIALIZER PTHREAD_MUTEX_INITIALIZER
#define CONDITION_INITIALIZER PTHREAD_COND_INITIALIZER
#endif

typedef struct {
#if defined(__linux__)
    pthread_t id;
    cpu_set_t cpus; /* where it may run, while it is restricted to fewer */
    int restricted;
#else
    int unused;
#endif
} os_thread;

/* Starts a thread that nobody joins and that runs no signal handler. Returns 0 where the system
 * refuses it. */
int start_thread(os_thread *t, thread_result(THREAD_CALL *run)(void *), void *argument);

/* Keeps a thread that sleeps off the caller's CPU, where the system can do that, until it calls
 * lift_restriction. */
void keep_off_this_cpu(os_thread *t);
void lift_restriction(os_thread *self);

void lock(os_mutex *m);
void unlock(os_mutex *m);

/* The caller holds the mutex. A wait may end without a signal. */
void wait_on(os_condition *c, os_mutex *m);
void wait_on_for(os_condition *c, os_mutex *m, long long timeout);
void signal_one(os_condition *c);
void signal_all(os_condition *c);

/* Lets another thread have the CPU if one is waiting for it. */
void yield_cpu(void);

/* How many CPUs the calling thread may use, by its affinity; 0 where the system does not say. */
int count_cpus(void);

/* Has a function called in each child that a fork makes. */
void call_after_fork(void (*in_child)(void));

#endif
