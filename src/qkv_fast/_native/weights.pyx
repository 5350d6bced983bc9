"""The weights themselves, or the scores before the softmax: out [query rows][keys].

    for each block of keys, for each tile of the task:
        S   = K Qᵀ;  modifiers              S [keys][rows], as in prefill
        P   = 2^(S - m)                     m: a row's largest score up to this block
        out = Pᵀ
    out = out 2^(m - row_max) / row_sum     block by block, when both are known

So each product and each power is computed once. Blocks that no row of a tile sees are filled. At
the stages before the softmax, out = Sᵀ, with -inf for a key that is excluded. Products are those of
reals also where the op has AMX or AVX512_BF16 multiply bfloat16, for which it rounds its weights.
"""

cimport numpy as cnp
from libc.math cimport INFINITY, M_LN2, M_LOG2E, exp2
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy

from .kernels cimport qkv_tile_kernels
from .parallel cimport goes_on
from .plan cimport choose_prefill_tasks, lay_out_prefill, plan_prefill, view_numbers
from .prefill cimport compute_scores, open_tiles
from .schedule cimport open_head, open_sequence
from .scores cimport find_visibility, modify_scores
from .softmax_state cimport finish_state, fold_before, lowest, weigh_scores
from .tuning cimport WEIGHT_WORK
from .types cimport (
    HeadView, KVBlock, Launch, Plan, QueryTile, SequencePlan, Visibility, get_real, lane_bits,
    open_block, real, round_up, set_real, tile_of,
)

cnp.import_array()

cdef extern from *:
    int first_bit "__builtin_ctzll"(uint64_t) nogil

cdef extern from "<math.h>":
    int isfinite(double) nogil          # macros, for floats too
    int signbit(double) nogil


cdef struct TileProgress:               # BlockRecords follow it in memory
    int64_t end                         # the rows of out are written up to this key
    Py_ssize_t blocks                   # records


cdef struct BlockRecord:                # row_max [rows] follows it in memory
    int64_t begin
    Py_ssize_t nk


# --- Planning -----------------------------------------------------------------------------------

cdef int view_selection(WeightsCall *call, problem) except -1:
    """Note which query heads and rows of a viewed Problem are computed, and up to which stage."""
    cdef Plan *plan = &call.launch.prefill
    cdef cnp.ndarray numbers
    call.is_softmax = problem.stage not in ("scaled", "softcapped", "masked")
    call.knows_lse = problem.known_lse is not None
    view_numbers(&plan.lse, problem.known_lse, plan.batch_ndim)
    call.kv_group = plan.group
    call.runs = plan.num_kv_heads
    if problem.heads is not None:
        numbers = problem.heads
        call.heads = <const int64_t *>cnp.PyArray_DATA(numbers)
        call.runs = cnp.PyArray_SIZE(numbers)
        plan.group = 1
    if problem.rows is not None:
        numbers = problem.rows
        plan.rows = <const int64_t *>cnp.PyArray_DATA(numbers)
        plan.q_len = cnp.PyArray_SIZE(numbers)
    return 0


cdef void plan_weights(WeightsCall *call, const qkv_tile_kernels *kernels) noexcept:
    """Complete the plan from its views, all but tasks and scratch.

    Products are multiplied by the scale, not queries, which would be rounded once more: that shows
    in weights of 16-bit types, which are not rounded to these.
    """
    cdef Launch *launch = &call.launch
    cdef Plan *plan = &launch.prefill
    cdef int axis
    plan_prefill(plan, kernels, &launch.interrupt)
    plan.query_scale = -1 if plan.scale < 0 else 1
    plan.score_scale = abs(plan.scale)
    if call.is_softmax or plan.has_modifiers:
        plan.score_scale *= M_LOG2E     # these kernels want such units
    launch.batches = 1
    for axis in range(plan.batch_ndim):
        launch.batches *= plan.batch_shape[axis]
    launch.work = (<double>launch.batches * call.runs * plan.group * plan.q_len * plan.kv_len
                   * (plan.head_dim + WEIGHT_WORK))


