from .types cimport HeadView, Interrupt, Plan

ctypedef void (*task_function)(const void *context, int thread, Py_ssize_t task) noexcept nogil

cdef void run_tasks(task_function function, const void *context, Py_ssize_t tasks, int threads,
                    Interrupt *interrupt, double *busy, bint is_short) noexcept nogil
cdef int begin_call(double work, int budget) noexcept
cdef void end_call() noexcept
cdef void look_for_signals(Interrupt *interrupt) noexcept nogil
cdef int raise_pending(Interrupt *interrupt) except -1


cdef inline bint goes_on(const Plan *plan, const HeadView *head, Py_ssize_t *blocks) noexcept nogil:
    """Count a block of a task's keys; return False where a signal has ended the call."""
    blocks[0] += 1
    if blocks[0] % plan.blocks_per_look == 0 and head.on_caller:
        look_for_signals(plan.interrupt)
    return not plan.interrupt.stop
