"""The state of an online softmax, for each row of a query tile: (row_max, row_sum, acc).

With scores s in log2 units and m = row_max, over the keys so far:

    row_max = max s        row_sum = sum 2^(s - m)        acc = sum 2^(s - m) value

The answer is acc / row_sum, the log-sum-exp is m ln 2 + ln row_sum. (Milakov and Gimelshein 2018,
arXiv:1805.02867, algorithm 3; kept a block at a time as in Dao et al. 2022, arXiv:2205.14135.)
"""

from libc.math cimport INFINITY, M_LN2, M_LOG2E, exp2, log
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from .kernels cimport qkv_tile_kernels
from .rows cimport load_scales
from .tuning cimport MAX_LANES
from .types cimport (
    HeadView, KVBlock, PartialState, Plan, QueryTile, Visibility, get_real, real, round_up,
    set_real,
)

cdef extern from "<float.h>":
    double FLT_MAX, DBL_MAX

cdef extern from *:
    int64_t subtract_and_get "__sync_sub_and_fetch"(int64_t *, int64_t) nogil


cdef double lowest(int real_bytes) noexcept nogil:
    """Return the lowest finite real: row_max before the first key."""
    return -FLT_MAX if real_bytes == 4 else -DBL_MAX


cdef void reset_state(const Plan *plan, QueryTile *tile) noexcept nogil:
    """Make the state that of no keys."""
    cdef int i, real_bytes = plan.kernels.real_bytes
    tile.first_block = True
    tile.folded = False
    tile.fold_index = -1
    tile.has_keys = 0
    memset(tile.row_sum, 0, tile.lanes * real_bytes)
    if real_bytes == 4:
        for i in range(tile.lanes):
            (<float *>tile.row_max)[i] = -FLT_MAX
    else:
        for i in range(tile.lanes):
            (<double *>tile.row_max)[i] = -DBL_MAX


cdef void weigh_scores(const Plan *plan, const HeadView *head, QueryTile *tile,
                       const KVBlock *block, const Visibility *visible) noexcept nogil:
    """Turn the scores of a block into weights; update row_max, row_sum and rescale for it."""
    cdef const qkv_tile_kernels *kernels = plan.kernels
    cdef Py_ssize_t nk = visible.nk
    tile.has_keys |= visible.has_keys
    kernels.softmax(tile.scores, nk, tile.nvec, tile.allow if visible.partial else NULL, tile.span,
                    1.0 if plan.has_modifiers else plan.score_scale, tile.row_max, tile.row_sum,
                    tile.rescale)
    if plan.value_scales.data != NULL:
        kernels.scale_keys(tile.scores, nk, tile.nvec,
                           load_scales(&head.value_scales, block, nk), 1)


# --- Folding: sums of sums, whose error does not grow with the number of keys -------------------

cdef void fold(const Plan *plan, QueryTile *tile, bint finish) noexcept nogil:
    """Move acc and row_sum to total and total_sum; finish: and the whole sums back."""
    cdef const qkv_tile_kernels *kernels = plan.kernels
    cdef Py_ssize_t row_bytes = tile.lanes * kernels.real_bytes
    cdef double before, now
    cdef int i
    if not tile.folded:
        memset(tile.total, 0, plan.v_dim * row_bytes)
        memset(tile.error, 0, plan.v_dim * row_bytes)
        memset(tile.total_sum, 0, row_bytes)
        memset(tile.sum_error, 0, row_bytes)
        memcpy(tile.fold_max, tile.row_max, row_bytes)
        tile.folded = True
    for i in range(tile.lanes):         # the total was taken with fold_max
        before = get_real(tile.fold_max, i, kernels.real_bytes)
        now = get_real(tile.row_max, i, kernels.real_bytes)
        set_real(tile.rescale, i, kernels.real_bytes, 1 if before == now else exp2(before - now))
    memcpy(tile.fold_max, tile.row_max, row_bytes)
    if tile.first_block:
        memset(tile.acc, 0, plan.v_dim * row_bytes)
    kernels.fold(tile.total, tile.error, tile.acc, plan.v_dim, tile.nvec, tile.rescale, finish)
    kernels.fold(tile.total_sum, tile.sum_error, tile.row_sum, 1, tile.nvec, tile.rescale, finish)
    tile.first_block = not finish
    if not finish:
        memset(tile.row_sum, 0, row_bytes)