cdef Py_ssize_t count_weights_tasks(WeightsCall *call) noexcept:
    """Set the tasks of a run and return those of the call."""
    cdef const Plan *plan = &call.launch.prefill
    cdef Py_ssize_t rows = plan.group * plan.q_len
    cdef Py_ssize_t rows_per_task = plan.tiles_per_task * plan.kernels.tile_q
    call.tasks_per_run = (rows + rows_per_task - 1) // rows_per_task
    return call.launch.batches * call.runs * call.tasks_per_run


cdef Py_ssize_t lay_out_weights(WeightsCall *call, Py_ssize_t threads) noexcept:
    """Choose the tasks, of which the number is returned, and the scratch of a thread."""
    cdef Plan *plan = &call.launch.prefill
    cdef Py_ssize_t blocks = (plan.kv_len + plan.block_k - 1) // plan.block_k
    choose_prefill_tasks(plan, count_weights_tasks(call), threads)
    lay_out_prefill(plan)
    if not call.is_softmax:
        blocks = 0
    call.record_bytes = sizeof(BlockRecord) + plan.kernels.tile_q * plan.kernels.real_bytes
    call.tile_bytes = round_up(sizeof(TileProgress) + blocks * call.record_bytes)
    call.launch.scratch_bytes = plan.layout.bytes + plan.tiles_per_task * call.tile_bytes
    return count_weights_tasks(call)


# --- Rows of out --------------------------------------------------------------------------------

cdef void fill(real *row, int64_t begin, int64_t end, real value) noexcept nogil:
    cdef int64_t k
    for k in range(begin, end):
        row[k] = value


cdef void fill_up_to(const Plan *plan, QueryTile *tile, TileProgress *progress, int64_t end,
                     double value) noexcept nogil:
    """Fill the tile's rows of out from where they are written to, up to key `end`."""
    cdef int i
    for i in range(tile.count):
        if plan.kernels.real_bytes == 4:
            fill(<float *>tile.out_rows[i], progress.end, end, <float>value)
        else:
            fill(<double *>tile.out_rows[i], progress.end, end, value)
    progress.end = end


cdef void to_natural_units(real *row, Py_ssize_t nk, double lowest_real) noexcept nogil:
    """row *= ln 2; what the kernels limited to the lowest real, and -inf, stay as they are."""
    cdef real least = <real>lowest_real, ln2 = <real>M_LN2
    cdef Py_ssize_t k
    for k in range(nk):
        row[k] = row[k] if row[k] <= least else row[k] * ln2


cdef void rescale_weights(real *row, Py_ssize_t nk, double factor) noexcept nogil:
    """row *= factor; an excluded key's -0.0 becomes 0, even if factor is infinite or NaN."""
    cdef real f = <real>factor
    cdef Py_ssize_t k
    if isfinite(f):
        for k in range(nk):
            row[k] = row[k] * f + 0     # -0.0 + 0 is 0
        return
    for k in range(nk):
        row[k] = 0 if row[k] == 0 and signbit(row[k]) else row[k] * f


# --- A tile -------------------------------------------------------------------------------------

cdef inline TileProgress *progress_of(const WeightsCall *call, const HeadView *head,
                                      int number) noexcept nogil:
    return <TileProgress *>(head.scratch + call.launch.prefill.layout.bytes
                            + number * call.tile_bytes)


cdef inline BlockRecord *record_of(const WeightsCall *call, TileProgress *progress,
                                   Py_ssize_t number) noexcept nogil:
    return <BlockRecord *>(<char *>(progress + 1) + number * call.record_bytes)


cdef void take_known_lse(const Plan *plan, QueryTile *tile) noexcept nogil:
    """Make the tile's row_max the known log-sum-exps, relative to which a row sums to 1."""
    cdef int i, real_bytes = plan.kernels.real_bytes
    cdef double lse, least = lowest(real_bytes)
    tile.folded = False
    for i in range(tile.lanes):
        lse = get_real(tile.lse_rows[i], 0, real_bytes)
        lse = least if lse <= least else lse * M_LOG2E
        set_real(tile.row_max, i, real_bytes, lse)
        set_real(tile.row_sum, i, real_bytes, 1)


