"""Prefill: tiles of up to tile_q query rows, one row in each vector lane.

    for each block of keys, for each tile of the task:
        S   = K Qᵀ;  modifiers                  S [keys][rows]
        m'  = max(m, S);  P = 2^(S - m')        down the columns, without horizontal sums
        acc = acc 2^(m - m') + Vᵀ P             acc [v_dim][rows]
    out = (acc / row_sum)ᵀ

The tiles of a task go through the blocks together, so that a block that has to be converted,
packed, scanned, or fetched from beyond the L2 is so once for all of them. The same loops serve
float32, float64 and bfloat16, by SIMD kernels and by BLAS: only the kernel table differs.

Where a KV group has few rows, a task is one split of its keys, as in decode: the task that ends
last merges the partial states of a tile, in the order of the keys.
"""

from libc.stdint cimport int64_t
from libc.string cimport memset

from .kernels cimport qkv_prefetch_rows, qkv_span, qkv_tile_kernels
from .parallel cimport goes_on
from .query_tile cimport place_tile
from .rows cimport (
    gather_queries, load_keys, load_value_rows, load_values, plan_prefetch, write_row,
)
from .scores cimport find_visibility, modify_scores
from .softmax_state cimport (
    ends_last, finish_state, fold_before, merge_tile_partials, save_tile_partial, weigh_scores,
)
from .tuning cimport TILE_KV_SPLIT
from .types cimport (
    UNBOUNDED, HeadView, KVBlock, Launch, Plan, QueryTile, SequencePlan, Visibility, open_block,
    tile_of,
)


cdef void run_prefill_task(const Launch *launch, const HeadView *head,
                           const SequencePlan *sequence, Py_ssize_t task) noexcept nogil:
    """Compute up to tiles_per_task tiles of the head, the last ones first, over one split."""
    cdef const Plan *plan = &launch.prefill
    cdef Py_ssize_t split = task // sequence.tasks_per_split
    cdef Py_ssize_t number = sequence.tasks_per_split - 1 - task % sequence.tasks_per_split
    cdef int64_t key_begin, key_end, begin = (sequence.first_split + split) * TILE_KV_SPLIT
    cdef int i, tiles = open_tiles(plan, head, number, &key_begin, &key_end)
    cdef QueryTile *tile
    if sequence.splits > 1:
        key_begin = max(key_begin, begin)
        key_end = min(key_end, begin + TILE_KV_SPLIT)
    attend_keys(plan, head, tiles, key_begin, key_end)
    if plan.interrupt.stop:
        return
    for i in range(tiles):
        tile = tile_of(plan, head, i)
        if sequence.splits == 1 or merged_all(launch, head, sequence, split, tile):
            close_tile(plan, head, tile)


cdef int open_tiles(const Plan *plan, const HeadView *head, Py_ssize_t number,
                    int64_t *key_begin, int64_t *key_end) noexcept nogil:
    """Open the tiles of the head's task of that number; return how many, and the keys they see."""
    cdef Py_ssize_t rows = plan.group * head.q_len, tile_q = plan.kernels.tile_q
    cdef Py_ssize_t row_begin = number * plan.tiles_per_task * tile_q
    cdef int tiles = 0
    cdef QueryTile *tile
    key_begin[0] = UNBOUNDED
    key_end[0] = 0
    while tiles < plan.tiles_per_task and row_begin < rows:
        tile = open_tile(plan, head, tiles, row_begin, min(tile_q, rows - row_begin))
        key_begin[0] = min(key_begin[0], tile.begin_min)
        key_end[0] = max(key_end[0], tile.end_max)
        row_begin += tile_q
        tiles += 1
    return tiles


cdef QueryTile *open_tile(const Plan *plan, const HeadView *head, int number,
                          Py_ssize_t row_begin, Py_ssize_t rows) noexcept nogil:
    """Return the tile of that number, its queries packed."""
    cdef QueryTile *tile = place_tile(plan, head, number, row_begin, rows)
    gather_queries(plan, head, tile)
    plan.kernels.pack_rows(tile.query, tile.rows, plan.head_dim, tile.nvec, plan.query_scale)
    return tile


cdef void attend_keys(const Plan *plan, const HeadView *head, int tiles, int64_t key_begin,
                      int64_t key_end) noexcept nogil:
    """Take the keys [key_begin, key_end) into the tiles, block by block."""
    cdef KVBlock block
    cdef int64_t begin = key_begin // plan.block_k * plan.block_k
    cdef Py_ssize_t blocks = 0
    cdef int i
    while begin < key_end and goes_on(plan, head, &blocks):
        open_block(&block, plan, begin, key_begin, key_end)
        for i in range(tiles):
            attend_block(plan, head, tile_of(plan, head, i), &block)
        begin += plan.block_k


