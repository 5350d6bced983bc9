from libc.stdint cimport int64_t

from .kernels cimport qkv_tile_kernels
from .types cimport HeadView, Launch, Plan, QueryTile


cdef struct WeightsCall:
    Launch launch                       # of which prefill's plan is used
    bint is_softmax                     # weights or their sums, else the modified scores
    bint knows_lse                      # the plan's lse is read, not written
    const int64_t *heads                # query heads that are computed, in this order; NULL: all
    Py_ssize_t kv_group                 # query heads that share a KV head
    Py_ssize_t runs                     # of a batch entry: KV heads, or selected query heads
    Py_ssize_t tasks_per_run
    Py_ssize_t record_bytes             # of a BlockRecord and its row_max
    Py_ssize_t tile_bytes               # of what is kept for a tile behind the plan's scratch
    Py_ssize_t range_keys               # received: keys of a task that sums over the queries
    Py_ssize_t ranges_per_run           # received: such tasks of a run
    char *row_max                       # received: [batches * runs][q_len] reals
    char *row_weight                    # received: likewise; a weight is 2^(score - row_max) times it


cdef int view_selection(WeightsCall *call, problem) except -1
cdef void plan_weights(WeightsCall *call, const qkv_tile_kernels *kernels) noexcept
cdef Py_ssize_t count_weights_tasks(WeightsCall *call) noexcept
cdef Py_ssize_t lay_out_weights(WeightsCall *call, Py_ssize_t threads) noexcept
cdef void run_weights_task(const void *call, int thread, Py_ssize_t task) noexcept nogil
cdef void take_known_lse(const Plan *plan, QueryTile *tile) noexcept nogil
cdef void open_run(const WeightsCall *call, int thread, Py_ssize_t run,
                   HeadView *head) noexcept nogil
cdef double raised(double top, double row_max) noexcept nogil
