from .types cimport Interrupt

ctypedef void (*task_function)(const void *context, int thread, Py_ssize_t task) noexcept nogil

cdef void run_tasks(task_function function, const void *context, Py_ssize_t tasks, int threads,
                    Interrupt *interrupt, double *busy) noexcept nogil
cdef int begin_call(double work, int budget) noexcept
cdef void end_call() noexcept
cdef void look_for_signals(Interrupt *interrupt) noexcept nogil
cdef int raise_pending(const Interrupt *interrupt) except -1
