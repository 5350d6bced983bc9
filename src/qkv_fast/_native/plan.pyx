"""From a Problem to the plans of its two algorithms: views, block sizes, tasks, scratch."""

cimport numpy as cnp
from libc.math cimport M_LOG2E
from libc.stdint cimport int64_t, uintptr_t

from .kernels cimport (
    QKV_BFLOAT16, QKV_BOOL, QKV_FLOAT16, QKV_FLOAT32, QKV_FLOAT64, QKV_INT8, QKV_KEY_RUN,
    qkv_tile_kernels,
)
from .tuning cimport (
    BLOCK_K, BLOCK_K_DECODE, BLOCK_K_DECODE_16BIT, BLOCK_K_MATRIX, CLOCK_WORK,
    FOLD_KEYS, FOLD_KEYS_BFLOAT16, KV_SPLIT, LARGE, LEAST_BLOCK_K, LONG_RUN, MAX_DECODE_ROWS,
    MAX_HEADS, MAX_ROWS_PER_TASK, PACKED_STEP, PAGE, TASKS_PER_THREAD, TASKS_PER_THREAD_PACKED,
    WIDE, NARROW_TILE_Q, fitting_keys, shared_keys,
)
from .types cimport (
    Interrupt, Plan, QueryTile, ScratchLayout, TensorView, adds_to_scores, is_shared_by_heads,
    lanes_per_step, round_up, size_of,
)

cnp.import_array()


# --- Views of the caller's arrays ---------------------------------------------------------------

cdef void view_tensor(TensorView *view, cnp.ndarray array, int type,
                      Py_ssize_t batch_ndim) noexcept:
    """View (*batch, heads, rows, columns), all but whether it is contiguous."""
    cdef cnp.npy_intp *strides = cnp.PyArray_STRIDES(array)
    view.data = <char *>cnp.PyArray_DATA(array)
    view.batch_strides = <const Py_ssize_t *>strides
    view.head = strides[batch_ndim]
    view.row = strides[batch_ndim + 1]
    view.col = strides[batch_ndim + 2]
    view.type = type


cdef bint has_unit_stride(const TensorView *view, Py_ssize_t length) noexcept:
    """Return whether the elements of a row lie side by side, as a single one does."""
    return view.col == size_of(view.type) or length <= 1


cdef void set_contiguous(TensorView *view, int kernel_type, Py_ssize_t length) noexcept:
    """Note whether kernels that use rows of kernel_type can do so in place."""
    view.contiguous = view.type == kernel_type and has_unit_stride(view, length)


cdef void view_numbers(TensorView *view, array, Py_ssize_t batch_ndim) noexcept:
    """View (*batch), (*batch, heads) or (*batch, heads, rows); None leaves the view absent."""
    cdef cnp.ndarray numbers
    cdef cnp.npy_intp *strides
    if array is None:
        return
    numbers = array
    strides = cnp.PyArray_STRIDES(numbers)
    view.data = <char *>cnp.PyArray_DATA(numbers)
    view.batch_strides = <const Py_ssize_t *>strides
    if cnp.PyArray_NDIM(numbers) > batch_ndim:
        view.head = strides[batch_ndim]
    if cnp.PyArray_NDIM(numbers) > batch_ndim + 1:
        view.row = strides[batch_ndim + 1]


cdef void limit_view_to_gemm(TensorView *view, Py_ssize_t length, int real_bytes) noexcept:
    """Have rows copied that GEMM can't take: it wants them aligned, and their distance an int."""
    cdef Py_ssize_t columns = view.row // real_bytes
    if view.row % real_bytes != 0 or columns < length or columns > 0x7fffffff:
        view.contiguous = False
    if <uintptr_t>view.data % real_bytes != 0:
        view.contiguous = False


cdef void limit_to_blas(Plan *plan) noexcept:
    """Make a prefill plan one for a BLAS table: whole tiles, and rows that GEMM can take."""
    plan.fixed_nvec = plan.kernels.tile_q // plan.kernels.lanes
    limit_view_to_gemm(&plan.key, plan.head_dim, plan.kernels.real_bytes)
    limit_view_to_gemm(&plan.value, plan.v_dim, plan.kernels.real_bytes)


