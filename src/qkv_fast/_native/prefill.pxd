from .types cimport HeadView, Plan

cdef void run_prefill_task(const Plan *plan, const HeadView *head,
                           Py_ssize_t number) noexcept nogil