cdef double MAX_EXCESS = 64             # in _python_weights.py too


cdef double raised(double top, double row_max) noexcept nogil:
    """Return 2^(top - row_max); at most 2^64, but for an infinite score.

    A weight is larger than 1 where the score is above a given log-sum-exp, as rounding alone may
    leave it: units in the last place of scores of 10^9 are 64. Sums of such weights stay finite.
    """
    cdef double excess = top - row_max
    return exp2(MAX_EXCESS if excess > MAX_EXCESS and top < INFINITY else excess)


cdef void begin_rows(const WeightsCall *call, const HeadView *head, int number) noexcept nogil:
    """Begin the rows of out of the task's tile of that number."""
    cdef const Plan *plan = &call.launch.prefill
    cdef QueryTile *tile = tile_of(plan, head, number)
    cdef TileProgress *progress = progress_of(call, head, number)
    cdef int i
    progress.end = progress.blocks = 0
    if call.knows_lse:
        take_known_lse(plan, tile)
    for i in range(tile.lanes):         # store_rows multiplies by it
        set_real(tile.weight, i, plan.kernels.real_bytes, 1)


cdef void hide(const QueryTile *tile, Py_ssize_t nk, int real_bytes) noexcept nogil:
    """Make the scores -inf that tile.allow hides."""
    cdef Py_ssize_t k
    cdef uint64_t hidden
    for k in range(nk):
        hidden = ~tile.allow[k] & lane_bits(tile.lanes)
        while hidden:
            set_real(tile.scores, <int>(k * tile.lanes + first_bit(hidden)), real_bytes, -INFINITY)
            hidden &= hidden - 1


cdef void finish_scores(const Plan *plan, QueryTile *tile,
                        const Visibility *visible) noexcept nogil:
    """Scale scores without modifiers, as the softmax would, and hide those of excluded keys."""
    if not plan.has_modifiers:
        plan.kernels.scale(tile.scores, visible.nk, tile.nvec, plan.score_scale)
    if visible.partial:
        hide(tile, visible.nk, plan.kernels.real_bytes)


cdef void store_block(const WeightsCall *call, QueryTile *tile, TileProgress *progress,
                      int64_t begin, Py_ssize_t nk) noexcept nogil:
    """Write a block of weights or scores to the rows of out."""
    cdef const Plan *plan = &call.launch.prefill
    cdef int i, real_bytes = plan.kernels.real_bytes
    cdef char **rows = <char **>tile.rows
    fill_up_to(plan, tile, progress, begin, 0 if call.is_softmax else -INFINITY)
    for i in range(tile.count):
        rows[i] = tile.out_rows[i] + begin * real_bytes
    plan.kernels.store_rows(rows, tile.count, tile.scores, nk, tile.nvec, tile.weight)
    progress.end = begin + nk
    if call.is_softmax or not plan.has_modifiers:
        return
    for i in range(tile.count):
        if real_bytes == 4:
            to_natural_units(<float *>rows[i], nk, lowest(real_bytes))
        else:
            to_natural_units(<double *>rows[i], nk, lowest(real_bytes))


cdef void write_block(const WeightsCall *call, const HeadView *head, int number,
                      KVBlock *block) noexcept nogil:
    """Take a block of keys into the tile's softmax, if it comes to that, and write its part."""
    cdef const Plan *plan = &call.launch.prefill
    cdef QueryTile *tile = tile_of(plan, head, number)
    cdef TileProgress *progress = progress_of(call, head, number)
    cdef BlockRecord *record
    cdef Visibility visible
    if not find_visibility(plan, head, tile, block, &visible):
        return
    if call.is_softmax and not call.knows_lse:
        fold_before(plan, tile, block.begin)
    compute_scores(plan, head, tile, block, &visible)
    modify_scores(plan, head, tile, block, &visible)
    if call.is_softmax:
        weigh_scores(plan, head, tile, block, &visible)
        record = record_of(call, progress, progress.blocks)
        record.begin, record.nk = block.begin, visible.nk
        memcpy(record + 1, tile.row_max, tile.lanes * plan.kernels.real_bytes)
        progress.blocks += 1
    else:
        finish_scores(plan, tile, &visible)
    store_block(call, tile, progress, block.begin, visible.nk)