cdef void allow_widening(TensorView *view, Py_ssize_t length) noexcept:
    """Have rows read in place also of the types that decode kernels widen to float."""
    if view.type == QKV_FLOAT16 or view.type == QKV_BFLOAT16 or view.type == QKV_INT8:
        view.contiguous = has_unit_stride(view, length)


cdef bint is_in_place(const Plan *plan) noexcept:
    """Return whether kernels read keys and values where they are."""
    return plan.key.contiguous and plan.value.contiguous


cdef bint is_first_part(const TensorView *view, const TensorView *whole,
                        Py_ssize_t batch_ndim) noexcept:
    """Return whether a view's rows begin where those of another one do."""
    cdef Py_ssize_t axis
    for axis in range(max(1, batch_ndim)):  # pages have one stride
        if view.batch_strides[axis] != whole.batch_strides[axis]:
            return False
    return (view.data == whole.data and view.type == whole.type and view.head == whole.head
            and view.row == whole.row and view.col == whole.col)


# --- A plan: what both algorithms need ----------------------------------------------------------

cdef int view_tensors(Plan *plan, cnp.ndarray query, cnp.ndarray key, cnp.ndarray value,
                      cnp.ndarray out, int query_code, int key_code, int value_code,
                      int out_code) except -1:
    """View the tensors in an empty plan and set its sizes; kv_len is for tensors that are dense."""
    cdef Py_ssize_t ndim = cnp.PyArray_NDIM(query) - 3
    cdef cnp.npy_intp *shape = cnp.PyArray_DIMS(query)
    plan.batch_ndim = ndim
    plan.batch_shape = <const Py_ssize_t *>shape
    plan.num_kv_heads = cnp.PyArray_DIMS(key)[ndim]
    plan.group = shape[ndim] // plan.num_kv_heads
    plan.q_len = shape[ndim + 1]
    plan.head_dim = shape[ndim + 2]
    plan.kv_len = cnp.PyArray_DIMS(key)[ndim + 1]
    plan.v_dim = cnp.PyArray_DIMS(value)[ndim + 2]
    if max(plan.head_dim, plan.v_dim) > (<Py_ssize_t>1 << 40):
        raise MemoryError(f"no memory for tiles of head size {max(plan.head_dim, plan.v_dim)}")
    view_tensor(&plan.query, query, query_code, ndim)
    view_tensor(&plan.key, key, key_code, ndim)
    view_tensor(&plan.value, value, value_code, ndim)
    view_tensor(&plan.out, out, out_code, ndim)
    return 0


cdef int view_problem(Plan *plan, problem) except -1:
    """View all of a Problem in an empty plan."""
    cdef cnp.ndarray key = problem.key, mask = problem.attn_mask, bias = problem.attn_bias
    cdef cnp.ndarray sinks = problem.sinks
    cdef Py_ssize_t ndim
    view_tensors(plan, problem.query, key, problem.value, problem.out, problem.query_code,
                 problem.key_code, problem.value_code, problem.out_code)
    ndim = plan.batch_ndim
    plan.kv_len = problem.kv_len
    if mask is not None:
        view_tensor(&plan.mask, mask, problem.mask_code, ndim)
        plan.mask_len = cnp.PyArray_DIMS(mask)[ndim + 2]
    if bias is not None:
        view_tensor(&plan.bias, bias, problem.bias_code, ndim)
        plan.mask_len = cnp.PyArray_DIMS(bias)[ndim + 2]
    view_numbers(&plan.lse, problem.lse, ndim)
    view_numbers(&plan.key_scales, problem.key_scales, ndim)
    view_numbers(&plan.value_scales, problem.value_scales, ndim)
    view_numbers(&plan.query_offset, problem.query_offset, ndim)
    view_numbers(&plan.key_lengths, problem.key_lengths, ndim)
    view_numbers(&plan.key_begins, problem.key_begins, ndim)
    view_numbers(&plan.key_ends, problem.key_ends, ndim)
    view_numbers(&plan.slopes, problem.alibi_slopes, ndim)
    if problem.query_starts is not None:
        view_numbers(&plan.query_starts, problem.query_starts, ndim)
        view_numbers(&plan.query_lengths, problem.query_lengths, ndim)
        view_numbers(&plan.key_starts, problem.key_starts, ndim)
    if problem.block_table is not None:
        view_numbers(&plan.block_table, problem.block_table, 1)
        plan.page_size = cnp.PyArray_DIMS(key)[ndim + 1]
    set_scoring(plan, problem.scale, problem.left, problem.right, problem.softcap,
                NULL if sinks is None else <double *>cnp.PyArray_DATA(sinks))
    return 0


