"""Rows of the caller's tensors: where they lie, in pages or not, and how kernels get to read them.

Kernels read a row in place where it is contiguous. All other rows are converted into a thread's
scratch, a block of keys or a tile of queries at a time.
"""

from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset

from .kernels cimport (
    QKV_BFLOAT16, QKV_FLOAT16, QKV_INT8, qkv_copy_row16, qkv_prefetch_rows, qkv_read_row,
    qkv_tile_kernels, qkv_write_row, qkv_zero_nonfinite,
)
from .tuning cimport ALIGNMENT, PREFETCH_DISTANCE
from .types cimport HeadRows, HeadView, KVBlock, Plan, QueryTile, TensorView, size_of

cdef extern from *:
    void prefetch_line "__builtin_prefetch"(const void *) nogil


# --- One row ------------------------------------------------------------------------------------

cdef void read_row(const qkv_tile_kernels *kernels, void *row, const char *source,
                   Py_ssize_t length, Py_ssize_t stride, int type) noexcept nogil:
    """Copy elements of the caller's, `stride` bytes apart, to reals."""
    if kernels.widen != NULL and (stride == 2 and (type == QKV_FLOAT16 or type == QKV_BFLOAT16)
                                  or stride == 1 and type == QKV_INT8):
        kernels.widen(row, source, length, type)
    else:
        qkv_read_row(row, kernels.real_bytes, source, length, stride, type)


cdef void round_row(const qkv_tile_kernels *kernels, char *target, const void *row,
                    Py_ssize_t length, Py_ssize_t stride, int type) noexcept nogil:
    """Copy reals to elements of the caller's, `stride` bytes apart."""
    if (kernels.narrow != NULL and stride == 2
            and (type == QKV_FLOAT16 or type == QKV_BFLOAT16)):
        kernels.narrow(target, row, length, type)
    else:
        qkv_write_row(target, row, kernels.real_bytes, length, stride, type)


cdef void read_reals(const Plan *plan, void *row, const TensorView *view, const char *source,
                     Py_ssize_t length) noexcept nogil:
    """Copy a row of the caller's to reals."""
    read_row(plan.kernels, row, source, length, view.col, view.type)


cdef void read_inputs(const Plan *plan, char *row, const TensorView *view, const char *source,
                      Py_ssize_t length) noexcept nogil:
    """Copy a row of the caller's to inputs of the kernels."""
    if plan.kernels.input_type == QKV_BFLOAT16:
        qkv_copy_row16(row, source, length, view.col, view.type)
    else:
        read_reals(plan, row, view, source, length)


cdef void write_row(const Plan *plan, char *target, const void *row) noexcept nogil:
    """Write v_dim reals to a row of the output."""
    cdef const TensorView *out = &plan.out
    if out.contiguous:
        memcpy(target, row, plan.v_dim * plan.kernels.real_bytes)
    else:
        round_row(plan.kernels, target, row, plan.v_dim, out.col, out.type)


cdef void gather_queries(const Plan *plan, const HeadView *head, QueryTile *tile) noexcept nogil:
    """Point tile.rows at the tile's queries, converted where they are not contiguous."""
    cdef char *row = head.gathered
    cdef int i
    for i in range(tile.lanes):
        if plan.query.contiguous:
            tile.rows[i] = tile.query_rows[i]
        else:
            tile.rows[i] = row
            read_inputs(plan, row, &plan.query, tile.query_rows[i], plan.head_dim)
            row += plan.head_dim * plan.input_bytes


# --- The rows of a block of keys ----------------------------------------------------------------

cdef inline void copy_inputs(const Plan *plan, char *row, const TensorView *view,
                             const char *source, Py_ssize_t length) noexcept nogil:
    """read_inputs, faster for what need not be converted."""
    if view.contiguous and view.type == plan.kernels.input_type:
        memcpy(row, source, length * plan.input_bytes)
    else:
        read_inputs(plan, row, view, source, length)


cdef void gather(const Plan *plan, const HeadRows *rows, int64_t begin, Py_ssize_t nk, char *row,
                 Py_ssize_t row_bytes) noexcept nogil:
    """Copy nk rows from key `begin` on to inputs side by side, each padded with zeros."""
    cdef Py_ssize_t i = 0, j, count, bytes = rows.length * plan.input_bytes
    cdef bint dense = (row_bytes == bytes and rows.view.col == size_of(rows.view.type)
                       and rows.view.row == rows.length * rows.view.col)
    cdef const char *source
    while i < nk:
        count = nk - i
        source = find_row(rows, begin + i, &count)
        if dense:                       # all rows are one long row
            copy_inputs(plan, row, rows.view, source, count * rows.length)
            row += count * row_bytes
            i += count
            continue
        for j in range(count):
            copy_inputs(plan, row, rows.view, source, rows.length)
            memset(row + bytes, 0, row_bytes - bytes)
            source += rows.view.row
            row += row_bytes
        i += count


cdef void gather_block(const Plan *plan, const HeadRows *rows, const KVBlock *block,
                       Py_ssize_t row_bytes) noexcept nogil:
    """Copy the block's rows to rows.copies; those before the window become zeros."""
    cdef Py_ssize_t before = block.before_window
    memset(rows.copies, 0, before * row_bytes)
    gather(plan, rows, block.begin + before, block.nk - before, rows.copies + before * row_bytes,
           row_bytes)