cdef void normalize(const WeightsCall *call, const HeadView *head, QueryTile *tile,
                    TileProgress *progress) noexcept nogil:
    """Rescale the weights of each block to the final row_max, and divide them by the sums."""
    cdef const Plan *plan = &call.launch.prefill
    cdef HeadView view = head[0]
    cdef BlockRecord *record
    cdef Py_ssize_t number
    cdef double top, row_max, factor
    cdef int i, real_bytes = plan.kernels.real_bytes
    view.lse = NULL                     # which would be written
    if call.knows_lse:
        take_known_lse(plan, tile)
    finish_state(plan, &view, tile)
    for i in range(tile.count):
        row_max = get_real(tile.row_max, i, real_bytes)
        for number in range(progress.blocks):
            record = record_of(call, progress, number)
            top = get_real(record + 1, i, real_bytes)
            factor = get_real(tile.weight, i, real_bytes)
            if top != row_max:
                factor *= raised(top, row_max)
            if real_bytes == 4:
                rescale_weights(<float *>tile.out_rows[i] + record.begin, record.nk, factor)
            else:
                rescale_weights(<double *>tile.out_rows[i] + record.begin, record.nk, factor)


# --- A task -------------------------------------------------------------------------------------

cdef void open_run(const WeightsCall *call, int thread, Py_ssize_t run,
                   HeadView *head) noexcept nogil:
    """Note where the rows of a KV head lie or, in a selection, of a query head on its own.

    `run` counts the runs of all batch entries.
    """
    cdef const Plan *plan = &call.launch.prefill
    cdef SequencePlan sequence
    cdef Py_ssize_t query_head
    open_sequence(&call.launch, run // call.runs, &sequence)
    head.on_caller = thread == 0
    head.scratch = call.launch.scratch + thread * call.launch.scratch_bytes
    head.gathered = head.scratch + plan.layout.gathered
    run %= call.runs
    if call.heads == NULL:
        open_head(plan, &sequence, run, head)
        return
    query_head = call.heads[run]
    open_head(plan, &sequence, query_head // call.kv_group, head)
    head.kv_head = query_head           # plan.group is 1
    head.out += (run - query_head) * plan.out.head
    if head.lse != NULL:
        head.lse += (run - query_head) * plan.lse.head


cdef void write_tiles(const WeightsCall *call, const HeadView *head,
                      Py_ssize_t number) noexcept nogil:
    """Write the rows of out of the head's task of that number."""
    cdef const Plan *plan = &call.launch.prefill
    cdef int64_t key_begin, key_end, begin
    cdef int i, tiles = open_tiles(plan, head, number, &key_begin, &key_end)
    cdef Py_ssize_t blocks = 0
    cdef KVBlock block
    cdef TileProgress *progress
    for i in range(tiles):
        begin_rows(call, head, i)
    begin = key_begin // plan.block_k * plan.block_k
    while begin < key_end and goes_on(plan, head, &blocks):
        open_block(&block, plan, begin, key_begin, key_end)
        for i in range(tiles):
            write_block(call, head, i, &block)
        begin += plan.block_k
    if plan.interrupt.stop:
        return
    for i in range(tiles):
        progress = progress_of(call, head, i)
        fill_up_to(plan, tile_of(plan, head, i), progress, plan.kv_len,
                   0 if call.is_softmax else -INFINITY)
        if call.is_softmax:
            normalize(call, head, tile_of(plan, head, i), progress)


cdef void run_weights_task(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    """Run a task of a call (a task_function of parallel.pxd)."""
    cdef const WeightsCall *call = <const WeightsCall *>context
    cdef const Plan *plan = &call.launch.prefill
    cdef HeadView head
    open_run(call, thread, task // call.tasks_per_run, &head)
    if plan.kernels.enter != NULL:
        plan.kernels.enter()
    write_tiles(call, &head, call.tasks_per_run - 1 - task % call.tasks_per_run)
    if plan.kernels.leave != NULL:
        plan.kernels.leave()