cdef void set_scoring(Plan *plan, double scale, int64_t left, int64_t right, double softcap,
                      const double *sinks) noexcept:
    """Set what turns products into scores, after all views; a modifier's numbers go here."""
    plan.scale = scale
    plan.left = left
    plan.right = right
    plan.softcap = softcap
    plan.sinks = sinks
    plan.has_modifiers = plan.softcap != 0 or plan.slopes.data != NULL or adds_to_scores(plan)


cdef void set_kernels(Plan *plan, const qkv_tile_kernels *kernels) noexcept:
    """Set the kernels, and what follows from the types that they use."""
    cdef int input_type = kernels.input_type
    cdef int real_type = QKV_FLOAT64 if kernels.real_bytes == 8 else QKV_FLOAT32
    plan.kernels = kernels
    plan.input_bytes = size_of(input_type)
    plan.fold_keys = FOLD_KEYS_BFLOAT16 if input_type == QKV_BFLOAT16 else FOLD_KEYS
    set_contiguous(&plan.query, input_type, plan.head_dim)
    set_contiguous(&plan.key, input_type, plan.head_dim)
    set_contiguous(&plan.value, input_type, plan.v_dim)
    set_contiguous(&plan.out, real_type, plan.v_dim)
    set_contiguous(&plan.mask, real_type, plan.mask_len)
    set_contiguous(&plan.bias, real_type, plan.mask_len)
    plan.query_scale = plan.scale * M_LOG2E
    plan.score_scale = 1
    if input_type == QKV_BFLOAT16:      # a scaled query would be rounded once more
        plan.score_scale = abs(plan.query_scale)
        plan.query_scale = -1 if plan.query_scale < 0 else 1


cdef void set_block_k(Plan *plan, Py_ssize_t block_k, Py_ssize_t rows) noexcept:
    """Set the keys of a block, and the blocks between looks at the clock for so many rows."""
    plan.block_k = block_k
    plan.blocks_per_look = max(1, <Py_ssize_t>(
        CLOCK_WORK / (<double>rows * block_k * (plan.head_dim + plan.v_dim))))


# --- Prefill ------------------------------------------------------------------------------------

cdef Py_ssize_t choose_block_k(const Plan *plan) noexcept:
    """Return the keys of a block in prefill."""
    cdef Py_ssize_t row_bytes = (plan.head_dim + plan.v_dim) * plan.input_bytes
    cdef bint wide = max(plan.head_dim, plan.v_dim) > LARGE
    cdef bint matrix = plan.kernels.row_step > 1
    cdef Py_ssize_t most = BLOCK_K_MATRIX if matrix and wide else BLOCK_K
    return fitting_keys(row_bytes, most, not matrix and plan.kernels.tile_q <= NARROW_TILE_Q)


cdef void plan_prefill(Plan *plan, const qkv_tile_kernels *kernels, Interrupt *interrupt) noexcept:
    """Complete the plan for query tiles with these kernels, all but its tasks and its scratch."""
    plan.interrupt = interrupt
    plan.tiles_per_task = plan.heads_per_task = 1
    plan.values_in_keys = (plan.v_dim <= plan.head_dim
                           and is_first_part(&plan.value, &plan.key, plan.batch_ndim))
    set_kernels(plan, kernels)
    set_block_k(plan, choose_block_k(plan), MAX_ROWS_PER_TASK)


cdef void choose_prefill_tasks(Plan *plan, Py_ssize_t tasks, Py_ssize_t threads) noexcept:
    """Choose how many tiles a task has, given the number of tasks with one tile, and prefetching.

    A task has several where its tiles can share work or loads: keys and values that are converted,
    packed or scanned, or that do not stay in the L2.
    """
    cdef Py_ssize_t tile_q = plan.kernels.tile_q
    cdef bint packs = plan.kernels.pack_values != NULL
    cdef bint beyond_l2 = (plan.kv_len * (plan.head_dim + plan.v_dim) * plan.input_bytes
                           > shared_keys())
    cdef Py_ssize_t least = threads * (TASKS_PER_THREAD_PACKED if packs else TASKS_PER_THREAD)
    if (packs or beyond_l2 or not is_in_place(plan) or plan.mask.data != NULL
            or plan.bias.data != NULL or plan.page_size != 0):
        while (plan.tiles_per_task * tile_q < MAX_ROWS_PER_TASK
               and tasks >= 2 * plan.tiles_per_task * least):
            plan.tiles_per_task *= 2
    plan.prefetches = beyond_l2 or plan.group * plan.q_len <= plan.tiles_per_task * tile_q


