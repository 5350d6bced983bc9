"""Sums of the weights, which are never held: over the queries, and over the keys of each query.

    received: out [keys]
        for each tile of queries:               tasks as those of prefill
            row_max, row_weight = 1 / row_sum   of the op, with values of size 0
        for each range of keys:                 tasks of their own
            for each tile of queries, for each block of the range:
                S = K Qᵀ;  modifiers;  P = 2^(S - row_max)
                out += P row_weight             in double

    statistics: out [rows][STATISTICS]
        for each tile of queries, for each block of keys:
            S = K Qᵀ;  modifiers
            sums of P, of P (row_max - S) and of P |position - key|
                                                in double from block to block

No sum is shared by two tasks, so that the number of threads changes no bit. A row's entropy is

    -sum p log2 p = sum P (row_max - S) / sum P + log2(sum P)        p = P / sum P

whose terms are all at least 0.
"""

from libc.math cimport INFINITY, M_LOG2E, NAN, exp2, isfinite, log2
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from .kernels cimport QKV_FLOAT32, QKV_FLOAT64, QKV_KEY_RUN, qkv_tile_kernels
from .parallel cimport goes_on
from .plan cimport choose_prefill_tasks, lay_out_prefill
from .prefill cimport attend_keys, compute_scores, open_tiles
from .scores cimport find_visibility, modify_scores, set_relative
from .softmax_state cimport finish_state, weigh_scores, weight_with_sink
from .tuning cimport MAX_BLOCK_K, MAX_LANES, RANGE_KEYS, TASKS_PER_THREAD
from .types cimport (
    HeadView, KVBlock, Plan, QueryTile, Visibility, get_real, open_block, real,
    round_up, set_real, tile_of,
)
from .weights cimport WeightsCall, count_weights_tasks, open_run, raised, take_known_lse

cdef extern from *:
    """
    /* Addresses of a block's runs of keys, and those behind them that a kernel prefetches from. */
    #define QKV_SUMMED_RUNS (256 / QKV_KEY_RUN + QKV_KEY_RUNS_AHEAD)
    """
    enum:
        SUMMED_RUNS "QKV_SUMMED_RUNS"

cdef extern from "<math.h>":
    int signbit(double) nogil           # a macro, for floats too


# --- Received: the norms of the rows ------------------------------------------------------------

cdef Py_ssize_t count_ranges(const WeightsCall *call, Py_ssize_t range_keys) noexcept nogil:
    """Return the tasks of the second pass, with so many keys each."""
    cdef Py_ssize_t ranges = (call.launch.prefill.kv_len + range_keys - 1) // range_keys
    return call.launch.batches * call.runs * ranges


cdef Py_ssize_t lay_out_received(WeightsCall *call, Py_ssize_t threads) noexcept:
    """Choose the tasks of both passes and the scratch of a thread; return those of the first."""
    cdef Plan *plan = &call.launch.prefill
    choose_prefill_tasks(plan, count_weights_tasks(call), threads)
    lay_out_prefill(plan)
    call.range_keys = RANGE_KEYS
    while (call.range_keys > plan.block_k
           and count_ranges(call, call.range_keys) < threads * TASKS_PER_THREAD):
        call.range_keys //= 2
    call.ranges_per_run = (plan.kv_len + call.range_keys - 1) // call.range_keys
    call.launch.scratch_bytes = plan.layout.bytes + round_up(call.range_keys * sizeof(double))
    return count_weights_tasks(call)


cdef Py_ssize_t norms_bytes(const WeightsCall *call) noexcept:
    """Return the bytes of row_max, which are those of row_weight."""
    cdef const Plan *plan = &call.launch.prefill
    return round_up(call.launch.batches * call.runs * plan.q_len * plan.kernels.real_bytes)


