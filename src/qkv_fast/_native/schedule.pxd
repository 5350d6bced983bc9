from .types cimport Launch

cdef void count_tasks(Launch *launch) noexcept nogil
cdef void set_offsets(Launch *launch) noexcept nogil
cdef void run_task(const void *launch, int thread, Py_ssize_t task) noexcept nogil
