"""The structures of a call, from the whole down to a block of keys, and small accessors.

    Launch          a call: a plan for each algorithm, and where the tasks begin
    Plan            what prefill or decode has to know, the same for all tasks
    TensorView      where an array of the caller's lies
    ScratchLayout   where the arrays in a thread's scratch lie
    SequencePlan    a batch entry: its queries, its keys, its tasks
    HeadView        a KV head of a batch entry: where its queries and outputs lie
    HeadRows        its keys, its values or their scales
    KVBlock         neighbouring keys and values, and what was made ready of them
    QueryTile       rows of queries and the state of their softmax
    Visibility      what of a block a query tile sees
    PartialState    the state of a softmax over one split of the keys

A "real" is the float or double that a call computes with; an "input" is an element of what its
products multiply, a real or a bfloat16.
"""

from libc.stdint cimport int64_t, uint64_t

from .kernels cimport (
    QKV_BOOL, QKV_FLOAT32, QKV_FLOAT64, QKV_INT8, QKV_SWAPPED, qkv_span, qkv_tile_kernels,
)
from .shared cimport flag
from .tuning cimport ALIGNMENT, MAX_BLOCK_K, MAX_LANES, MAX_VECTORS

cdef extern from *:
    """
    #define QKV_UNBOUNDED ((int64_t)1 << 62)  /* _problem.UNBOUNDED */
    """
    int64_t UNBOUNDED "QKV_UNBOUNDED"

ctypedef fused real:
    float
    double


cdef struct TensorView:
    char *data                          # NULL: the array is absent
    const Py_ssize_t *batch_strides     # in bytes, one for each batch axis; one for pages
    Py_ssize_t head, row, col           # strides in bytes
    int type                            # as runtime/convert.h numbers them
    bint contiguous                     # kernels can use the rows where they are


cdef struct Interrupt:
    flag stop                           # the caller's code raised: leave the rest undone
    double next_look                    # when the calling thread looks for signals again
    void *progress                      # the caller's function of (done, total), or NULL
    Py_ssize_t done, total              # tasks of the call; counted for that function alone


cdef struct ScratchLayout:              # offsets in bytes; arrays follow one another in this order
    Py_ssize_t scores                   # [block_k][rows] reals
    Py_ssize_t gathered                 # rows of queries, masks, values or outputs, converted
    Py_ssize_t keys                     # [block_k] rows of inputs, converted or padded
    Py_ssize_t values                   # [block_k] rows of inputs, converted
    Py_ssize_t packed_values            # as pack_values writes them
    Py_ssize_t key_scales, value_scales  # [block_k] floats each
    Py_ssize_t tiles                    # tile_bytes for each query tile of a task:
    Py_ssize_t query                    #   after the QueryTile, its queries
    Py_ssize_t acc                      #   [v_dim][rows] reals; in decode [rows][acc_stride]
    Py_ssize_t total, error             #   acc's folded sums, of the same shape
    Py_ssize_t tile_scores              #   scores, where a task has several heads
    Py_ssize_t tile_bytes
    Py_ssize_t bytes                    # of all


cdef struct Plan:
    const qkv_tile_kernels *kernels
    Interrupt *interrupt
    Py_ssize_t batch_ndim
    const Py_ssize_t *batch_shape
    Py_ssize_t num_kv_heads, group, q_len, kv_len, head_dim, v_dim
    TensorView query, key, value, mask, bias, out, lse
    TensorView key_scales, value_scales
    TensorView query_offset, query_starts, query_lengths, key_starts, key_lengths
    TensorView key_begins, key_ends     # of each row; both absent, or none
    TensorView slopes, block_table
    const int64_t *rows                 # queries that are computed, in this order; NULL: all
    Py_ssize_t mask_len                 # of a mask's rows, and of a bias's
    Py_ssize_t page_size                # 0: keys are not in pages
    const double *sinks                 # (Hq,) or NULL
    double scale
    double query_scale, score_scale     # their product is scale * log2(e)
    double softcap                      # 0: none
    bint has_modifiers                  # softcap, ALiBi, an additive mask or a bias
    int64_t left, right                 # the window
    int input_bytes
    Py_ssize_t block_k, fold_keys
    Py_ssize_t blocks_per_look          # at the clock
    int fixed_nvec                      # 0: as many vectors as a tile's rows need
    Py_ssize_t tiles_per_task           # prefill
    bint values_in_keys                 # a value is its key's first elements, in the same memory
    bint prefetches                     # prefill asks for keys and values before it needs them
    Py_ssize_t heads_per_task           # decode
    bint sights_differ                  # decode: rows of a KV group have other ranges or masks
    Py_ssize_t adjacent_keys            # decode: see plan_interleaving in plan.pyx
    Py_ssize_t interleave_span
    ScratchLayout layout
    Py_ssize_t key_bytes, packed_stride  # of a key row and of a packed row in the scratch
    Py_ssize_t q_stride, acc_stride     # decode: reals in a row of the queries and of acc


