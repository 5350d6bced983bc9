"""The one place with threads, and with what ends a call early: signals, a caller's function.

Tasks run on the library's own pool (csrc/runtime/thread_pool.h says why) or on the OpenMP team of
another library while that is awake (csrc/runtime/openmp_team.c); where QKV_FAST_OPENMP=1 was set
for the build, in OpenMP's prange.
"""

import os

from cpython.ref cimport PyObject
from cython.parallel cimport prange, threadid
from libc.stdint cimport uint64_t

from .kernels cimport (
    enter_default_mode, leave_default_mode, nanoseconds, qkv_assume_cpus, qkv_forked,
    qkv_notify_call_start, qkv_run_tasks, qkv_set_threading, qkv_team_jobs, qkv_usable_cpus,
)
from .shared cimport add_to_count, add_to_size, load_int, load_size, store_int
from .tuning cimport SERIAL_WORK, SIGNAL_MILLISECONDS
from .types cimport Interrupt

cdef extern from "Python.h":
    # An exception of the caller's code stays set, for raise_pending.
    int PyErr_CheckSignals()
    PyObject *PyObject_CallFunction(PyObject *, const char *, ...)
    void Py_DECREF(PyObject *)

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
cdef int active_calls = 0               # changed by add_to_count only
cdef int cpu_quota = 1 << 16            # CPUs that the process may use the time of


cdef double seconds_now() noexcept nogil:
    return 1e-9 * nanoseconds()


cdef bint progress_raised(Interrupt *interrupt) noexcept:
    """Tell the caller's function how many tasks are done."""
    cdef PyObject *answer
    if interrupt.progress == NULL or interrupt.total == 0:
        return False
    answer = PyObject_CallFunction(
        <PyObject *>interrupt.progress, "nn", load_size(&interrupt.done), interrupt.total)
    if answer == NULL:
        return True
    Py_DECREF(answer)
    return False


cdef bint caller_raised(Interrupt *interrupt) noexcept with gil:
    """Run the handlers of signals that came, of which only the main thread gets some."""
    return PyErr_CheckSignals() != 0 or progress_raised(interrupt)


cdef void look_for_signals(Interrupt *interrupt) noexcept nogil:
    """Look whether the caller ends the call; on the calling thread only, where exceptions belong.
    """
    cdef double now
    if interrupt.stop:
        return
    now = seconds_now()
    if interrupt.next_look == 0:        # the call has just begun
        interrupt.next_look = now + 1e-3 * SIGNAL_MILLISECONDS
    elif now >= interrupt.next_look:
        interrupt.stop = caller_raised(interrupt)
        interrupt.next_look = seconds_now() + 1e-3 * SIGNAL_MILLISECONDS


cdef int raise_pending(Interrupt *interrupt) except -1:
    """Raise what the caller's code has raised; else tell its function that all is done."""
    return -1 if interrupt.stop or progress_raised(interrupt) else 0


cdef void run_one(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    """Run a task of a loop, unless the caller's code ended it."""
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
    if loop.interrupt != NULL and loop.interrupt.progress != NULL:
        add_to_size(&loop.interrupt.done, 1)


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
    cdef int calls = add_to_count(&active_calls, 1)
    if budget <= 1 or work < SERIAL_WORK or qkv_forked():
        return 1
    return max(1, min(budget, load_int(&cpu_quota), qkv_usable_cpus()) // calls)


cdef void end_call() noexcept:
    add_to_count(&active_calls, -1)


def notify_call_start():
    """Keep threads awake that have just done a call's work: another call has begun."""
    qkv_notify_call_start()


def limit_cpus(int quota):
    """Let no call use more threads than this, because the process has time for so many CPUs."""
    store_int(&cpu_quota, max(1, quota))


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
