/* thread_pool.h: idle workers in a stack, a job at a time for each. A worker is handed a job by a
 * store to its `job`, spins for it or sleeps on a condition. */
#define _GNU_SOURCE
#include "thread_pool.h"

#include "job.h"
#include "threads.h"

/* How long an idle worker spins before it sleeps, in nanoseconds from the end of the last job on:
 * SPIN_MOST if that would have been enough the last time, else SPIN_LEAST. So it stays awake
 * through a loop of calls, between which Python runs for 9 to 60 us, and keeps out of the way of
 * BLAS threads if longer work lies between the calls. Chosen by benches/bench_interplay.py on a
 * virtual machine with two CPUs; times are those of a call or pair, and less is better.
 *
 *     one query, 512 keys of 32 heads, float32, the worker asleep         415 us
 *     the same, awake                                                     335 us
 *     the same in bfloat16, asleep                                        250 us
 *     the same in bfloat16, awake                                         170 us
 *     a 256 x 256 product and 1,12,128,64 in turn, a spin of 8 to 24 us   370-390 us
 *     the same, with these bounds                                         370-390 us
 *     the same, a spin of 40 us                                           400 us
 *     the same, a spin of 200 us                                          45 % more
 *     a 128 x 128 product and 1,12,128,64 in turn, with these bounds      327 us
 *     the same, a spin of SPIN_LEAST                                      249 us
 *
 * A worker that yields its CPU while it spins makes the last pair slower. */
#define SPIN_LEAST 18000
#define SPIN_MOST 100000

/* How long it spins once a call has begun, in nanoseconds: longer than the call's Python takes
 * before its tasks, 100 to 150 us if the caches are empty. On the same machine, a query of 32
 * heads over 8, 512 keys, whose caches are swept before each call, takes 720 us with this and 840
 * without in float32; in bfloat16 610 and 700. */
#define SPIN_AFTER_CALL_START 300000

/* How long it spins at most, in nanoseconds, while others work on a job in which it has no part. */
#define SPIN_BESIDE_JOBS 1000000

/* Jobs that begin within so many nanoseconds of each other follow fast. On a Zen 3, one token of 9
 * query heads over 3 of size 64 takes for 512 keys, with pauses between the calls:
 *
 *     pause of               0 us   150 us   400 us   2000 us
 *     two threads             53       61       72        87 us
 *     one thread              67       67       68        74 us */
#define FREQUENT 250000

typedef struct worker {
    struct worker *next_idle;
    _Atomic(job *) job;
    int thread; /* its number within the job */
    os_thread handle;
    atomic_int asleep;
    os_mutex mutex;
    os_condition wake;
} worker;

static job taken; /* stands in a worker's `job` while it works on one */
static worker workers[MAX_HELPERS];
static int worker_count;
static worker *idle_workers;
static os_mutex idle_mutex = MUTEX_INITIALIZER;
static atomic_int running_jobs;
static atomic_int assumed_cpus;
static atomic_int threading = QKV_THREADING_AUTO;
static atomic_llong last_call_start; /* nanoseconds() of qkv_notify_call_start */
static atomic_llong last_job_start;
static atomic_int forked;

static void note_fork(void) { atomic_store(&forked, 1); }

__attribute__((constructor)) static void watch_forks(void)
{
    call_after_fork(note_fork);
}

int qkv_forked(void) { return atomic_load(&forked); }

void qkv_assume_cpus(int count) { atomic_store(&assumed_cpus, count); }

int qkv_usable_cpus(void)
{
    const int assumed = atomic_load_explicit(&assumed_cpus, memory_order_relaxed);
    if (assumed > 0) return assumed;
    const int cpus = count_cpus();
    return cpus > 0 ? cpus : MAX_HELPERS + 1;
}

/* Returns the job that was handed over, and marks it as taken; NULL if there is none, or if it was
 * called off. */
static job *take_job(worker *self)
{
    job *j = atomic_load_explicit(&self->job, memory_order_acquire);
    return j && atomic_compare_exchange_strong(&self->job, &j, &taken) ? j : NULL;
}

/* Wakes a sleeping worker on a CPU other than the caller's. Left alone, the scheduler wakes it
 * behind the caller if a spinning thread of NumPy's BLAS makes the other CPUs look busy, and the
 * caller then does all the work. The worker lifts the restriction when it is awake. */
static void wake_elsewhere(worker *w)
{
    keep_off_this_cpu(&w->handle);
    signal_one(&w->wake);
}

/* Waits for a job and returns it. *spin is how long to spin before sleeping; it becomes the time
 * for the wait after this job. */
