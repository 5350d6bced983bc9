/* Helpers from an OpenMP runtime of another library (torch, scikit-learn), while they are awake.
 *
 * After a parallel region a team's threads spin for milliseconds, waiting for the next region of
 * the thread that they belong to. A pool beside them has to share their CPUs, but a region of ours
 * in the same team starts at once. Nothing is linked: GOMP_parallel, which libgomp and LLVM's and
 * Intel's runtimes export, is looked up among the libraries that are loaded.
 *
 * Whether others use a team shows on the CPU clock of one of its threads, which goes on while it
 * spins. A region of ours keeps it awake too, in the way of NumPy's BLAS. So after a while of use
 * it is left alone; when its clock has gone on for longer than a thread spins, others use it. It is
 * also left alone when it was asleep, or when its threads did so little of our work that something
 * else must run on their CPUs. */
#define _GNU_SOURCE
#include "job.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#define MAX_RUNTIMES 4
#define MICROSECOND 1000LL
#define MILLISECOND 1000000LL
/* A member that spins comes within 1 us, one that has to be woken after 5 us or more. */
#define AWAKE (3 * MICROSECOND)
/* How long a team is used before it is left alone, at first and at most. */
#define USE_LEAST (40 * MILLISECOND)
#define USE_MOST (2000 * MILLISECOND)
/* Callers' teams that would not exist without us have so many threads for each CPU at most. */
#define THREADS_PER_CPU 4
/* Longest wait for a member's last task that says nothing. */
#define WAIT_MOST MILLISECOND

typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*in_parallel)(void);
    int (*max_threads)(void);
    /* CPU time of a thread between our last region and its sleep, at most: how long it spins, and
     * 4 ms, after which the kernel brings the clock of a running thread up to date. */
    long long spin;
} runtime;

typedef struct { /* a runtime's team of the calling thread; times in nanoseconds */
    int known;   /* whether `member` is one of its threads */
    clockid_t member;
    long long use;     /* how long it was used the last time */
    long long use_end; /* it is used until then; 0 while it is left alone */
    long long ran;     /* the member's clock when it began to be left alone */
} team;

typedef struct {
    job *job;
    team *team;
    pthread_t caller;
    long long began;
    atomic_llong came; /* nanoseconds until the first helper came */
    long long worked, waited; /* of the caller */
    ptrdiff_t tasks; /* of the caller */
    _Atomic ptrdiff_t helpers_tasks;
    atomic_int helpers;
} region;

static runtime runtimes[MAX_RUNTIMES];
static atomic_int runtime_count, threads_made;
static atomic_long team_jobs;
static atomic_ullong libraries_seen; /* loads when they were searched for runtimes */
static pthread_mutex_t search_mutex = PTHREAD_MUTEX_INITIALIZER;
static __thread team teams[MAX_RUNTIMES];

static int count_loads(struct dl_phdr_info *info, size_t size, void *loads)
{
    (void)size;
    *(unsigned long long *)loads = info->dlpi_adds;
    return 1;
}

static int note_runtime(struct dl_phdr_info *info, size_t size, void *unused)
{
    (void)size;
    (void)unused;
    const char *slash = strrchr(info->dlpi_name, '/');
    const char *name = slash ? slash + 1 : info->dlpi_name;
    const int gnu = !strncmp(name, "libgomp", 7), count = atomic_load(&runtime_count);
    if ((!gnu && strncmp(name, "libiomp", 7) && strncmp(name, "libomp", 6)) ||
        count == MAX_RUNTIMES)
        return 0;
    void *library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD); /* never closed: it stays */
    if (!library) return 0;
    runtime r = {.spin = (gnu ? 12 : 210) * MILLISECOND};
    *(void **)&r.parallel = dlsym(library, "GOMP_parallel");
    *(void **)&r.in_parallel = dlsym(library, "omp_in_parallel");
    *(void **)&r.max_threads = dlsym(library, "omp_get_max_threads");
    if (!r.parallel || !r.in_parallel || !r.max_threads) return 0;
    for (int i = 0; i < count; i++)
        if (runtimes[i].parallel == r.parallel) return 0;
    runtimes[count] = r;
    atomic_store(&runtime_count, count + 1);
    return 0;
}

/* Searches the libraries that are loaded, if some have come since the last time. */
static void find_runtimes(void)
{
    unsigned long long loads = 0;
    dl_iterate_phdr(count_loads, &loads);
    if (loads == atomic_load_explicit(&libraries_seen, memory_order_acquire)) return;
    pthread_mutex_lock(&search_mutex);
    if (loads != atomic_load(&libraries_seen)) dl_iterate_phdr(note_runtime, NULL);
    atomic_store(&libraries_seen, loads);
    pthread_mutex_unlock(&search_mutex);
}