cdef void lay_out_prefill(Plan *plan, bint splits_keys=False) noexcept:
    """Set where everything lies in a thread's scratch.

    Where tasks split keys, total and error are one array of doubles, of the merged states.
    """
    cdef ScratchLayout *at = &plan.layout
    cdef Py_ssize_t acc_bytes = plan.v_dim * plan.kernels.tile_q * plan.kernels.real_bytes
    at.tiles = lay_out_blocks(plan, plan.kernels.tile_q)
    at.query = round_up(sizeof(QueryTile))
    at.acc = at.query + query_bytes(plan, plan.kernels.tile_q)
    at.total = at.acc + round_up(
        round_up(plan.v_dim, PACKED_STEP) * plan.kernels.tile_q * plan.kernels.real_bytes)
    at.error = at.tile_bytes = at.total
    if plan.kv_len > plan.fold_keys or splits_keys:
        at.error = at.total + round_up(acc_bytes)
        at.tile_bytes = at.error + round_up(acc_bytes)
    at.bytes = round_up(at.tiles + plan.tiles_per_task * at.tile_bytes, PAGE)


# --- Decode -------------------------------------------------------------------------------------

cdef Py_ssize_t choose_max_decode_rows(const Plan *prefill,
                                       const qkv_tile_kernels *decode) noexcept:
    """Return the most rows of a KV group that decode may have.

    Query tiles of several vectors are faster than decode, unless they have to convert keys.
    """
    cdef Py_ssize_t rows = min(<Py_ssize_t>MAX_DECODE_ROWS, <Py_ssize_t>decode.tile_q)
    return min(rows, lanes_per_step(prefill)) if is_in_place(prefill) else rows


cdef Py_ssize_t choose_block_k_decode(const Plan *plan) noexcept:
    """Return the keys of a block in decode."""
    if max(plan.head_dim, plan.v_dim) > WIDE:
        return LEAST_BLOCK_K
    return BLOCK_K_DECODE_16BIT if size_of(plan.key.type) == 2 else BLOCK_K_DECODE


cdef void plan_decode(Plan *plan, const Plan *prefill, const qkv_tile_kernels *kernels) noexcept:
    """Fill the plan for decode with these kernels, from prefill's of the same call.

    It lacks its tasks and its scratch yet, as prefill's does.
    """
    plan[0] = prefill[0]
    plan.fixed_nvec = 0
    set_kernels(plan, kernels)
    if kernels.real_bytes == 4:
        allow_widening(&plan.key, plan.head_dim)
        allow_widening(&plan.value, plan.v_dim)
    set_block_k(plan, choose_block_k_decode(plan), MAX_DECODE_ROWS)
    plan.sights_differ = (
        differs_by_row(plan, &plan.key_begins) or differs_by_row(plan, &plan.key_ends)
        or plan.mask.type == QKV_BOOL and differs_by_row(plan, &plan.mask))
    plan_interleaving(plan)


cdef inline bint differs_by_row(const Plan *plan, const TensorView *view) noexcept:
    """Return whether the rows of a KV group have different parts of the array."""
    return plan.group > 1 and view.head != 0 or plan.q_len > 1 and view.row != 0


cdef void plan_interleaving(Plan *plan) noexcept:
    """Choose in which order several heads of a task read their keys.

    adjacent_keys: keys of a head that lie side by side, before those of the next one; 0: heads are
    not interleaved. interleave_span: whole blocks and whole adjacent_keys, after which all
    heads are equally far.
    """
    cdef Py_ssize_t adjacent = 0
    if abs(plan.key.head) < abs(plan.key.row):
        adjacent = QKV_KEY_RUN
    elif plan.page_size * plan.key.row < LONG_RUN:
        adjacent = plan.page_size
    if (adjacent == 0 or adjacent % QKV_KEY_RUN or plan.page_size % adjacent
            or not is_in_place(plan) or plan.has_modifiers or plan.mask.data != NULL
            or plan.sights_differ or not is_shared_by_heads(&plan.key_begins)
            or not is_shared_by_heads(&plan.key_ends)
            or max(plan.head_dim, plan.v_dim) > WIDE):
        return
    plan.interleave_span = max(adjacent, plan.block_k)
    if (plan.interleave_span % adjacent == 0 and plan.interleave_span % plan.block_k == 0
            and KV_SPLIT % plan.interleave_span == 0):
        plan.adjacent_keys = adjacent


