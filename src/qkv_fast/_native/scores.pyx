"""Which scores of a block count, and what is done to them before the softmax.

A key can be hidden from a row by the row's window or range, by a boolean mask, or by -inf in an
additive mask or a bias. tile.allow has a bit for each pair; where each row sees each key, it is not
filled.
"""

from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memchr, memset

from .kernels cimport QKV_BOOL, qkv_tile_kernels
from .rows cimport load_scales, read_reals
from .types cimport (
    HeadView, KVBlock, Plan, QueryTile, TensorView, Visibility, adds_to_scores, is_additive,
    is_shared, lane_bits, set_real,
)


cdef void set_relative(const Plan *plan, QueryTile *tile, int64_t origin) noexcept nogil:
    """Set the relative positions of all lanes: those that count from key `origin` on."""
    cdef int i
    for i in range(tile.lanes):
        set_real(tile.relative_position, i, plan.kernels.real_bytes,
                 <double>(tile.position[i] - origin))


# --- Visibility ---------------------------------------------------------------------------------

cdef inline bint window_hides(const QueryTile *tile, int64_t begin, Py_ssize_t nk) noexcept nogil:
    """Return whether some row's window or range leaves out one of nk keys from `begin` on."""
    return tile.begin_max > begin or tile.end_min < begin + nk


cdef bint mask_may_hide(const Plan *plan, const HeadView *head, int64_t begin,
                        Py_ssize_t nk) noexcept nogil:
    """Return whether a boolean mask may hide one of nk keys from `begin` on."""
    if head.mask == NULL or plan.mask.type != QKV_BOOL:
        return False
    return not (is_shared(&plan.mask) and plan.mask.col == 1
                and memchr(head.mask + begin, 0, nk) == NULL)


cdef void allow_positions(QueryTile *tile, int64_t begin, Py_ssize_t nk) noexcept nogil:
    """Fill tile.allow for nk keys from `begin` on by the rows' windows and ranges.

    allow[k] first says which rows' sight begins or ends at key k.
    """
    cdef int64_t first, last
    cdef uint64_t bits = 0, row = 1
    cdef Py_ssize_t k
    cdef int i
    memset(tile.allow, 0, (nk + 1) * sizeof(uint64_t))
    for i in range(tile.lanes):
        first = min(max(tile.key_begin[i] - begin, 0), nk)
        last = min(max(tile.key_end[i] - begin, first), nk)
        tile.allow[first] ^= row
        tile.allow[last] ^= row
        row <<= 1
    for k in range(nk):
        bits ^= tile.allow[k]
        tile.allow[k] = bits


cdef uint64_t fill_allow(const Plan *plan, QueryTile *tile, int64_t begin, Py_ssize_t nk,
                         bint masked) noexcept nogil:
    """Fill tile.allow for nk keys from `begin` on; return which rows see any."""
    cdef uint64_t any_allowed = 0
    cdef const char *mask
    cdef Py_ssize_t k
    cdef int i
    if window_hides(tile, begin, nk):
        allow_positions(tile, begin, nk)
    else:
        memset(tile.allow, 0xff, nk * sizeof(uint64_t))
    if masked and is_shared(&plan.mask):
        mask = tile.mask_rows[0] + begin * plan.mask.col
        for k in range(nk):
            if not mask[k * plan.mask.col]:
                tile.allow[k] = 0
    elif masked:
        for i in range(tile.lanes):
            tile.rows[i] = tile.mask_rows[i] + begin * plan.mask.col
        plan.kernels.mask_bool(tile.allow, nk, tile.nvec, tile.rows, plan.mask.col)
    for k in range(nk):
        any_allowed |= tile.allow[k]
    return any_allowed & lane_bits(tile.lanes)


cdef bint allows_all(const QueryTile *tile, Py_ssize_t nk) noexcept nogil:
    """Return whether tile.allow hides nothing."""
    cdef uint64_t all_allowed = lane_bits(tile.lanes)
    cdef Py_ssize_t k
    for k in range(nk):
        all_allowed &= tile.allow[k]
    return all_allowed == lane_bits(tile.lanes)