static job *wait_for_job(worker *self, long long *spin)
{
    job *j;
    long long idle_since = nanoseconds(), until = idle_since + *spin, waited = -1;
    const long long latest = idle_since + SPIN_BESIDE_JOBS;
    for (long long now = idle_since; !(j = take_job(self)) && now < until;) {
        pause_briefly();
        now = nanoseconds();
        if (now < latest && atomic_load_explicit(&running_jobs, memory_order_relaxed)) {
            idle_since = now;
            until = now + *spin;
            waited = -1;
        } else if (waited < 0 &&
                   atomic_load_explicit(&last_call_start, memory_order_relaxed) > idle_since) {
            waited = now - idle_since;
            until = now + SPIN_AFTER_CALL_START;
        }
    }
    if (!j) {
        lock(&self->mutex);
        atomic_store(&self->asleep, 1);
        while (!(j = take_job(self))) wait_on(&self->wake, &self->mutex);
        atomic_store(&self->asleep, 0);
        lift_restriction(&self->handle);
        unlock(&self->mutex);
        waited = j->began - idle_since;
    }
    if (waited < 0) waited = j->began - idle_since;
    *spin = waited < SPIN_MOST ? SPIN_MOST : SPIN_LEAST;
    return j;
}

static void join_idle_workers(worker *w)
{
    lock(&idle_mutex);
    w->next_idle = idle_workers;
    idle_workers = w;
    unlock(&idle_mutex);
}

/* Wakes the two threads of a job that this thread has to, if they sleep: all of n threads have been
 * woken after log2(n) steps. */
static void wake_next(job *j, int thread)
{
    for (int i = 2 * thread + 1; i <= 2 * thread + 2 && i < j->threads; i++) {
        worker *w = j->hired[i - 1];
        /* A worker sets `asleep` under the mutex before it looks at `job` for the last time. */
        if (!atomic_load(&w->asleep)) continue;
        lock(&w->mutex);
        if (atomic_load(&w->asleep)) wake_elsewhere(w);
        unlock(&w->mutex);
    }
}

static thread_result THREAD_CALL worker_main(void *argument)
{
    worker *self = argument;
    for (long long spin = SPIN_LEAST;;) {
        job *j = wait_for_job(self, &spin);
        wake_next(j, self->thread);
        work_on(j, self->thread);
        atomic_store_explicit(&self->job, NULL, memory_order_relaxed);
        join_idle_workers(self);
        leave_job(j);
    }
    return 0;
}

/* Returns NULL where the system refuses another thread: then the job has fewer. */
static worker *start_worker(void)
{
    worker *w = &workers[worker_count];
    w->mutex = (os_mutex)MUTEX_INITIALIZER;
    w->wake = (os_condition)CONDITION_INITIALIZER;
    if (!start_thread(&w->handle, worker_main, w)) return NULL;
    worker_count++;
    return w;
}

void qkv_notify_call_start(void)
{
    atomic_store_explicit(&last_call_start, nanoseconds(), memory_order_relaxed);
}

/* Takes up to `wanted` idle workers, starting new ones only while there are fewer than that in
 * all. */
static int hire(worker **hired, int wanted)
{
    int count = 0;
    lock(&idle_mutex);
    while (count < wanted) {
        worker *w = idle_workers;
        if (w)
            idle_workers = w->next_idle;
        else if (worker_count >= wanted || !(w = start_worker()))
            break;
        w->thread = count + 1;
        hired[count++] = w;
    }
    unlock(&idle_mutex);
    return count;
}

/* Takes the job back from workers that have not begun: another thread may have their CPU for long.
 */
static void call_off(job *j, worker **hired, int count)
{
    for (int i = 0; i < count; i++) {
        job *handed = j;
        if (atomic_compare_exchange_strong(&hired[i]->job, &handed, NULL)) {
            join_idle_workers(hired[i]);
            atomic_fetch_sub(&j->running, 1);
        }
    }
}

static void run_on_own_pool(job *j, ptrdiff_t count)
{
    worker *hired[MAX_HELPERS];
    const int helpers = hire(hired, j->threads - 1);
    j->threads = helpers + 1;
    divide_tasks(j, count);
    atomic_store(&j->running, helpers);
    j->hired = hired;
    for (int i = 0; i < helpers; i++) atomic_store(&hired[i]->job, j);
    wake_next(j, 0);
    work_on(j, 0);
    call_off(j, hired, helpers);
    wait_for_helpers(j);
}

void qkv_set_threading(int choice) { atomic_store(&threading, choice); }

void qkv_run_tasks(qkv_task task, qkv_wait wait, const void *context, ptrdiff_t count, int threads,
                   int is_short)
{
    const int choice = atomic_load_explicit(&threading, memory_order_relaxed);
    task_range ranges[MAX_HELPERS + 1];
    job j = {.task = task, .wait = wait, .context = context, .ranges = ranges};
    j.threads = threads < MAX_HELPERS + 1 ? threads : MAX_HELPERS + 1;
    if (qkv_forked()) j.threads = 1;
    if (j.threads > 1 && choice != QKV_THREADING_POOL &&
        run_on_openmp_team(&j, count, choice == QKV_THREADING_OPENMP))
        return;
    j.began = nanoseconds();
    const long long before =
        atomic_exchange_explicit(&last_job_start, j.began, memory_order_relaxed);
    if (is_short && j.began - before > FREQUENT) j.threads = 1;
    atomic_fetch_add_explicit(&running_jobs, 1, memory_order_relaxed);
    run_on_own_pool(&j, count);
    atomic_fetch_sub_explicit(&running_jobs, 1, memory_order_relaxed);
}
