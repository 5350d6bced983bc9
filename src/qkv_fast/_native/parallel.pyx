"""The one place with threads, and with the signals that end a call.

Tasks run on the library's own pool (csrc/runtime/thread_pool.h says why) or on the OpenMP team of
another library while that is awake (csrc/runtime/openmp_team.c); where QKV_FAST_OPENMP=1 was set
for the build, in OpenMP's prange.
"""

import os

from cython.parallel cimport prange, threadid
from libc.stdint cimport uint64_t

from .kernels cimport (
    enter_default_mode, leave_default_mode, qkv_assume_cpus, qkv_forked, qkv_notify_call_start,
    qkv_run_tasks, qkv_set_threading, qkv_team_jobs, qkv_usable_cpus,
)
from .tuning cimport SERIAL_WORK, SIGNAL_MILLISECONDS
from .types cimport Interrupt

cdef extern from "Python.h":
    int PyErr_CheckSignals()    # an exception of a handler stays set, for raise_pending

cdef extern from "time.h" nogil:
    cdef struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC
    int clock_gettime(int, timespec *)

cdef extern from *:
    """
    #ifdef _OPENMP
    #define QKV_OPENMP _OPENMP
    #else
    #define QKV_OPENMP 0
    #endif
    """
    int QKV_OPENMP

cdef struct TaskLoop:
    task_function function
    const void *context
    Interrupt *interrupt                # NULL: nothing ends the loop early
    double *busy                        # seconds that each thread was in tasks, or NULL

THREADING = ("auto", "pool", "openmp")  # in the order of csrc/runtime/thread_pool.h
cdef int active_calls = 0               # changed with the GIL held only
cdef int cpu_quota = 1 << 16            # CPUs that the process may use the time of


cdef double seconds_now() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return t.tv_sec + 1e-9 * t.tv_nsec


cdef bint handler_raised() noexcept with gil:
    """Run the handlers of signals that came; threads other than the main one get none."""
    return PyErr_CheckSignals() != 0


cdef void look_for_signals(Interrupt *interrupt) noexcept nogil:
    """Look whether a signal ends the call; on the calling thread only, where exceptions belong."""
    cdef double now
    if interrupt.stop:
        return
    now = seconds_now()
    if interrupt.next_look == 0:        # the call has just begun
        interrupt.next_look = now + 1e-3 * SIGNAL_MILLISECONDS
    elif now >= interrupt.next_look:
        interrupt.stop = handler_raised()
        interrupt.next_look = seconds_now() + 1e-3 * SIGNAL_MILLISECONDS


cdef int raise_pending(const Interrupt *interrupt) except -1:
    """Raise what a signal's handler has raised."""
    return -1 if interrupt.stop else 0


cdef void run_one(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    """Run a task of a loop, unless a signal ended it."""
    cdef const TaskLoop *loop = <const TaskLoop *>context
    cdef uint64_t mode
    cdef double begin
    if loop.interrupt != NULL:
        if thread == 0 and task > 0:
            look_for_signals(loop.interrupt)
        if loop.interrupt.stop:
            return
    mode = enter_default_mode()
    if loop.busy == NULL:
        loop.function(loop.context, thread, task)
    else:
        begin = seconds_now()
        loop.function(loop.context, thread, task)
        loop.busy[thread] += seconds_now() - begin
    leave_default_mode(mode)


cdef void wait_for_others(const void *context) noexcept nogil:
    """Look for signals while other threads work on the last tasks."""
    cdef const TaskLoop *loop = <const TaskLoop *>context
    if loop.interrupt != NULL:
        look_for_signals(loop.interrupt)


cdef void run_tasks(task_function function, const void *context, Py_ssize_t tasks, int threads,
                    Interrupt *interrupt, double *busy, bint is_short) noexcept nogil:
    """Run all tasks on at most `threads` threads; for a short loop, no sleeping one is woken.

    OpenMP's calling thread can't look for signals while it waits for the others' last tasks.
    """
    cdef TaskLoop loop
    cdef Py_ssize_t task
    loop.function = function
    loop.context = context
    loop.interrupt = interrupt
    loop.busy = busy
    if threads <= 1:
        for task in range(tasks):
            run_one(&loop, 0, task)
    elif QKV_OPENMP:
        for task in prange(tasks, num_threads=threads, schedule="dynamic", chunksize=1):
            run_one(&loop, threadid(), task)
    else:
        qkv_run_tasks(run_one, wait_for_others, &loop, tasks, threads, is_short)


cdef int begin_call(double work, int budget) noexcept:
    """Return how many threads a call with so many multiply-adds gets; end_call must follow.

    Calls that run at the same time share the budget. A small call, or one in a forked child, gets
    one thread. No call gets more threads than there are CPUs for: they would only wait for each
    other.
    """
    global active_calls
    active_calls += 1
    if budget <= 1 or work < SERIAL_WORK or qkv_forked():
        return 1
    return max(1, min(budget, cpu_quota, qkv_usable_cpus()) // active_calls)


cdef void end_call() noexcept:
    global active_calls
    active_calls -= 1


def notify_call_start():
    """Keep threads awake that have just done a call's work: another call has begun."""
    qkv_notify_call_start()


def limit_cpus(int quota):
    """Let no call use more threads than this, because the process has time for so many CPUs."""
    global cpu_quota
    cpu_quota = max(1, quota)


def assume_cpus(int count):
    """Let calls use so many threads as if there were CPUs for them; 0 ends that (for tests)."""
    qkv_assume_cpus(count)


def team_calls():
    """Return how many calls have run on another library's OpenMP team."""
    return qkv_team_jobs()


def threading():
    """Return which threads help a call, for show_config()."""
    if QKV_OPENMP:
        return f"OpenMP {QKV_OPENMP}"
    return {"auto": "own pool, or another library's OpenMP team while it is awake",
            "pool": "own pool", "openmp": "another library's OpenMP team, else own pool"}[chosen()]


cdef str chosen():
    """Return what QKV_FAST_THREADING asks for, or raise."""
    choice = os.environ.get("QKV_FAST_THREADING") or "auto"
    if choice not in THREADING:
        raise ValueError(
            f"QKV_FAST_THREADING is {choice!r}: it must be one of {', '.join(THREADING)}")
    return choice


qkv_set_threading(THREADING.index(chosen()))
