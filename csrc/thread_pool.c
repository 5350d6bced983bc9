#define _GNU_SOURCE
#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#define MAX_WORKERS 255

/* How long an idle worker spins before it sleeps: long enough for the next call of a loop, short
 * enough not to stand in the way of the BLAS threads of the product that follows. Tuned on
 * benches/bench_interplay.py (a 256 x 256 product and a 1,12,128,64 call in turn): 0 and 5 us
 * slow the call alone by 15 %, 50 us slow the pair by 15 %, 200 us by 50 %. */
#define SPIN_NANOSECONDS 15000

typedef struct {
    qkv_task task;
    const void *context;
    ptrdiff_t count;
    _Atomic ptrdiff_t next;
    atomic_int running; /* workers that have not yet finished with this job */
} job;

typedef struct worker {
    struct worker *next_idle;
    _Atomic(job *) job;
    int thread; /* its number within the job */
    int avoids; /* the CPU that it is kept off, or -1 */
    pthread_t id;
    atomic_int asleep;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
} worker;

static job begun; /* stands in a worker's `job` while it works */
static worker workers[MAX_WORKERS];
static int worker_count;
static worker *idle;
static pthread_mutex_t idle_mutex = PTHREAD_MUTEX_INITIALIZER;
static atomic_int forked;

static void note_fork(void) { atomic_store(&forked, 1); }

__attribute__((constructor)) static void watch_forks(void)
{
    pthread_atfork(NULL, NULL, note_fork);
}

int qkv_forked(void) { return atomic_load(&forked); }

static long long nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void pause_briefly(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static void take_part(job *j, int thread)
{
    ptrdiff_t i;
    while ((i = atomic_fetch_add_explicit(&j->next, 1, memory_order_relaxed)) < j->count)
        j->task(j->context, thread, i);
}

/* The job that was given, marked as begun; NULL when there is none, or it was called off. */
static job *claim(worker *self)
{
    job *j = atomic_load_explicit(&self->job, memory_order_acquire);
    return j && atomic_compare_exchange_strong(&self->job, &j, &begun) ? j : NULL;
}

static job *await_job(worker *self)
{
    job *j;
    const long long until = nanoseconds() + SPIN_NANOSECONDS;
    do {
        if ((j = claim(self))) return j;
        pause_briefly();
    } while (nanoseconds() < until);
    pthread_mutex_lock(&self->mutex);
    atomic_store(&self->asleep, 1);
    while (!(j = claim(self))) pthread_cond_wait(&self->wake, &self->mutex);
    atomic_store(&self->asleep, 0);
    pthread_mutex_unlock(&self->mutex);
    return j;
}

static void rest(worker *w)
{
    pthread_mutex_lock(&idle_mutex);
    w->next_idle = idle;
    idle = w;
    pthread_mutex_unlock(&idle_mutex);
}

static void *work(void *argument)
{
    worker *self = argument;
    for (;;) {
        job *j = await_job(self);
        take_part(j, self->thread);
        atomic_store_explicit(&self->job, NULL, memory_order_relaxed);
        rest(self);
        atomic_fetch_sub_explicit(&j->running, 1, memory_order_release); /* j is gone after this */
    }
    return NULL;
}

static worker *start_worker(void)
{
    if (worker_count == MAX_WORKERS) return NULL;
    worker *w = &workers[worker_count];
    pthread_mutex_init(&w->mutex, NULL);
    pthread_cond_init(&w->wake, NULL);
    w->avoids = -1;
    /* Signals are for the program's own threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int failed = pthread_create(&w->id, NULL, work, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) return NULL;
    pthread_detach(w->id);
    worker_count++;
    return w;
}

/* Keep a worker off the caller's CPU, and on the caller's others. Left alone, the scheduler
 * wakes it behind the caller when a spinning thread of NumPy's BLAS makes the other CPUs look
 * busy, and the caller then does all the work. */
static void place(worker *w)
{
#if defined(__linux__)
    const int here = sched_getcpu();
    cpu_set_t cpus;
    if (w->avoids == here || here < 0) return;
    if (sched_getaffinity(0, sizeof cpus, &cpus)) return; /* more CPUs than a cpu_set_t has */
    CPU_CLR(here, &cpus);
    if (CPU_COUNT(&cpus) && !pthread_setaffinity_np(w->id, sizeof cpus, &cpus)) w->avoids = here;
#else
    (void)w;
#endif
}

static void give(worker *w, job *j)
{
    place(w);
    atomic_store(&w->job, j);
    if (atomic_load(&w->asleep)) { /* set under the mutex before it looks at `job` again */
        pthread_mutex_lock(&w->mutex);
        pthread_cond_signal(&w->wake);
        pthread_mutex_unlock(&w->mutex);
    }
}

void qkv_run_tasks(qkv_task task, const void *context, ptrdiff_t count, int threads)
{
    job j = {.task = task, .context = context, .count = count};
    worker *mine[MAX_WORKERS];
    int hired = 0;
    if (threads > MAX_WORKERS + 1) threads = MAX_WORKERS + 1;
    if (threads > 1 && !qkv_forked()) {
        pthread_mutex_lock(&idle_mutex);
        while (hired < threads - 1) {
            worker *w = idle;
            if (w)
                idle = w->next_idle;
            else if (worker_count >= threads - 1 || !(w = start_worker()))
                break;
            w->thread = hired + 1;
            mine[hired++] = w;
        }
        pthread_mutex_unlock(&idle_mutex);
    }
    atomic_store(&j.running, hired);
    for (int i = 0; i < hired; i++) give(mine[i], &j);
    take_part(&j, 0);
    /* Call off the workers that have not begun: another thread may have their CPU for long. */
    for (int i = 0; i < hired; i++) {
        job *given = &j;
        if (atomic_compare_exchange_strong(&mine[i]->job, &given, NULL)) {
            rest(mine[i]);
            atomic_fetch_sub(&j.running, 1);
        }
    }
    for (int spins = 0; atomic_load_explicit(&j.running, memory_order_acquire); spins++) {
        pause_briefly();
        if (spins > 1000) sched_yield(); /* the worker may be waiting for this CPU */
    }
}