cdef void fold_before(const Plan *plan, QueryTile *tile, int64_t begin) noexcept nogil:
    """Fold what acc holds if the keys from `begin` on belong to the next fold."""
    if begin // plan.fold_keys == tile.fold_index:
        return
    if tile.fold_index >= 0:
        fold(plan, tile, False)
    tile.fold_index = begin // plan.fold_keys


# --- The answer ---------------------------------------------------------------------------------

cdef double weight_with_sink(double row_max, double row_sum, double sink) noexcept nogil:
    """Return 1 / (row_sum + 2^(sink - row_max)), scaled to the larger of row_max and sink."""
    cdef double top = sink if sink > row_max else row_max
    cdef double weight
    if sink == INFINITY:
        return 0 * row_sum              # NaN stays NaN
    weight = exp2(row_max - top)
    return weight / (row_sum * weight + exp2(sink - top))


cdef void finish_state(const Plan *plan, const HeadView *head, QueryTile *tile) noexcept nogil:
    """Set tile.weight, which turns acc into the answer, and write the log-sum-exps."""
    cdef int i, real_bytes = plan.kernels.real_bytes
    cdef double row_max, row_sum, weight, lse
    cdef bint has_keys
    if tile.folded:
        fold(plan, tile, True)
    memset(tile.weight, 0, tile.lanes * real_bytes)
    for i in range(tile.count):
        row_max = get_real(tile.row_max, i, real_bytes)
        row_sum = get_real(tile.row_sum, i, real_bytes)
        has_keys = tile.has_keys >> i & 1
        if has_keys:
            weight = 1 / row_sum
            if plan.sinks != NULL:
                weight = weight_with_sink(row_max, row_sum, M_LOG2E * plan.sinks[
                    head.kv_head * plan.group + (tile.row_begin + i) // head.q_len])
            set_real(tile.weight, i, real_bytes, weight)
        if head.lse != NULL:
            if row_max != lowest(real_bytes):
                row_max *= M_LN2        # else a bias of finfo.min, which the kernel limited to that
            lse = row_max + log(row_sum) if has_keys else -INFINITY
            set_real(tile.lse_rows[i], 0, real_bytes, lse)


# --- Partial states: a PartialState, row_max [rows], row_sum [rows], acc [rows][acc_stride] ------

cdef bint ends_last(char *partials) noexcept nogil:
    """Count down the splits that have not ended; return whether this was the last one."""
    return subtract_and_get(&(<PartialState *>partials).remaining, 1) == 0


cdef void save_partial(const Plan *plan, const QueryTile *tile, char *memory) noexcept nogil:
    """Save the state of a decode tile, all but `remaining`."""
    cdef Py_ssize_t bytes = tile.count * plan.kernels.real_bytes
    (<PartialState *>memory).has_keys = tile.has_keys
    memory += round_up(sizeof(PartialState))
    memcpy(memory, tile.row_max, bytes)
    memcpy(memory + bytes, tile.row_sum, bytes)
    memcpy(memory + 2 * bytes, tile.acc, bytes * plan.acc_stride)


cdef void merge_row(const Plan *plan, QueryTile *tile, const real *first, int row,
                    Py_ssize_t stride, Py_ssize_t count, double *total) noexcept nogil:
    """Merge one row of `count` states, `stride` reals apart, in their order, in double."""
    cdef Py_ssize_t i, d, acc_stride = plan.acc_stride
    cdef real *acc = <real *>tile.acc + row * acc_stride
    cdef const real *state
    cdef const real *values
    cdef double top = first[row], row_sum = 0, weight
    for i in range(1, count):
        weight = first[i * stride + row]
        if weight > top:
            top = weight
    memset(total, 0, acc_stride * sizeof(double))
    for i in range(count):
        state = first + i * stride
        weight = exp2(<double>state[row] - top)
        row_sum += weight * <double>state[tile.count + row]
        values = state + 2 * tile.count + row * acc_stride
        for d in range(acc_stride):
            total[d] += weight * <double>values[d]
    (<real *>tile.row_max)[row] = <real>top
    (<real *>tile.row_sum)[row] = <real>row_sum
    for d in range(acc_stride):
        acc[d] = <real>total[d]


cdef void merge_partials(const Plan *plan, const HeadView *head, QueryTile *tile,
                         const char *partials, Py_ssize_t partial_bytes,
                         Py_ssize_t count) noexcept nogil:
    """Make the tile's state that of all splits, merged in their order, whichever ended first."""
    cdef double *total = <double *>head.gathered
    cdef Py_ssize_t i
    cdef int row
    tile.has_keys = 0
    for i in range(count):
        tile.has_keys |= (<const PartialState *>(partials + i * partial_bytes)).has_keys
    partials += round_up(sizeof(PartialState))
    for row in range(tile.count):
        if plan.kernels.real_bytes == 4:
            merge_row(plan, tile, <const float *>partials, row, partial_bytes // 4, count, total)
        else:
            merge_row(plan, tile, <const double *>partials, row, partial_bytes // 8, count, total)


# --- The same of prefill: row_max [lanes], row_sum [lanes], acc [v_dim][lanes] ------------------

cdef void save_tile_partial(const Plan *plan, QueryTile *tile, char *memory) noexcept nogil:
    """Save the state of a tile whose keys lie in one fold, all but `remaining`."""
    cdef Py_ssize_t bytes = tile.lanes * plan.kernels.real_bytes
    (<PartialState *>memory).has_keys = tile.has_keys
    memory += round_up(sizeof(PartialState))
    memcpy(memory, tile.row_max, bytes)
    memcpy(memory + bytes, tile.row_sum, bytes)
    if tile.first_block:
        memset(memory + 2 * bytes, 0, bytes * plan.v_dim)
    else:
        memcpy(memory + 2 * bytes, tile.acc, bytes * plan.v_dim)


cdef void merge_tile(const Plan *plan, QueryTile *tile, const real *first, Py_ssize_t stride,
                     Py_ssize_t count) noexcept nogil:
    """Merge `count` states of a tile, `stride` reals apart, in their order, in double."""
    cdef Py_ssize_t i, d
    cdef int row, lanes = tile.lanes
    cdef double[MAX_LANES] top, row_sum, weight
    cdef double *total
    cdef const real *state
    for row in range(lanes):
        top[row] = first[row]
        row_sum[row] = 0
        for i in range(1, count):
            top[row] = max(top[row], <double>first[i * stride + row])
    memset(tile.total, 0, plan.v_dim * lanes * sizeof(double))
    for i in range(count):
        state = first + i * stride
        for row in range(lanes):
            weight[row] = exp2(<double>state[row] - top[row])
            row_sum[row] += weight[row] * <double>state[lanes + row]
        state += 2 * lanes
        total = <double *>tile.total
        for d in range(plan.v_dim):
            for row in range(lanes):
                total[row] += weight[row] * <double>state[row]
            state += lanes
            total += lanes
    for row in range(lanes):
        (<real *>tile.row_max)[row] = <real>top[row]
        (<real *>tile.row_sum)[row] = <real>row_sum[row]
    for d in range(plan.v_dim * lanes):
        (<real *>tile.acc)[d] = <real>(<double *>tile.total)[d]


cdef void merge_tile_partials(const Plan *plan, QueryTile *tile, const char *partials,
                              Py_ssize_t partial_bytes, Py_ssize_t count) noexcept nogil:
    """Make the tile's state that of all splits, merged in their order, whichever ended first."""
    cdef Py_ssize_t i
    tile.has_keys = 0
    for i in range(count):
        tile.has_keys |= (<const PartialState *>(partials + i * partial_bytes)).has_keys
    tile.first_block = False
    partials += round_up(sizeof(PartialState))
    if plan.kernels.real_bytes == 4:
        merge_tile(plan, tile, <const float *>partials, partial_bytes // 4, count)
    else:
        merge_tile(plan, tile, <const double *>partials, partial_bytes // 8, count)
