from .types cimport HeadView, Launch, Plan, SequencePlan

cdef void count_tasks(Launch *launch) noexcept nogil
cdef void set_offsets(Launch *launch) noexcept nogil
cdef void run_task(const void *launch, int thread, Py_ssize_t task) noexcept nogil
cdef void open_sequence(const Launch *launch, Py_ssize_t batch,
                        SequencePlan *sequence) noexcept nogil
cdef void open_head(const Plan *plan, const SequencePlan *sequence, Py_ssize_t kv_head,
                    HeadView *head) noexcept nogil
