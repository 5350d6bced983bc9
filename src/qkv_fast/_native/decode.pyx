"""Decode: few query rows, a head's vector in vector lanes, keys split among tasks.

Reading keys and values is what takes the time, so the kernels read each once for all rows of its KV
group, in the type that it is stored in, and in the order of memory:

- A task is KV_SPLIT keys of up to MAX_HEADS heads. Each head has a tile of its own.
- Where the keys of a head lie between those of others, the heads are interleaved: a task
  reads plan.adjacent_keys keys of each head, then the next ones, until after interleave_span
  keys all heads are equally far.
- The task that ends last merges the partial states of a head's splits, in the order of the keys.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset

from .kernels cimport QKV_KEY_RUN
from .key_runs cimport KeyRuns, find_interleaved_runs, gather_key_runs, load_key_runs
from .parallel cimport goes_on
from .query_tile cimport place_tile
from .rows cimport load_scales, read_reals, write_row
from .scores cimport find_visibility, modify_scores
from .softmax_state cimport (
    ends_last, finish_state, merge_partials, save_partial, weigh_scores,
)
from .tuning cimport KV_SPLIT, MAX_HEADS
from .types cimport (
    HeadRows, HeadView, KVBlock, Launch, Plan, QueryTile, SequencePlan, Visibility,
    get_real, open_block, round_up, tile_of,
)


cdef void run_decode_task(const Launch *launch, const HeadView *head,
                          const SequencePlan *sequence, Py_ssize_t split) noexcept nogil:
    """Compute the rows of some KV heads, from `head` on, over one split of the keys."""
    cdef const Plan *plan = &launch.decode
    cdef HeadView heads[MAX_HEADS]
    cdef int count = <int>min(plan.heads_per_task, plan.num_kv_heads - head.kv_head), i
    cdef int64_t begin = (sequence.first_split + split) * KV_SPLIT
    cdef QueryTile *tile = NULL
    for i in range(count):
        heads[i] = head[0]
        heads[i].value.copies = head.key.copies  # a block's keys are done with before its values
        move_head(plan, &heads[i], i)
        tile = open_tile(plan, &heads[i])
    attend_keys(plan, heads, count, max(begin, tile.begin_min),
                min(begin + KV_SPLIT, tile.end_max))
    if plan.interrupt.stop:
        return
    for i in range(count):
        tile = tile_of(plan, head, i)
        if (sequence.splits == 1
                or merged_all(launch, &heads[i], sequence, split, tile)):
            close_tile(plan, &heads[i], tile)


cdef void move_head(const Plan *plan, HeadView *head, int number) noexcept nogil:
    """Move to the head of that number in the task."""
    head.number = number
    head.kv_head += number
    head.key.data += number * plan.key.head
    head.value.data += number * plan.value.head
    head.key_scales.data += number * plan.key_scales.head
    head.value_scales.data += number * plan.value_scales.head


cdef QueryTile *open_tile(const Plan *plan, const HeadView *head) noexcept nogil:
    """Return the head's tile with all rows of its group, their queries scaled."""
    cdef QueryTile *tile = place_tile(plan, head, head.number, 0, plan.group * head.q_len)
    cdef Py_ssize_t row_bytes = plan.q_stride * plan.kernels.real_bytes
    cdef int i
    memset(tile.query, 0, tile.count * row_bytes)
    for i in range(tile.count):
        read_reals(plan, <char *>tile.query + i * row_bytes, &plan.query, tile.query_rows[i],
                   plan.head_dim)
    plan.kernels.scale(tile.query, tile.count * plan.q_stride // plan.kernels.lanes, 1,
                       plan.query_scale)
    memset(tile.acc, 0, tile.count * plan.acc_stride * plan.kernels.real_bytes)
    return tile


cdef void attend_keys(const Plan *plan, const HeadView *heads, int count, int64_t key_begin,
                      int64_t key_end) noexcept nogil:
    """Take the keys [key_begin, key_end) into the tiles of the heads, block by block."""
    cdef const QueryTile *tile = tile_of(plan, heads, 0)
    cdef bint interleaves = count > 1 and tile.count <= plan.kernels.lanes
    cdef KVBlock block
    cdef int64_t begin = key_begin // plan.block_k * plan.block_k
    cdef Py_ssize_t blocks = 0
    cdef int i
    while begin < key_end and goes_on(plan, heads, &blocks):
        if (interleaves and begin % plan.interleave_span == 0 and begin >= tile.begin_max
                and begin + plan.interleave_span <= min(tile.end_min, key_end)):
            attend_interleaved(plan, heads, count, begin)
            begin += plan.interleave_span
            continue
        open_block(&block, plan, begin, key_begin, key_end)
        for i in range(count):
            attend_block(plan, &heads[i], tile_of(plan, heads, i), &block)
        begin += plan.block_k


