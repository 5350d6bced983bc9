"""A query tile's rows: each is a (query head of one KV group, query position) pair."""

from libc.stdint cimport int64_t

from .softmax_state cimport reset_state
from .types cimport UNBOUNDED, HeadView, Plan, QueryTile, TensorView, set_real, tile_of


cdef inline int64_t number_of(const char *numbers, const TensorView *view, Py_ssize_t query_head,
                              Py_ssize_t query) noexcept nogil:
    return (<const int64_t *>(numbers + query_head * view.head + query * view.row))[0]


cdef void bound_row(const Plan *plan, const HeadView *head, QueryTile *tile, int i,
                    Py_ssize_t query_head, Py_ssize_t query) noexcept nogil:
    """Note which keys row i sees by position and range, and widen the tile's bounds to them."""
    cdef int64_t position = head.offset + query, begin = 0, end = head.kv_len
    if plan.left < UNBOUNDED and position - plan.left > 0:
        begin = position - plan.left
    if plan.right < UNBOUNDED and position + plan.right + 1 < end:
        end = position + plan.right + 1
    if head.key_begins != NULL:
        begin = max(begin, number_of(head.key_begins, &plan.key_begins, query_head, query))
        end = min(end, number_of(head.key_ends, &plan.key_ends, query_head, query))
    tile.position[i] = position
    tile.key_begin[i] = begin
    tile.key_end[i] = end
    if head.key_begins != NULL and begin >= end:
        tile.begin_max = UNBOUNDED      # hides something of each block, and needs none
        return
    tile.begin_min = min(tile.begin_min, begin)
    tile.begin_max = max(tile.begin_max, begin)
    tile.end_min = min(tile.end_min, end)
    tile.end_max = max(tile.end_max, end)


cdef void place_row(const Plan *plan, const HeadView *head, QueryTile *tile, int i,
                    Py_ssize_t query_head, Py_ssize_t index) noexcept nogil:
    """Note where row i lies and which keys it sees: query `index` of those of a head."""
    cdef Py_ssize_t query = index if plan.rows == NULL else plan.rows[index]
    tile.query_rows[i] = head.query + query_head * plan.query.head + query * plan.query.row
    tile.out_rows[i] = head.out + query_head * plan.out.head + index * plan.out.row
    if head.lse != NULL:
        tile.lse_rows[i] = head.lse + query_head * plan.lse.head + index * plan.lse.row
    if head.mask != NULL:
        tile.mask_rows[i] = head.mask + query_head * plan.mask.head + query * plan.mask.row
    if head.bias != NULL:
        tile.bias_rows[i] = head.bias + query_head * plan.bias.head + query * plan.bias.row
    if head.slopes != NULL:
        set_real(tile.slope, i, plan.kernels.real_bytes,
                 (<double *>(head.slopes + query_head * plan.slopes.head))[0])
    bound_row(plan, head, tile, i, query_head, query)


cdef QueryTile *place_tile(const Plan *plan, const HeadView *head, int number,
                           Py_ssize_t row_begin, Py_ssize_t rows) noexcept nogil:
    """Return the task's tile of that number, with `rows` rows from row_begin on and no keys.

    Lanes past the last row compute that row again, so that kernels need not tell them apart.
    """
    cdef QueryTile *tile = tile_of(plan, head, number)
    cdef Py_ssize_t query_head = head.kv_head * plan.group + row_begin // head.q_len
    cdef Py_ssize_t index = row_begin % head.q_len
    cdef int i
    tile.query = <char *>tile + plan.layout.query
    tile.acc = <char *>tile + plan.layout.acc
    tile.total = <char *>tile + plan.layout.total
    tile.error = <char *>tile + plan.layout.error
    tile.scores = head.scratch + plan.layout.scores
    if plan.heads_per_task > 1:
        tile.scores = <char *>tile + plan.layout.tile_scores
    tile.row_begin = row_begin
    tile.count = <int>rows
    tile.nvec = (tile.count + plan.kernels.lanes - 1) // plan.kernels.lanes
    if plan.fixed_nvec:
        tile.nvec = plan.fixed_nvec
    tile.lanes = tile.nvec * plan.kernels.lanes
    tile.begin_min = tile.end_min = UNBOUNDED
    tile.begin_max = tile.end_max = 0
    reset_state(plan, tile)
    for i in range(tile.lanes):
        place_row(plan, head, tile, i, query_head, index)
        if i + 1 < tile.count:
            index += 1
            if index == head.q_len:
                index = 0
                query_head += 1
    return tile