cdef struct TaskOffset:                 # of a batch entry
    Py_ssize_t task                     # its first task
    Py_ssize_t partial                  # its first partial state of decode
    Py_ssize_t tile_partial             # its first one of prefill


cdef struct Launch:
    Plan prefill, decode
    Interrupt interrupt
    double decode_occupancy             # see is_decode in schedule.pyx
    Py_ssize_t max_decode_rows          # 0: prefill alone
    Py_ssize_t batches
    TaskOffset totals                   # all tasks and partial states
    double work                         # multiply-adds, roughly
    TaskOffset *offsets                 # batches + 1
    char *scratch
    Py_ssize_t scratch_bytes            # of a thread
    char *partials
    Py_ssize_t partial_bytes
    char *tile_partials                 # the same for prefill
    Py_ssize_t tile_partial_bytes


cdef struct SequencePlan:
    Py_ssize_t batch, q_start, q_len, k_start
    int64_t offset                      # the first query's position
    int64_t kv_len                      # keys from here on are padding
    bint is_decode
    Py_ssize_t tasks_per_head
    Py_ssize_t splits                   # of a head's keys; 1: its tasks see all keys
    Py_ssize_t first_split              # the split of a head's first task
    Py_ssize_t tiles, tasks_per_split   # prefill: query tiles of a head; tasks with the same keys


cdef struct HeadRows:
    const TensorView *view
    char *data                          # the row of its first key; with pages, in the first page
    Py_ssize_t length                   # elements of a row
    Py_ssize_t page_size
    const int64_t *pages                # of the batch entry, or NULL
    char *copies                        # in the scratch: where rows of a block are converted to


cdef struct HeadView:
    Py_ssize_t kv_head, q_len
    int number                          # among the heads of its task
    bint on_caller                      # the task runs on the calling thread
    char *query
    char *out
    char *lse
    char *mask
    char *bias
    char *slopes
    char *key_begins                    # int64
    char *key_ends
    HeadRows key, value, key_scales, value_scales
    int64_t offset, kv_len
    char *scratch                       # of the thread
    char *gathered                      # there


cdef struct KVBlock:
    int64_t begin
    Py_ssize_t nk
    Py_ssize_t before_window            # leading keys that no row of the task can see
    const char *keys                    # NULL: not yet made ready
    const char *value_rows              # NULL: not yet made ready
    const char *values                  # as accumulate reads them; NULL: not yet made ready
    Py_ssize_t key_stride, row_stride, value_stride
    int finite                          # whether all of value_rows is; -1: not known


cdef struct Visibility:
    Py_ssize_t nk                       # of the block's keys, those up to the last that a row sees
    bint partial                        # some row does not see some key: tile.allow has which
    uint64_t has_keys                   # bit i: row i sees a key


cdef struct PartialState:               # row_max, row_sum and acc follow it in memory
    int64_t remaining                   # of a head's or tile's first one: splits not yet ended
    uint64_t has_keys