cdef void attend_interleaved(const Plan *plan, const HeadView *heads, int count,
                             int64_t begin) noexcept nogil:
    """Take interleave_span keys, which all rows see, into the tiles of the heads."""
    cdef int together = count if plan.adjacent_keys < plan.block_k else 1, i = 0
    cdef int64_t key, end = begin + plan.interleave_span
    cdef KVBlock block
    while i < count:
        key = begin
        while key < end:
            open_block(&block, plan, key, begin, end)
            attend_whole(plan, &heads[i], together, count, &block, plan.block_k)
            key += plan.block_k
        i += together
    for i in range(count):
        tile_of(plan, heads, i).has_keys = ~<uint64_t>0


cdef void attend_block(const Plan *plan, const HeadView *head, QueryTile *tile,
                       KVBlock *block) noexcept nogil:
    """Take a block of keys into the tile's softmax."""
    cdef Visibility visible
    cdef KeyRuns runs
    cdef Py_ssize_t nk
    if not find_visibility(plan, head, tile, block, &visible):
        return
    if (not visible.partial and not plan.has_modifiers and not plan.sights_differ
            and tile.count <= plan.kernels.lanes):
        attend_whole(plan, head, 1, 1, block, visible.nk)
        tile.has_keys |= visible.has_keys
        return
    nk = visible.nk - block.before_window
    # The kernels write the lanes of rows alone, and the softmax reads all.
    memset(tile.scores, 0, visible.nk * tile.lanes * plan.kernels.real_bytes)
    load_key_runs(plan, &head.key, block, visible.nk, tile.end_max, &runs)
    compute_scores(plan, tile, &runs, 0, block.before_window, nk, tile.lanes)
    modify_scores(plan, head, tile, block, &visible)
    weigh_scores(plan, head, tile, block, &visible)
    if plan.sights_differ:
        accumulate_aligned(plan, head, tile, block, &visible)
        return
    load_key_runs(plan, &head.value, block, visible.nk, tile.end_max, &runs)
    accumulate_values(plan, tile, &runs, 0, block.before_window, nk, tile.lanes, True,
                      visible.partial)


cdef void accumulate_aligned(const Plan *plan, const HeadView *head, QueryTile *tile,
                             const KVBlock *block, const Visibility *visible) noexcept nogil:
    """Accumulate a block's values; what a row's neighbours see changes no bit of its sums.

    The kernel begins a sum with each run, from the first value on. Which value that is, and
    whether a page splits a run, depends on what all rows see. So what comes before a multiple of
    QKV_KEY_RUN is accumulated first, and where pages may split runs, values are always gathered.
    """
    cdef const HeadRows *rows = &head.value
    cdef bint in_place = rows.view.contiguous and plan.page_size % QKV_KEY_RUN == 0
    cdef Py_ssize_t begin = block.before_window
    cdef Py_ssize_t end = min(visible.nk, round_up(begin, QKV_KEY_RUN))
    cdef KVBlock rest = block[0]
    cdef KeyRuns runs
    if begin == end:
        end = visible.nk
    while begin < visible.nk:
        rest.before_window = begin
        if in_place:
            load_key_runs(plan, rows, &rest, end, tile.end_max, &runs)
        else:
            gather_key_runs(plan, rows, block.begin + begin, end - begin, &runs)
        accumulate_values(plan, tile, &runs, 0, begin, end - begin, tile.lanes,
                          begin == block.before_window, visible.partial)
        begin, end = end, visible.nk