cdef void find_spans(const Plan *plan, QueryTile *tile, Py_ssize_t nk) noexcept nogil:
    """Set each vector's span: from the first to the last key that one of its rows sees."""
    cdef int v, lanes = plan.kernels.lanes
    cdef uint64_t bits = lane_bits(lanes)
    cdef int begin, end
    for v in range(tile.nvec):
        begin = 0
        end = <int>nk
        while end > 0 and not tile.allow[end - 1] & bits:
            end -= 1
        while begin < end and not tile.allow[begin] & bits:
            begin += 1
        tile.span[v].begin = begin
        tile.span[v].end = end
        bits <<= lanes


cdef bint find_visibility(const Plan *plan, const HeadView *head, QueryTile *tile,
                          const KVBlock *block, Visibility *visible) noexcept nogil:
    """Find what the tile sees of a block; return False where that is nothing.

    Where it is not all of the block, fill tile.allow and tile.span.
    """
    cdef int64_t begin = block.begin
    if begin >= tile.end_max or begin + block.nk <= tile.begin_min:
        return False
    cdef Py_ssize_t nk = min(block.nk, tile.end_max - begin)
    cdef bint masked = mask_may_hide(plan, head, begin, nk), additive = adds_to_scores(plan)
    visible.has_keys = ~<uint64_t>0
    visible.partial = additive or masked or window_hides(tile, begin, nk)
    if visible.partial:
        visible.has_keys = fill_allow(plan, tile, begin, nk, masked)
        if not visible.has_keys:
            return False
        visible.partial = additive or not allows_all(tile, nk)
    if visible.partial:
        find_spans(plan, tile, nk)
        while not tile.allow[nk - 1]:
            nk -= 1
    visible.nk = nk
    return True


# --- Modifiers ----------------------------------------------------------------------------------

cdef void add_bias(const Plan *plan, const HeadView *head, QueryTile *tile, const TensorView *bias,
                   const char **rows, int64_t begin, Visibility *visible) noexcept nogil:
    """Add the rows of a mask or a bias to the scores, and hide the keys where these are -inf."""
    cdef bint shared = is_shared(bias)
    cdef Py_ssize_t k, nk = visible.nk
    cdef char *row = head.gathered
    cdef int i
    for i in range(1 if shared else tile.lanes):
        tile.rows[i] = rows[i] + begin * bias.col
        if not bias.contiguous:
            read_reals(plan, row, bias, tile.rows[i], nk)
            tile.rows[i] = row
            row += nk * plan.kernels.real_bytes
    plan.kernels.bias(tile.scores, nk, tile.nvec, tile.rows, shared, tile.allow)
    visible.has_keys = 0
    for k in range(nk):
        visible.has_keys |= tile.allow[k]
    visible.partial = not allows_all(tile, nk)


cdef void modify_scores(const Plan *plan, const HeadView *head, QueryTile *tile,
                        const KVBlock *block, Visibility *visible) noexcept nogil:
    """Turn the products of a block into scores: int8 scales, softcap, ALiBi, additive mask, bias.

    A new score modifier goes here, at its place in the order; plan.has_modifiers must cover it.
    """
    cdef const qkv_tile_kernels *kernels = plan.kernels
    cdef Py_ssize_t nk = visible.nk
    if plan.key_scales.data != NULL:
        kernels.scale_keys(tile.scores, nk, tile.nvec, load_scales(&head.key_scales, block, nk), 0)
    if not plan.has_modifiers:
        return                          # the softmax multiplies by score_scale
    if plan.score_scale != 1:
        kernels.scale(tile.scores, nk, tile.nvec, plan.score_scale)
    if plan.softcap != 0:
        kernels.softcap(tile.scores, nk, tile.nvec, plan.softcap)
    if head.slopes != NULL:
        set_relative(plan, tile, block.begin)
        kernels.alibi(tile.scores, nk, tile.nvec, tile.slope, tile.relative_position)
    if is_additive(&plan.mask):
        add_bias(plan, head, tile, &plan.mask, tile.mask_rows, block.begin, visible)
    if is_additive(&plan.bias):
        add_bias(plan, head, tile, &plan.bias, tile.bias_rows, block.begin, visible)