cdef void run_norms_task(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    """Find row_max and row_weight of the rows of a task (a task_function of parallel.pxd)."""
    cdef const WeightsCall *call = <const WeightsCall *>context
    cdef const Plan *plan = &call.launch.prefill
    cdef Py_ssize_t run = task // call.tasks_per_run, at
    cdef int real_bytes = plan.kernels.real_bytes
    cdef int64_t key_begin, key_end
    cdef int i, tiles
    cdef HeadView head
    cdef QueryTile *tile
    open_run(call, thread, run, &head)
    if plan.kernels.enter != NULL:
        plan.kernels.enter()
    tiles = open_tiles(plan, &head, call.tasks_per_run - 1 - task % call.tasks_per_run,
                       &key_begin, &key_end)
    if not call.knows_lse:
        attend_keys(plan, &head, tiles, key_begin, key_end)
    head.lse = NULL                     # which would be written
    for i in range(tiles):
        tile = tile_of(plan, &head, i)
        if call.knows_lse:
            take_known_lse(plan, tile)
            tile.has_keys = ~<unsigned long long>0
        finish_state(plan, &head, tile)
        at = (run * plan.q_len + tile.row_begin) * real_bytes
        memcpy(call.row_max + at, tile.row_max, tile.count * real_bytes)
        memcpy(call.row_weight + at, tile.weight, tile.count * real_bytes)
    if plan.kernels.leave != NULL:
        plan.kernels.leave()


# --- Received: sums over the queries ------------------------------------------------------------

cdef void weigh_lane(real *weights, Py_ssize_t nk, int lanes, real factor) noexcept nogil:
    """Multiply a lane's weights by a factor that is not finite; an excluded key's become 0."""
    cdef Py_ssize_t k
    for k in range(nk):
        if weights[k * lanes] == 0 and signbit(weights[k * lanes]):
            weights[k * lanes] = 0
        else:
            weights[k * lanes] *= factor


cdef void find_factors(const Plan *plan, QueryTile *tile, const char *row_max, const char *row_weight,
                       Py_ssize_t nk, void *factors) noexcept nogil:
    """Set what the weights of the block must be multiplied by, in each lane; 0 past the last row.

    The softmax raises a row_max that is smaller than a score: a log-sum-exp that was given is
    rounded.
    """
    cdef int i, real_bytes = plan.kernels.real_bytes
    cdef double factor
    memset(factors, 0, tile.lanes * real_bytes)
    memcpy(factors, row_weight, tile.count * real_bytes)
    for i in range(tile.count):
        factor = get_real(factors, i, real_bytes)
        if get_real(tile.rescale, i, real_bytes) != 1:
            factor *= raised(get_real(tile.row_max, i, real_bytes),
                             get_real(row_max, i, real_bytes))
        if not isfinite(factor):
            if real_bytes == 4:
                weigh_lane(<float *>tile.scores + i, nk, tile.lanes, <float>factor)
            else:
                weigh_lane(<double *>tile.scores + i, nk, tile.lanes, factor)
            factor = 1
        set_real(factors, i, real_bytes, factor)


cdef void add_products(const Plan *plan, const QueryTile *tile, Py_ssize_t nk, const void *factors,
                       double *sums) noexcept nogil:
    """sums[k] += sum_i P[k][i] factors[i], as the scores of a single query."""
    cdef const qkv_tile_kernels *kernels = plan.kernels
    cdef int real_bytes = kernels.real_bytes
    cdef Py_ssize_t k, stride = tile.lanes * real_bytes
    cdef const char *runs[SUMMED_RUNS]
    cdef double block_sums[MAX_BLOCK_K]
    for k in range(SUMMED_RUNS):
        runs[k] = tile.scores + k * QKV_KEY_RUN * stride
    kernels.decode_scores(block_sums, 1, factors, 0, runs, stride, nk, tile.count, 1,
                          QKV_FLOAT32 if real_bytes == 4 else QKV_FLOAT64)
    for k in range(nk):
        sums[k] += get_real(block_sums, k, real_bytes)


cdef void sum_block(const WeightsCall *call, const HeadView *head, Py_ssize_t run,
                    QueryTile *tile, KVBlock *block, double *sums) noexcept nogil:
    """Add what the block's keys receive from the tile's rows."""
    cdef const Plan *plan = &call.launch.prefill
    cdef int real_bytes = plan.kernels.real_bytes
    cdef Py_ssize_t at = (run * plan.q_len + tile.row_begin) * real_bytes
    cdef double factors[MAX_LANES]
    cdef Visibility visible
    if not find_visibility(plan, head, tile, block, &visible):
        return
    compute_scores(plan, head, tile, block, &visible)
    modify_scores(plan, head, tile, block, &visible)
    memcpy(tile.row_max, call.row_max + at, tile.count * real_bytes)
    weigh_scores(plan, head, tile, block, &visible)
    find_factors(plan, tile, call.row_max + at, call.row_weight + at, visible.nk, factors)
    add_products(plan, tile, visible.nk, factors, sums)


cdef bint may_see(const Plan *plan, const HeadView *head, Py_ssize_t number, int64_t key_begin,
                  int64_t key_end) noexcept nogil:
    """Return whether a row of the head's task of that number sees a key of a range by position."""
    cdef Py_ssize_t rows = plan.tiles_per_task * plan.kernels.tile_q
    cdef Py_ssize_t index
    cdef int64_t position
    for index in range(number * rows, min((number + 1) * rows, head.q_len)):
        position = head.offset + (index if plan.rows == NULL else plan.rows[index])
        if position - plan.left < key_end and position + plan.right >= key_begin:
            return True
    return False


cdef void sum_range(const WeightsCall *call, const HeadView *head, Py_ssize_t run,
                    int64_t range_begin, int64_t range_end, double *sums) noexcept nogil:
    """Sum what the keys of a range receive from all rows of a query head, tile by tile."""
    cdef const Plan *plan = &call.launch.prefill
    cdef int64_t key_begin, key_end, begin
    cdef Py_ssize_t number, blocks = 0
    cdef int i, tiles
    cdef KVBlock block
    for number in range(call.tasks_per_run):
        if not may_see(plan, head, number, range_begin, min(range_end, head.kv_len)):
            continue
        tiles = open_tiles(plan, head, number, &key_begin, &key_end)
        key_begin = max(key_begin, range_begin)
        key_end = min(key_end, range_end)
        begin = key_begin // plan.block_k * plan.block_k
        while begin < key_end and goes_on(plan, head, &blocks):
            open_block(&block, plan, begin, key_begin, key_end)
            for i in range(tiles):
                sum_block(call, head, run, tile_of(plan, head, i), &block,
                          sums + begin - range_begin)
            begin += plan.block_k
        if plan.interrupt.stop:
            return


cdef void run_received_task(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    """Write what a range of keys receives (a task_function of parallel.pxd)."""
    cdef const WeightsCall *call = <const WeightsCall *>context
    cdef const Plan *plan = &call.launch.prefill
    cdef Py_ssize_t run = task // call.ranges_per_run, k
    cdef int64_t begin = task % call.ranges_per_run * call.range_keys
    cdef int64_t end = min(begin + call.range_keys, plan.kv_len)
    cdef HeadView head
    cdef double *sums
    cdef char *out
    open_run(call, thread, run, &head)
    sums = <double *>(head.scratch + plan.layout.bytes)
    memset(sums, 0, call.range_keys * sizeof(double))
    if plan.kernels.enter != NULL:
        plan.kernels.enter()
    sum_range(call, &head, run, begin, end, sums)
    if plan.kernels.leave != NULL:
        plan.kernels.leave()
    out = head.out + head.kv_head * plan.out.head + begin * plan.kernels.real_bytes
    for k in range(end - begin):
        set_real(out, <int>k, plan.kernels.real_bytes, sums[k])


# --- Statistics: sums over the keys -------------------------------------------------------------

cdef struct RowSums:
    double row_max                      # the largest score so far, in log2 units
    double total                        # sum of P = 2^(score - row_max)
    double excess                       # sum of P (row_max - score)
    double distance                     # sum of P |position - key|
    double scores[4]                    # of key 0, and of those at, before and behind the position
    int seen                            # bit n: scores[n] counts
    int64_t largest                     # the key of row_max; -1: none


cdef Py_ssize_t lay_out_statistics(WeightsCall *call, Py_ssize_t threads) noexcept:
    """Choose the tasks, of which the number is returned, and the scratch of a thread."""
    cdef Plan *plan = &call.launch.prefill
    choose_prefill_tasks(plan, count_weights_tasks(call), threads)
    lay_out_prefill(plan)
    call.tile_bytes = round_up(plan.kernels.tile_q * sizeof(RowSums))
    call.launch.scratch_bytes = (plan.layout.bytes + plan.tiles_per_task * call.tile_bytes
                                 + 4 * plan.kernels.tile_q * sizeof(double))
    return count_weights_tasks(call)


cdef inline RowSums *sums_of(const WeightsCall *call, const HeadView *head,
                             int number) noexcept nogil:
    return <RowSums *>(head.scratch + call.launch.prefill.layout.bytes
                       + number * call.tile_bytes)


cdef void note_score(const Plan *plan, const QueryTile *tile, const Visibility *visible, int i,
                     int number, int64_t k, RowSums *row) noexcept nogil:
    """Keep the score of key k of the block, if row i sees it."""
    if k < 0 or k >= visible.nk or (visible.partial and not tile.allow[k] >> i & 1):
        return
    row.scores[number] = get_real(tile.scores, <int>(k * tile.lanes + i), plan.kernels.real_bytes)
    row.seen |= 1 << number


cdef void add_sums(RowSums *row, double row_max, double total, double excess, double distance,
                   int64_t largest) noexcept nogil:
    """Add the sums of a block, which are relative to the row_max given."""
    cdef double rescale
    if total != 0 and (row_max > row.row_max or row.largest < 0):
        row.largest = largest
    if row_max != row.row_max:
        rescale = exp2(row.row_max - row_max)
        if rescale == 0:
            row.total = row.excess = row.distance = 0
        else:
            row.excess = (row.excess + row.total * (row_max - row.row_max)) * rescale
            row.total *= rescale
            row.distance *= rescale
        row.row_max = row_max
    row.total += total
    row.excess += excess
    row.distance += distance


cdef void add_block(const WeightsCall *call, const HeadView *head, QueryTile *tile, RowSums *rows,
                    void *sums, KVBlock *block) noexcept nogil:
    """Take a block of keys into the sums of the tile's rows."""
    cdef const Plan *plan = &call.launch.prefill
    cdef int i, real_bytes = plan.kernels.real_bytes, lanes = tile.lanes
    cdef int64_t at
    cdef Visibility visible
    if not find_visibility(plan, head, tile, block, &visible):
        return
    compute_scores(plan, head, tile, block, &visible)
    modify_scores(plan, head, tile, block, &visible)
    if not plan.has_modifiers:          # which scale the scores
        plan.kernels.scale(tile.scores, visible.nk, tile.nvec, plan.score_scale)
    tile.has_keys |= visible.has_keys
    set_relative(plan, tile, block.begin)
    plan.kernels.statistics(tile.scores, visible.nk, tile.nvec,
                            tile.allow if visible.partial else NULL, tile.span,
                            tile.relative_position, tile.row_max, sums)
    for i in range(tile.count):
        add_sums(&rows[i], get_real(tile.row_max, i, real_bytes), get_real(sums, i, real_bytes),
                 get_real(sums, lanes + i, real_bytes), get_real(sums, 2 * lanes + i, real_bytes),
                 block.begin + <int64_t>get_real(sums, 3 * lanes + i, real_bytes))
        at = tile.position[i] - block.begin
        if block.begin == 0:
            note_score(plan, tile, &visible, i, 0, 0, &rows[i])
        if -1 <= at <= visible.nk:
            note_score(plan, tile, &visible, i, 1, at, &rows[i])
            note_score(plan, tile, &visible, i, 2, at - 1, &rows[i])
            note_score(plan, tile, &visible, i, 3, at + 1, &rows[i])


cdef void write_row(const Plan *plan, const HeadView *head, const QueryTile *tile, int i,
                    const RowSums *row) noexcept nogil:
    """Write a row of out: the fields of analysis.Statistics, in their order."""
    cdef double *out = <double *>tile.out_rows[i]
    cdef double weight, sink
    cdef bint is_real = row.total > 0   # not NaN, nor 0 because all scores are -inf
    cdef int number
    memset(out, 0, STATISTICS * sizeof(double))
    out[2] = -1
    if not tile.has_keys >> i & 1:
        return
    weight = 1 / row.total
    if plan.sinks != NULL:
        sink = plan.sinks[head.kv_head * plan.group + (tile.row_begin + i) // head.q_len]
        weight = weight_with_sink(row.row_max, row.total, M_LOG2E * sink)
    out[0] = max(0.0, row.excess / row.total + log2(row.total)) if is_real else NAN
    out[1] = weight if is_real else NAN
    if is_real:
        out[2] = row.largest
    out[3] = row.distance / row.total if is_real else NAN
    for number in range(4):
        if row.seen >> number & 1:
            out[4 + number] = exp2(row.scores[number] - row.row_max) * weight if is_real else NAN


cdef void find_statistics(const WeightsCall *call, const HeadView *head,
                          Py_ssize_t number) noexcept nogil:
    """Write the rows of out of the head's task of that number."""
    cdef const Plan *plan = &call.launch.prefill
    cdef int64_t key_begin, key_end, begin
    cdef int i, row, tiles = open_tiles(plan, head, number, &key_begin, &key_end)
    cdef Py_ssize_t blocks = 0
    cdef void *sums = sums_of(call, head, plan.tiles_per_task)  # behind those of the tiles
    cdef KVBlock block
    cdef QueryTile *tile
    cdef RowSums *rows
    for i in range(tiles):
        tile, rows = tile_of(plan, head, i), sums_of(call, head, i)
        memset(rows, 0, tile.count * sizeof(RowSums))
        for row in range(tile.count):
            rows[row].row_max = get_real(tile.row_max, row, plan.kernels.real_bytes)
            rows[row].largest = -1
    begin = key_begin // plan.block_k * plan.block_k
    while begin < key_end and goes_on(plan, head, &blocks):
        open_block(&block, plan, begin, key_begin, key_end)
        for i in range(tiles):
            add_block(call, head, tile_of(plan, head, i), sums_of(call, head, i), sums, &block)
        begin += plan.block_k
    if plan.interrupt.stop:
        return
    for i in range(tiles):
        tile, rows = tile_of(plan, head, i), sums_of(call, head, i)
        for row in range(tile.count):
            write_row(plan, head, tile, row, &rows[row])


cdef void run_statistics_task(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    """Write the statistics of the rows of a task (a task_function of parallel.pxd)."""
    cdef const WeightsCall *call = <const WeightsCall *>context
    cdef const Plan *plan = &call.launch.prefill
    cdef HeadView head
    open_run(call, thread, task // call.tasks_per_run, &head)
    if plan.kernels.enter != NULL:
        plan.kernels.enter()
    find_statistics(call, &head, call.tasks_per_run - 1 - task % call.tasks_per_run)
    if plan.kernels.leave != NULL:
        plan.kernels.leave()