cdef void attend_block(const Plan *plan, const HeadView *head, QueryTile *tile,
                       KVBlock *block) noexcept nogil:
    """Take a block of keys into the tile's softmax."""
    cdef Visibility visible
    if not find_visibility(plan, head, tile, block, &visible):
        return
    fold_before(plan, tile, block.begin)
    compute_scores(plan, head, tile, block, &visible)
    modify_scores(plan, head, tile, block, &visible)
    weigh_scores(plan, head, tile, block, &visible)
    accumulate_values(plan, head, tile, block, &visible)


cdef void compute_scores(const Plan *plan, const HeadView *head, QueryTile *tile,
                         KVBlock *block, const Visibility *visible) noexcept nogil:
    """tile.scores = K Qᵀ; the first tile of a task also prefetches what it needs next."""
    cdef qkv_prefetch_rows[2] prefetch
    cdef bint prefetches = block.keys == NULL and plan.prefetches
    if block.keys == NULL:
        load_keys(plan, head, block)
    if prefetches:
        plan_prefetch(head, tile, block, prefetch)
    plan.kernels.scores(tile.scores, tile.query, block.keys, block.key_stride, visible.nk,
                        plan.head_dim, tile.nvec, tile.span if visible.partial else NULL,
                        prefetch if prefetches else NULL)


cdef void accumulate_values(const Plan *plan, const HeadView *head, QueryTile *tile,
                            KVBlock *block, const Visibility *visible) noexcept nogil:
    """acc = acc rescale + Vᵀ P

    A weight of 0, of a hidden key or of padding, times infinity would be NaN. So where some weights
    are 0 and not all values are finite, the product has 0 in place of these, and they go to
    the rows that see them afterwards.
    """
    cdef const qkv_tile_kernels *kernels = plan.kernels
    cdef Py_ssize_t nk = visible.nk
    cdef const void *rescale = NULL if tile.first_block else tile.rescale
    cdef const qkv_span *span = tile.span if visible.partial else NULL
    tile.first_block = False
    if block.value_rows == NULL:
        load_value_rows(plan, head, block)
    if block.finite < 0 and (visible.partial or kernels.depth_step > 1 and nk < block.nk):
        block.finite = kernels.all_finite(block.value_rows, block.row_stride, block.nk,
                                          plan.v_dim)
    cdef bint splits = block.finite == 0 and (visible.partial or nk < block.nk)
    if splits or block.values == NULL:
        load_values(plan, head, block, splits)
    kernels.accumulate(tile.acc, tile.scores, block.values, block.value_stride, nk, plan.v_dim,
                       tile.nvec, rescale, span)
    if splits:
        kernels.accumulate_nonfinite(tile.acc, tile.scores, block.value_rows, block.row_stride,
                                     nk, plan.v_dim, tile.nvec)
        block.values = NULL             # the next tile may see all values


cdef bint merged_all(const Launch *launch, const HeadView *head, const SequencePlan *sequence,
                     Py_ssize_t split, QueryTile *tile) noexcept nogil:
    """Save the tile's state; the split of a tile that ends last merges all and returns True."""
    cdef const Plan *plan = &launch.prefill
    cdef Py_ssize_t number = (head.kv_head * sequence.tiles
                              + tile.row_begin // plan.kernels.tile_q)
    cdef char *partials = launch.tile_partials + launch.tile_partial_bytes * (
        launch.offsets[sequence.batch].tile_partial + number * sequence.splits)
    save_tile_partial(plan, tile, partials + split * launch.tile_partial_bytes)
    if not ends_last(partials):
        return False
    merge_tile_partials(plan, tile, partials, launch.tile_partial_bytes, sequence.splits)
    return True


cdef void close_tile(const Plan *plan, const HeadView *head, QueryTile *tile) noexcept nogil:
    """Divide acc by the sums and write the rows."""
    cdef int i, real_bytes = plan.kernels.real_bytes
    cdef char **rows = tile.out_rows
    finish_state(plan, head, tile)
    if tile.first_block:
        memset(tile.acc, 0, plan.v_dim * tile.lanes * real_bytes)
    if not plan.out.contiguous:
        rows = <char **>tile.rows
        for i in range(tile.count):
            rows[i] = head.gathered + i * plan.v_dim * real_bytes
    plan.kernels.store_rows(rows, tile.count, tile.acc, plan.v_dim, tile.nvec, tile.weight)
    if not plan.out.contiguous:
        for i in range(tile.count):
            write_row(plan, tile.out_rows[i], rows[i])
