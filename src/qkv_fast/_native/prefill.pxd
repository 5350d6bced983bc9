from libc.stdint cimport int64_t

from .types cimport (
    HeadView, KVBlock, Launch, Plan, QueryTile, SequencePlan, Visibility,
)

cdef void run_prefill_task(const Launch *launch, const HeadView *head,
                           const SequencePlan *sequence, Py_ssize_t task) noexcept nogil
cdef int open_tiles(const Plan *plan, const HeadView *head, Py_ssize_t number,
                    int64_t *key_begin, int64_t *key_end) noexcept nogil
cdef void attend_keys(const Plan *plan, const HeadView *head, int tiles, int64_t key_begin,
                      int64_t key_end) noexcept nogil
cdef void compute_scores(const Plan *plan, const HeadView *head, QueryTile *tile,
                         KVBlock *block, const Visibility *visible) noexcept nogil
