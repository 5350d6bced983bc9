#define _GNU_SOURCE
#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

#define MAX_WORKERS 255

/* How long an idle worker spins before it sleeps, in nanoseconds from the end of the last job on: the
 * most if that was enough the last time, else the least. So it stays awake through a loop of calls,
 * between which lies Python with caches that the keys have swept (9 to 60 us), and keeps out of the
 * way of BLAS threads where longer work lies between them. Measured on two CPUs of a virtual machine:
 * - A worker that slept costs a call 60 to 80 us: 32 heads, a query, 512 keys take 415 us, and 335
 *   without that; bfloat16 250 and 170.
 * - benches/bench_interplay.py, a 256 x 256 product (125 us) and 1,12,128,64 in turn: 370-390 us with 8
 *   to 24 us of spin, 400 us with 40, and 45 % more with 200. These bounds give the first.
 * - What they cost: with a 128 x 128 product (35 us on two threads) the pair takes 327 us; it would
 *   take 249 with the least alone. To yield the CPU meanwhile made that worse. */
#define SPIN_LEAST 18000
#define SPIN_MOST 100000

/* And from the first announcement of a job on that finds it awake: longer than a call's Python takes
 * with empty caches, 100 to 150 us. (A query of 32 heads over 8, 512 keys, caches swept before each
 * call: float32 840 us, and 720 with this, bfloat16 700 and 610.) */
#define SPIN_ANNOUNCED 300000

typedef struct { /* a thread's own range of tasks, on a cache line of its own */
    _Alignas(64) _Atomic ptrdiff_t next;
    ptrdiff_t end;
} part;

typedef struct {
    qkv_task task;
    const void *context;
    part *parts;
    int threads;
    long long began;
    atomic_int running; /* workers that have not yet finished with this job */
} job;

typedef struct worker {
    struct worker *next_idle;
    _Atomic(job *) job;
    int thread; /* its number within the job */
    pthread_t id;
#if defined(__linux__)
    cpu_set_t cpus; /* where it may run, while `placed` on fewer */
    int placed;
#endif
    atomic_int asleep;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
} worker;

static job begun; /* stands in a worker's `job` while it works */
static worker workers[MAX_WORKERS];
static int worker_count;
static worker *idle;
static pthread_mutex_t idle_mutex = PTHREAD_MUTEX_INITIALIZER;
static atomic_int jobs; /* that run at the moment */
static atomic_llong announced;
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

/* A thread's own tasks, then what is left of the others'. Neighbouring tasks share inputs, so a
 * range of them for each thread keeps those in one core's cache. */
static void take_part(job *j, int thread)
{
    for (int k = 0; k < j->threads; k++) {
        part *p = &j->parts[(thread + k) % j->threads];
        ptrdiff_t i;
        while ((i = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed)) < p->end)
            j->task(j->context, thread, i);
    }
}

/* The job that was given, marked as begun; NULL when there is none, or it was called off. */
static job *claim(worker *self)
{
    job *j = atomic_load_explicit(&self->job, memory_order_acquire);
    return j && atomic_compare_exchange_strong(&self->job, &j, &begun) ? j : NULL;
}

/* A sleeping worker is woken on a CPU other than the caller's. Left alone, the scheduler wakes it
 * behind the caller when a spinning thread of NumPy's BLAS makes the other CPUs look busy, and the
 * caller then does all the work. Once awake it may go where it likes again. */
static void wake_elsewhere(worker *w)
{
#if defined(__linux__)
    const int here = sched_getcpu();
    if (here >= 0 && !sched_getaffinity(0, sizeof w->cpus, &w->cpus)) {
        cpu_set_t others = w->cpus;
        CPU_CLR(here, &others);
        w->placed = CPU_COUNT(&others) && !pthread_setaffinity_np(w->id, sizeof others, &others);
    }
#endif
    pthread_cond_signal(&w->wake);
}

static void unplace(worker *self)
{
#if defined(__linux__)
    if (self->placed) pthread_setaffinity_np(self->id, sizeof self->cpus, &self->cpus);
    self->placed = 0;
#else
    (void)self;
#endif
}

/* The next job; *spin: for how long not to sleep, then for how long after it. */
static job *await_job(worker *self, long long *spin)
{
    job *j;
    long long idle_since = nanoseconds(), until = idle_since + *spin, waited = -1;
    for (long long now = idle_since; !(j = claim(self)) && now < until;) {
        pause_briefly();
        now = nanoseconds();
        if (atomic_load_explicit(&jobs, memory_order_relaxed)) {
            idle_since = now;
            until = now + *spin;
            waited = -1;
        } else if (waited < 0 &&
                   atomic_load_explicit(&announced, memory_order_relaxed) > idle_since) {
            waited = now - idle_since;
            until = now + SPIN_ANNOUNCED;
        }
    }
    if (!j) {
        pthread_mutex_lock(&self->mutex);
        atomic_store(&self->asleep, 1);
        while (!(j = claim(self))) pthread_cond_wait(&self->wake, &self->mutex);
        atomic_store(&self->asleep, 0);
        unplace(self);
        pthread_mutex_unlock(&self->mutex);
        waited = j->began - idle_since;
    }
    if (waited < 0) waited = j->began - idle_since;
    *spin = waited < SPIN_MOST ? SPIN_MOST : SPIN_LEAST;
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
    for (long long spin = SPIN_LEAST;;) {
        job *j = await_job(self, &spin);
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

static void give(worker *w, job *j)
{
    atomic_store(&w->job, j);
    if (atomic_load(&w->asleep)) { /* set under the mutex before it looks at `job` again */
        pthread_mutex_lock(&w->mutex);
        wake_elsewhere(w);
        pthread_mutex_unlock(&w->mutex);
    }
}

static ptrdiff_t min(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

void qkv_notify_call_start(void)
{
    atomic_store_explicit(&announced, nanoseconds(), memory_order_relaxed);
}

void qkv_run_tasks(qkv_task task, qkv_wait wait, const void *context, ptrdiff_t count, int threads)
{
    worker *mine[MAX_WORKERS];
    part parts[MAX_WORKERS + 1];
    job j = {.task = task, .context = context, .parts = parts};
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
    j.threads = hired + 1;
    for (int i = 0; i < j.threads; i++) {
        atomic_store_explicit(&parts[i].next, count / j.threads * i + min(i, count % j.threads),
                              memory_order_relaxed);
        parts[i].end = count / j.threads * (i + 1) + min(i + 1, count % j.threads);
    }
    j.began = hired ? nanoseconds() : 0;
    atomic_store(&j.running, hired);
    atomic_fetch_add_explicit(&jobs, 1, memory_order_relaxed);
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
        if (spins <= 1000) continue;
        sched_yield(); /* the worker may be waiting for this CPU */
        if (wait) wait(context);
    }
    atomic_fetch_sub_explicit(&jobs, 1, memory_order_relaxed);
}
