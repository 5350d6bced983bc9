from .types cimport HeadView, Launch, SequencePlan

cdef void run_decode_task(const Launch *launch, const HeadView *head,
                          const SequencePlan *sequence, Py_ssize_t split) noexcept nogil
