from .weights cimport WeightsCall

cdef enum:
    STATISTICS = 8                      # numbers in a row of out

cdef Py_ssize_t count_ranges(const WeightsCall *call, Py_ssize_t range_keys) noexcept nogil
cdef Py_ssize_t lay_out_received(WeightsCall *call, Py_ssize_t threads) noexcept
cdef Py_ssize_t norms_bytes(const WeightsCall *call) noexcept
cdef void run_norms_task(const void *call, int thread, Py_ssize_t task) noexcept nogil
cdef void run_received_task(const void *call, int thread, Py_ssize_t task) noexcept nogil
cdef Py_ssize_t lay_out_statistics(WeightsCall *call, Py_ssize_t threads) noexcept
cdef void run_statistics_task(const void *call, int thread, Py_ssize_t task) noexcept nogil