cdef struct QueryTile:
    void *query
    void *acc
    void *total
    void *error
    char *scores                        # of a block, then its weights
    Py_ssize_t row_begin
    int count, nvec, lanes              # rows; vectors; rows of whole vectors
    int64_t begin_min, begin_max        # of the rows' key_begin
    int64_t end_min, end_max            # of the rows' key_end
    bint first_block                    # acc holds nothing yet
    bint folded                         # total and error hold something
    int64_t fold_index                  # acc holds keys from fold_index * fold_keys on
    uint64_t has_keys                   # bit i: row i has seen a key
    const char *query_rows[MAX_LANES]
    const char *mask_rows[MAX_LANES]
    const char *bias_rows[MAX_LANES]
    const char *rows[MAX_LANES]         # for a kernel's use
    char *out_rows[MAX_LANES]
    char *lse_rows[MAX_LANES]
    int64_t key_begin[MAX_LANES]        # by position and range a row sees [key_begin, key_end)
    int64_t key_end[MAX_LANES]
    int64_t position[MAX_LANES]
    double row_max[MAX_LANES]           # from here on arrays of reals, large enough for doubles
    double row_sum[MAX_LANES]
    double rescale[MAX_LANES]
    double weight[MAX_LANES]
    double slope[MAX_LANES]
    double relative_position[MAX_LANES]
    double fold_max[MAX_LANES]          # row_max when acc was folded last
    double total_sum[MAX_LANES]
    double sum_error[MAX_LANES]
    qkv_span span[MAX_VECTORS]
    uint64_t allow[MAX_BLOCK_K + 1]     # bit i of allow[k]: row i sees key k


cdef inline Py_ssize_t round_up(Py_ssize_t size, Py_ssize_t step=ALIGNMENT) noexcept nogil:
    return (size + step - 1) // step * step


cdef inline QueryTile *tile_of(const Plan *plan, const HeadView *head, int number) noexcept nogil:
    """Return the task's query tile of that number."""
    return <QueryTile *>(head.scratch + plan.layout.tiles + number * plan.layout.tile_bytes)


cdef inline void set_real(void *reals, int i, int real_bytes, double x) noexcept nogil:
    if real_bytes == 4:
        (<float *>reals)[i] = <float>x
    else:
        (<double *>reals)[i] = x


cdef inline double get_real(const void *reals, int i, int real_bytes) noexcept nogil:
    return (<const float *>reals)[i] if real_bytes == 4 else (<const double *>reals)[i]


cdef inline int size_of(int type) noexcept nogil:
    """Return the bytes of an element."""
    type &= ~QKV_SWAPPED
    return 8 if type == QKV_FLOAT64 else 4 if type == QKV_FLOAT32 else 1 if type == QKV_INT8 else 2


cdef inline uint64_t lane_bits(int lanes) noexcept nogil:
    return ~<uint64_t>0 >> (64 - lanes)


cdef inline bint is_shared(const TensorView *mask) noexcept nogil:
    """Return whether all rows of a batch entry have the same mask, as for padding."""
    return mask.head == 0 and mask.row == 0


cdef inline bint is_shared_by_heads(const TensorView *view) noexcept nogil:
    return view.head == 0


cdef inline bint is_additive(const TensorView *mask) noexcept nogil:
    """Return whether there is a mask or a bias that is added to the scores."""
    return mask.data != NULL and mask.type != QKV_BOOL


cdef inline bint adds_to_scores(const Plan *plan) noexcept nogil:
    """Return whether something is added to the scores that may hide keys by -inf."""
    return is_additive(&plan.mask) or is_additive(&plan.bias)


cdef inline Py_ssize_t lanes_per_step(const Plan *plan) noexcept nogil:
    """Return the number that the rows of a query tile are rounded up to a multiple of."""
    return plan.kernels.lanes * max(1, plan.fixed_nvec)


cdef inline char *batch_entry(const Plan *plan, const TensorView *view,
                              Py_ssize_t batch) noexcept nogil:
    """Return where a batch entry of the array begins; NULL where the array is absent."""
    cdef char *data = view.data
    cdef Py_ssize_t axis = plan.batch_ndim
    if data == NULL:
        return NULL
    while axis > 0:
        axis -= 1
        data += batch % plan.batch_shape[axis] * view.batch_strides[axis]
        batch //= plan.batch_shape[axis]
    return data


cdef inline void open_block(KVBlock *block, const Plan *plan, int64_t begin, int64_t key_begin,
                            int64_t key_end) noexcept nogil:
    """Begin the block at key `begin` of a task that needs the keys [key_begin, key_end)."""
    block.begin = begin
    block.nk = min(plan.block_k, key_end - begin)
    block.before_window = max(0, key_begin - begin)
    block.keys = block.value_rows = block.values = NULL
    block.finite = -1