cdef void choose_decode_tasks(Plan *plan, Py_ssize_t tasks, Py_ssize_t threads) noexcept:
    """Choose how many KV heads a task has, given the number of tasks with one head."""
    cdef Py_ssize_t heads = min(<Py_ssize_t>MAX_HEADS, plan.num_kv_heads)
    if plan.adjacent_keys == 0:
        return
    while heads > 1 and tasks < heads * TASKS_PER_THREAD_PACKED * threads:
        heads = (heads + 1) // 2
    plan.heads_per_task = heads


cdef void lay_out_decode(Plan *plan, Py_ssize_t rows) noexcept:
    """Set where everything lies in a thread's scratch; rows: of a tile, whole vectors.

    The queries begin at a page and acc half a page on: a load waits for an earlier store to the
    same place of another page, and the kernels load values while they store acc. With acc 3200
    bytes into a page, bfloat16 from memory is 7 % slower (decode.py on Granite Rapids). Tiles of
    several heads begin at different places of a page, to use all sets of the caches.
    """
    cdef ScratchLayout *at = &plan.layout
    cdef Py_ssize_t row_bytes = rows * plan.kernels.real_bytes
    plan.q_stride = round_up(plan.head_dim, plan.kernels.lanes)
    plan.acc_stride = round_up(plan.v_dim, plan.kernels.lanes)
    at.query = round_up(sizeof(QueryTile))
    at.tiles = round_up(lay_out_blocks(plan, rows) + at.query, PAGE) - at.query
    at.acc = at.query + round_up(query_bytes(plan, rows), PAGE) + PAGE // 2
    at.tile_scores = at.acc + round_up(round_up(plan.v_dim, PACKED_STEP) * row_bytes)
    at.total = at.error = at.tile_bytes = at.tile_scores
    if plan.heads_per_task > 1:
        at.tile_bytes = PAGE // 2 + PAGE // 8 + round_up(
            at.tile_scores + round_up(plan.block_k, PACKED_STEP) * row_bytes, PAGE)
    at.bytes = round_up(at.tiles + plan.heads_per_task * at.tile_bytes, PAGE)


# --- Scratch of both ----------------------------------------------------------------------------

cdef Py_ssize_t query_bytes(const Plan *plan, Py_ssize_t rows) noexcept:
    """Return the bytes of a tile's queries."""
    return round_up(round_up(plan.head_dim, PACKED_STEP) * rows * plan.kernels.real_bytes)


cdef Py_ssize_t lay_out_blocks(Plan *plan, Py_ssize_t rows) noexcept:
    """Set where what belongs to a block of keys lies; return where the tiles can begin."""
    cdef const qkv_tile_kernels *kernels = plan.kernels
    cdef ScratchLayout *at = &plan.layout
    cdef Py_ssize_t keys = round_up(plan.block_k, PACKED_STEP)
    cdef Py_ssize_t widest = max(plan.head_dim, plan.v_dim)
    cdef Py_ssize_t scales = round_up((keys + kernels.lanes) * sizeof(float))
    plan.key_bytes = round_up(plan.head_dim, kernels.depth_step) * plan.input_bytes
    plan.packed_stride = keys * plan.input_bytes
    at.scores = 0
    at.gathered = round_up(keys * rows * kernels.real_bytes)
    at.keys = at.gathered + round_up(
        max(plan.block_k, rows) * max(widest, plan.block_k) * kernels.real_bytes)
    at.values = at.keys + round_up(keys * max(plan.key_bytes, plan.v_dim * plan.input_bytes))
    at.packed_values = at.values + round_up(keys * plan.v_dim * plan.input_bytes)
    at.key_scales = at.packed_values
    if kernels.pack_values != NULL:
        at.key_scales += round_up(round_up(plan.v_dim, PACKED_STEP) * plan.packed_stride)
    at.value_scales = at.key_scales + scales
    return at.value_scales + scales