cdef void attend_whole(const Plan *plan, const HeadView *heads, int count, int interleaved,
                       const KVBlock *block, Py_ssize_t nk) noexcept nogil:
    """Take a block of keys, which all rows see, into the tiles of `count` heads.

    interleaved > 1: so many heads of the task are, and what `count` of them read from heads[0] on
    lies in the order of memory. 1: one head, whose keys may begin and end anywhere in the block.
    """
    cdef int first = heads.number, h, run = 0
    cdef Py_ssize_t begin = block.before_window, k = begin, step = nk - begin, ld = 1
    cdef const HeadView *head
    cdef QueryTile *tile = tile_of(plan, heads, first)
    cdef KeyRuns runs
    if count > 1:
        step = plan.adjacent_keys
    while ld < tile.count:
        ld *= 2
    if ld != tile.count:                # lanes without a row, which the softmax reads too
        for h in range(count):
            memset(tile_of(plan, heads, first + h).scores, 0, nk * ld * plan.kernels.real_bytes)
    list_runs(plan, heads, &heads.key, count, interleaved, block, nk, &runs)
    while k < nk:
        for h in range(count):
            compute_scores(plan, tile_of(plan, heads, first + h), &runs, run, k, step, ld)
            run += <int>(step // QKV_KEY_RUN)
        k += step
    list_runs(plan, heads, &heads.value, count, interleaved, block, nk, &runs)
    k = begin
    run = 0
    while k < nk:
        for h in range(count):
            head = &heads[h]
            tile = tile_of(plan, heads, first + h)
            if k == begin:
                plan.kernels.decode_softmax(
                    tile.scores, nk, <int>ld, load_scales(&head.key_scales, block, nk),
                    load_scales(&head.value_scales, block, nk), tile.row_max, tile.row_sum,
                    tile.rescale)
            accumulate_values(plan, tile, &runs, run, k, step, ld, k == begin, False)
            run += <int>(step // QKV_KEY_RUN)
        k += step


cdef inline void list_runs(const Plan *plan, const HeadView *heads, const HeadRows *rows,
                           int count, int interleaved, const KVBlock *block, Py_ssize_t nk,
                           KeyRuns *runs) noexcept nogil:
    """List the runs of a block's keys or values for attend_whole."""
    cdef int64_t key_end = tile_of(plan, heads, heads.number).end_max
    if interleaved > 1:
        find_interleaved_runs(plan, heads, rows, block.begin, <int>(count * nk // QKV_KEY_RUN),
                              interleaved, key_end, runs)
    else:
        load_key_runs(plan, rows, block, nk, key_end, runs)


cdef inline void compute_scores(const Plan *plan, QueryTile *tile, const KeyRuns *runs, int run,
                                Py_ssize_t begin, Py_ssize_t nk, Py_ssize_t ld) noexcept nogil:
    """Compute the scores of nk keys, from the block's key `begin` on, in runs from `run` on."""
    plan.kernels.decode_scores(tile.scores + begin * ld * plan.kernels.real_bytes, ld, tile.query,
                               plan.q_stride, <const char **>runs.rows + run, runs.stride, nk,
                               plan.head_dim, tile.count, runs.type)


cdef inline void accumulate_values(const Plan *plan, QueryTile *tile, const KeyRuns *runs, int run,
                                   Py_ssize_t begin, Py_ssize_t nk, Py_ssize_t ld, bint rescales,
                                   bint partial) noexcept nogil:
    """acc = acc rescale + P V, of the same keys; rescale is 1 after a block's first keys."""
    plan.kernels.decode_accumulate(
        tile.acc, plan.acc_stride, tile.scores + begin * ld * plan.kernels.real_bytes, ld,
        <const char **>runs.rows + run, runs.stride, nk, plan.v_dim, tile.count,
        tile.rescale if rescales else NULL, partial, runs.type)


cdef bint merged_all(const Launch *launch, const HeadView *head, const SequencePlan *sequence,
                     Py_ssize_t split, QueryTile *tile) noexcept nogil:
    """Save the tile's state; the split of a head that ends last merges all and returns True."""
    cdef Py_ssize_t splits = sequence.splits
    cdef char *partials = launch.partials + (
        launch.offsets[sequence.batch].partial + head.kv_head * splits) * launch.partial_bytes
    save_partial(&launch.decode, tile, partials + split * launch.partial_bytes)
    if not ends_last(partials):
        return False
    merge_partials(&launch.decode, head, tile, partials, launch.partial_bytes, splits)
    return True


cdef void close_tile(const Plan *plan, const HeadView *head, QueryTile *tile) noexcept nogil:
    """Divide acc by the sums and write the rows."""
    cdef int i, real_bytes = plan.kernels.real_bytes
    cdef char *row = <char *>tile.acc
    finish_state(plan, head, tile)
    for i in range(tile.count):
        plan.kernels.scale(row, plan.acc_stride // plan.kernels.lanes, 1,
                           get_real(tile.weight, i, real_bytes))
        write_row(plan, tile.out_rows[i], row)
        row += plan.acc_stride * real_bytes