cdef bint in_one_page(const HeadRows *rows, const KVBlock *block) noexcept nogil:
    return rows.pages == NULL or block.begin % rows.page_size + block.nk <= rows.page_size


cdef void load_keys(const Plan *plan, const HeadView *head, KVBlock *block) noexcept nogil:
    """Point block.keys at the keys in place or, where kernels need it, at padded copies."""
    cdef Py_ssize_t step = plan.kernels.row_step, count = block.nk
    if (plan.key.contiguous and plan.head_dim % plan.kernels.depth_step == 0
            and block.nk % step == 0 and in_one_page(&head.key, block)):
        block.keys = find_row(&head.key, block.begin, &count)
        block.key_stride = plan.key.row
        return
    block.keys = head.key.copies
    block.key_stride = plan.key_bytes
    gather_block(plan, &head.key, block, plan.key_bytes)
    count = (block.nk + step - 1) // step * step - block.nk
    memset(head.key.copies + block.nk * plan.key_bytes, 0, count * plan.key_bytes)


cdef void load_value_rows(const Plan *plan, const HeadView *head, KVBlock *block) noexcept nogil:
    """Point block.value_rows at the values in place, or at copies."""
    cdef Py_ssize_t count = block.nk
    if plan.value.contiguous and in_one_page(&head.value, block):
        block.value_rows = find_row(&head.value, block.begin, &count)
        block.row_stride = plan.value.row
        return
    if plan.values_in_keys and block.keys == head.key.copies:
        block.value_rows = block.keys
        block.row_stride = block.key_stride
        return
    block.value_rows = head.value.copies
    block.row_stride = plan.v_dim * plan.input_bytes
    gather_block(plan, &head.value, block, block.row_stride)


cdef void load_values(const Plan *plan, const HeadView *head, KVBlock *block,
                      bint finite) noexcept nogil:
    """Point block.values at block.value_rows as accumulate reads them.

    finite: with 0 in place of infinities and NaN.
    """
    cdef Py_ssize_t i, row_bytes = plan.v_dim * plan.input_bytes
    cdef char *row = head.gathered
    block.values = block.value_rows
    block.value_stride = block.row_stride
    if finite:
        for i in range(block.nk):
            memcpy(row, block.value_rows + i * block.row_stride, row_bytes)
            qkv_zero_nonfinite(row, plan.kernels.input_type, plan.v_dim)
            row += row_bytes
        block.values = head.gathered
        block.value_stride = row_bytes
    if plan.kernels.pack_values != NULL:
        row = head.scratch + plan.layout.packed_values
        plan.kernels.pack_values(row, plan.packed_stride, block.values, block.value_stride,
                                 block.nk, plan.v_dim)
        block.values = row
        block.value_stride = plan.packed_stride


# --- Scales of int8 rows ------------------------------------------------------------------------

cdef const float *load_scales(const HeadRows *rows, const KVBlock *block,
                              Py_ssize_t nk) noexcept nogil:
    """Copy the scales of the block's first nk rows side by side; NULL where there are none."""
    cdef float *scales = <float *>rows.copies
    cdef Py_ssize_t i, count
    cdef const char *source
    if rows.view.data == NULL:
        return NULL
    for i in range(block.before_window):
        scales[i] = 0
    i = block.before_window
    while i < nk:
        count = nk - i
        source = find_row(rows, block.begin + i, &count)
        if rows.view.row == sizeof(float):
            memcpy(&scales[i], source, count * sizeof(float))
            i += count
            while count > 0:            # prefetch those of the next block
                count -= <Py_ssize_t>(ALIGNMENT // sizeof(float))
                source += ALIGNMENT
                prefetch_line(source + nk * sizeof(float))
            continue
        while count > 0:
            memcpy(&scales[i], source, sizeof(float))
            source += rows.view.row
            count -= 1
            i += 1
    return scales


# --- Prefetching --------------------------------------------------------------------------------

cdef inline void prefetch_keys(const HeadRows *rows, int64_t begin, int64_t end,
                               qkv_prefetch_rows *prefetch) noexcept nogil:
    """Name the rows of the keys [begin, end), as far as they lie in one page."""
    prefetch.row = rows.data
    prefetch.stride = rows.view.row
    prefetch.bytes = rows.length * size_of(rows.view.type)
    prefetch.count = max(0, end - begin)
    prefetch.at = 0
    if begin < end:
        prefetch.row = find_row(rows, begin, &prefetch.count)


cdef void plan_prefetch(const HeadView *head, const QueryTile *tile, const KVBlock *block,
                        qkv_prefetch_rows *prefetch) noexcept nogil:
    """Name what to prefetch while a block's scores are computed: keys to come, and its values."""
    cdef int64_t end = block.begin + block.nk
    cdef int64_t begin = end            # keys that were converted have been read already
    if block.keys != head.key.copies:
        begin = min(end, block.begin + PREFETCH_DISTANCE)
    prefetch_keys(&head.key, begin, min(tile.end_max, begin + block.nk), &prefetch[0])
    prefetch_keys(&head.value, block.begin, min(tile.end_max, end), &prefetch[1])
