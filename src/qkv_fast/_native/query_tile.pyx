"""A query tile's rows: each is a (query head of one KV group, query position) pair."""

from libc.stdint cimport int64_t

from .softmax_state cimport reset_state
from .types cimport (
    UNBOUNDED, HeadView, Plan, QueryTile, TensorView, get_real, set_real, tile_of,
)


cdef inline int64_t query_at(const int64_t *order, Py_ssize_t index) noexcept nogil:
    """Return the query of that index among those that are computed; order NULL: all of them."""
    return index if order == NULL else order[index]


cdef inline void point_rows(const char **rows, int count, const char *head, Py_ssize_t row,
                            const int64_t *order, Py_ssize_t index) noexcept nogil:
    """Point at `count` rows of a head, `row` bytes apart, from that of query `index` on."""
    cdef int i
    if order != NULL:
        for i in range(count):
            rows[i] = head + order[index + i] * row
        return
    head += index * row
    for i in range(count):
        rows[i] = head
        head += row


cdef void bound_rows(const Plan *plan, const HeadView *head, QueryTile *tile, int first, int count,
                     Py_ssize_t index) noexcept nogil:
    """Note the positions of `count` rows of a head, and which keys they see by these."""
    cdef bint has_left = plan.left < UNBOUNDED, has_right = plan.right < UNBOUNDED
    cdef int64_t position, begin, end
    cdef int i
    for i in range(count):
        position = head.offset + query_at(plan.rows, index + i)
        begin = 0
        end = head.kv_len
        if has_left:
            begin = max(begin, position - plan.left)
        if has_right:
            end = min(end, position + plan.right + 1)
        tile.position[first + i] = position
        tile.key_begin[first + i] = begin
        tile.key_end[first + i] = end


cdef void narrow_rows(const Plan *plan, const HeadView *head, QueryTile *tile, int first, int count,
                      Py_ssize_t query_head, Py_ssize_t index) noexcept nogil:
    """Narrow what `count` rows of a head see to their ranges."""
    cdef const TensorView *begins = &plan.key_begins
    cdef const TensorView *ends = &plan.key_ends
    cdef const char *begin = head.key_begins + query_head * begins.head
    cdef const char *end = head.key_ends + query_head * ends.head
    cdef Py_ssize_t query
    cdef int i
    for i in range(count):
        query = query_at(plan.rows, index + i)
        tile.key_begin[first + i] = max(tile.key_begin[first + i],
                                        (<const int64_t *>(begin + query * begins.row))[0])
        tile.key_end[first + i] = min(tile.key_end[first + i],
                                      (<const int64_t *>(end + query * ends.row))[0])


cdef void place_rows(const Plan *plan, const HeadView *head, QueryTile *tile, int first, int count,
                     Py_ssize_t query_head, Py_ssize_t index) noexcept nogil:
    """Note where `count` rows of a query head lie and which keys they see, from row `first` on.

    index: of the first one's query, among those that are computed.
    """
    cdef double slope
    cdef int i
    point_rows(&tile.query_rows[first], count, head.query + query_head * plan.query.head,
               plan.query.row, plan.rows, index)
    point_rows(<const char **>&tile.out_rows[first], count, head.out + query_head * plan.out.head,
               plan.out.row, NULL, index)
    if head.lse != NULL:
        point_rows(<const char **>&tile.lse_rows[first], count,
                   head.lse + query_head * plan.lse.head, plan.lse.row, NULL, index)
    if head.mask != NULL:
        point_rows(&tile.mask_rows[first], count, head.mask + query_head * plan.mask.head,
                   plan.mask.row, plan.rows, index)
    if head.bias != NULL:
        point_rows(&tile.bias_rows[first], count, head.bias + query_head * plan.bias.head,
                   plan.bias.row, plan.rows, index)
    if head.slopes != NULL:
        slope = (<double *>(head.slopes + query_head * plan.slopes.head))[0]
        for i in range(first, first + count):
            set_real(tile.slope, i, plan.kernels.real_bytes, slope)
    bound_rows(plan, head, tile, first, count, index)
    if head.key_begins != NULL:
        narrow_rows(plan, head, tile, first, count, query_head, index)


cdef void repeat_last_row(const HeadView *head, QueryTile *tile, int real_bytes) noexcept nogil:
    """Let lanes past the last row compute that row again, so that kernels need not know them."""
    cdef int i, last = tile.count - 1
    for i in range(tile.count, tile.lanes):
        tile.query_rows[i] = tile.query_rows[last]
        tile.out_rows[i] = tile.out_rows[last]
        tile.position[i] = tile.position[last]
        tile.key_begin[i] = tile.key_begin[last]
        tile.key_end[i] = tile.key_end[last]
        if head.lse != NULL:
            tile.lse_rows[i] = tile.lse_rows[last]
        if head.mask != NULL:
            tile.mask_rows[i] = tile.mask_rows[last]
        if head.bias != NULL:
            tile.bias_rows[i] = tile.bias_rows[last]
        if head.slopes != NULL:
            set_real(tile.slope, i, real_bytes, get_real(tile.slope, last, real_bytes))


cdef void bound_tile(QueryTile *tile) noexcept nogil:
    """Note from where to where the rows' keys begin and end."""
    cdef int64_t begin, end
    cdef int i
    tile.begin_min = tile.end_min = UNBOUNDED
    tile.begin_max = tile.end_max = 0
    for i in range(tile.count):
        begin = tile.key_begin[i]
        end = tile.key_end[i]
        if begin < end:
            tile.begin_min = min(tile.begin_min, begin)
            tile.end_max = max(tile.end_max, end)
        tile.begin_max = max(tile.begin_max, begin)
        tile.end_min = min(tile.end_min, end)


cdef QueryTile *place_tile(const Plan *plan, const HeadView *head, int number,
                           Py_ssize_t row_begin, Py_ssize_t rows) noexcept nogil:
    """Return the task's tile of that number, with `rows` rows from row_begin on and no keys."""
    cdef QueryTile *tile = tile_of(plan, head, number)
    cdef Py_ssize_t query_head = head.kv_head * plan.group + row_begin // head.q_len
    cdef Py_ssize_t index = row_begin % head.q_len
    cdef int first = 0, count
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
    reset_state(plan, tile)
    while first < tile.count:
        count = <int>min(tile.count - first, head.q_len - index)
        place_rows(plan, head, tile, first, count, query_head, index)
        first += count
        query_head += 1
        index = 0
    repeat_last_row(head, tile, plan.kernels.real_bytes)
    bound_tile(tile)
    return tile