static long long clock_of(clockid_t clock)
{
    struct timespec t;
    return clock_gettime(clock, &t) ? -1 : t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void *pass_gate(void *gate)
{
    pthread_mutex_lock(gate);
    pthread_mutex_unlock(gate);
    return NULL;
}

/* Whether the system lets so many more threads run at once. An OpenMP runtime ends the process if it
 * is refused one. */
static int can_start(int count)
{
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_t started[MAX_HELPERS];
    sigset_t all, before;
    int running = 0;
    if (count > MAX_HELPERS) return 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_mutex_lock(&gate);
    while (running < count && !pthread_create(&started[running], NULL, pass_gate, &gate)) running++;
    pthread_mutex_unlock(&gate);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    for (int i = 0; i < running; i++) pthread_join(started[i], NULL);
    return running == count;
}

/* Whether a team of the caller's may be made; it counts, once. */
static int may_be_made(const runtime *r)
{
    const int more = r->max_threads(), most = THREADS_PER_CPU * qkv_usable_cpus();
    if (atomic_fetch_add(&threads_made, more) + more <= most && can_start(more - 1)) return 1;
    atomic_fetch_sub(&threads_made, more);
    return 0;
}

static void leave_alone(team *t)
{
    t->use_end = 0;
    t->ran = clock_of(t->member);
}

/* Whether to use a team now. */
static int is_welcome(const runtime *r, team *t, long long now)
{
    if (!t->known) return may_be_made(r);
    if (t->use_end) {
        if (now < t->use_end) return 1;
        leave_alone(t);
    }
    const long long ran = clock_of(t->member);
    if (ran < 0) t->known = 0; /* the thread has ended */
    if (ran - t->ran < r->spin) return 0;
    t->use = 4 * t->use < USE_MOST ? 4 * t->use : USE_MOST;
    if (t->use < USE_LEAST) t->use = USE_LEAST;
    t->use_end = now + t->use;
    return 1;
}

/* Whether a region went as one of a team that is awake, and alone on its CPUs. */
static int was_good(const region *g)
{
    const ptrdiff_t tasks = g->tasks + g->helpers_tasks;
    const int threads = g->job->threads;
    if (g->came > AWAKE) return 0;
    if (tasks >= 8 * threads && 2 * g->helpers_tasks < g->tasks * (threads - 1)) return 0;
    return g->waited < WAIT_MOST || g->waited * g->tasks < 2 * g->worked;
}

/* What each member of the team does in a region of ours. */
static void join_region(void *argument)
{
    region *g = argument;
    job *j = g->job;
    if (pthread_equal(pthread_self(), g->caller)) {
        const long long began = nanoseconds();
        g->tasks = work_on(j, 0);
        const long long done = nanoseconds();
        wait_for_helpers(j); /* the barrier that follows would not look for signals */
        g->worked = done - began;
        g->waited = nanoseconds() - done;
        return;
    }
    atomic_fetch_add(&j->running, 1);
    const int thread = atomic_fetch_add(&g->helpers, 1) + 1;
    if (thread == 1) {
        atomic_store(&g->came, nanoseconds() - g->began);
        if (!g->team->known)
            g->team->known = !pthread_getcpuclockid(pthread_self(), &g->team->member);
    }
    if (thread < j->threads) atomic_fetch_add(&g->helpers_tasks, work_on(j, thread));
    leave_job(j);
}

int run_on_openmp_team(job *j, ptrdiff_t count, int always)
{
    find_runtimes();
    for (int i = 0; i < atomic_load_explicit(&runtime_count, memory_order_acquire); i++) {
        const runtime *r = &runtimes[i];
        team *t = &teams[i];
        const int most = r->in_parallel() ? 1 : r->max_threads();
        if (most < 2 || (!always && !is_welcome(r, t, nanoseconds()))) continue;
        region g = {.job = j, .team = t, .caller = pthread_self(), .came = 2 * AWAKE};
        if (j->threads > most) j->threads = most;
        divide_tasks(j, count);
        atomic_store(&j->running, 0);
        g.began = nanoseconds();
        r->parallel(join_region, &g, 0, 0);
        if (!was_good(&g)) leave_alone(t), t->use = 0;
        atomic_fetch_add_explicit(&team_jobs, 1, memory_order_relaxed);
        return 1;
    }
    return 0;
}

long qkv_team_jobs(void) { return atomic_load(&team_jobs); }
#else
long qkv_team_jobs(void) { return 0; }

int run_on_openmp_team(job *j, ptrdiff_t count, int always)
{
    (void)j, (void)count, (void)always;
    return 0;
}
#endif
