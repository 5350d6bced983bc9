"""The products around attention, Y = X Wᵀ + b, by the kernels that compute scores.

X is (rows, depth), W (features, depth) and Y (rows, features). To the kernels a row of X is a
query, and a row of W is a key:

    a tile: up to tile_q rows of X, packed, one in each vector lane
    for each block of features:
        for each piece of the depth, for each tile of the task:
            S += W Xᵀ                       S [features][rows]
        Y = Sᵀ + b

W is read in place; where it holds 16-bit elements, a block is widened once for all tiles of a
task. Few rows go to decode's kernels, which read W once, at the memory's speed, and widen it in
registers. A sum over the depth has the same order for any number of threads and rows, but decode's
kernels have another one than tiles.
"""

cimport numpy as cnp
from libc.string cimport memcpy, memset

from .kernels cimport QKV_FLOAT32, QKV_FLOAT64, QKV_KEY_RUN, QKV_KEY_RUNS_AHEAD
from .tuning cimport (
    LINEAR_BLOCK, LINEAR_DEPTH, LINEAR_TASKS_PER_THREAD, LINEAR_TILES, MAX_LANES,
    MAX_LINEAR_DECODE_ROWS,
)
from .types cimport real, round_up, set_real, size_of

cnp.import_array()

cdef enum:
    RUNS = 4                            # of decode's features between two stores


# --- Planning -----------------------------------------------------------------------------------

cdef int view_linear(LinearCall *call, const qkv_tile_kernels *kernels, x, weight, int weight_type,
                     bias, y) except -1:
    """Note where the arrays lie: two axes, the last one with unit stride."""
    cdef cnp.ndarray x_array = x, weight_array = weight, y_array = y, bias_array
    call.kernels = kernels
    call.rows = cnp.PyArray_DIMS(x_array)[0]
    call.depth = cnp.PyArray_DIMS(x_array)[1]
    call.features = cnp.PyArray_DIMS(weight_array)[0]
    call.x = <const char *>cnp.PyArray_DATA(x_array)
    call.x_stride = cnp.PyArray_STRIDES(x_array)[0]
    call.weight = <const char *>cnp.PyArray_DATA(weight_array)
    call.weight_stride = cnp.PyArray_STRIDES(weight_array)[0]
    call.weight_type = weight_type
    call.y = <char *>cnp.PyArray_DATA(y_array)
    call.y_stride = cnp.PyArray_STRIDES(y_array)[0]
    if bias is not None:
        bias_array = bias
        call.bias = <const char *>cnp.PyArray_DATA(bias_array)
    call.work = <double>call.rows * call.features * call.depth
    call.is_decode = call.rows <= MAX_LINEAR_DECODE_ROWS
    return 0


cdef bint is_in_place(const LinearCall *call) noexcept nogil:
    """Return whether the kernels of tiles can read W where it is."""
    return call.weight_type == (QKV_FLOAT32 if call.kernels.real_bytes == 4 else QKV_FLOAT64)


cdef Py_ssize_t plan_linear(LinearCall *call, Py_ssize_t threads) noexcept:
    """Choose the tasks, of which the number is returned, and the scratch of a thread."""
    cdef int real_bytes = call.kernels.real_bytes
    cdef Py_ssize_t tiles, groups = 1, parts, most, block_bytes
    cdef Py_ssize_t wanted = LINEAR_TASKS_PER_THREAD * threads if threads > 1 else 1
    if call.is_decode:
        call.block = RUNS * QKV_KEY_RUN
        call.padded_stride = round_up(call.depth, call.kernels.lanes)
        call.scratch_bytes = round_up(call.block * call.rows * real_bytes)
    else:
        call.block = LINEAR_BLOCK
        tiles = (call.rows + call.kernels.tile_q - 1) // call.kernels.tile_q
        call.tiles_per_task = <int>max(1, min(LINEAR_TILES, tiles // threads))
        groups = (tiles + call.tiles_per_task - 1) // call.tiles_per_task
        block_bytes = round_up(call.block * call.kernels.tile_q * real_bytes)
        call.packed_bytes = round_up(call.depth * call.kernels.tile_q * real_bytes)
        call.scratch_bytes = ((call.tiles_per_task + 1) * block_bytes
                              + call.tiles_per_task * call.packed_bytes)
        if not is_in_place(call):
            call.scratch_bytes += round_up(call.block * LINEAR_DEPTH * real_bytes)
    most = (call.features + call.block - 1) // call.block
    parts = max(1, min(most, (wanted + groups - 1) // groups))
    call.features_per_task = (most + parts - 1) // parts * call.block
    call.tasks_per_group = (call.features + call.features_per_task - 1) // call.features_per_task
    return groups * call.tasks_per_group


# --- Tiles --------------------------------------------------------------------------------------

cdef void add(real *total, const real *more, Py_ssize_t count) noexcept nogil:
    """total += more"""
    cdef Py_ssize_t i
    for i in range(count):
        total[i] += more[i]


cdef void add_bias(real *S, const real *bias, Py_ssize_t nk, Py_ssize_t ld) noexcept nogil:
    """S[k][:] += bias[k]"""
    cdef Py_ssize_t k, i
    cdef real b
    for k in range(nk):
        b = bias[k]
        for i in range(ld):
            S[k * ld + i] += b


cdef void pack_tile(const LinearCall *call, char *packed, Py_ssize_t begin, Py_ssize_t count,
                    int nvec) noexcept nogil:
    """Pack rows of X, one after another the pieces of the depth."""
    cdef const char *rows[MAX_LANES]
    cdef Py_ssize_t ld = nvec * call.kernels.lanes, at = 0, i, piece
    while at < call.depth:
        piece = min(<Py_ssize_t>LINEAR_DEPTH, call.depth - at)
        for i in range(ld):             # lanes without a row repeat the last one
            rows[i] = (call.x + (begin + min(i, count - 1)) * call.x_stride
                       + at * call.kernels.real_bytes)
        call.kernels.pack_rows(packed + at * ld * call.kernels.real_bytes, rows, piece, nvec, 1)
        at += piece


cdef const char *load_weights(const LinearCall *call, char *copies, Py_ssize_t feature,
                              Py_ssize_t nk, Py_ssize_t at, Py_ssize_t piece,
                              Py_ssize_t *stride) noexcept nogil:
    """Return W[feature : feature + nk, at : at + piece] as reals, and the bytes between rows."""
    cdef const char *source = (call.weight + feature * call.weight_stride
                               + at * size_of(call.weight_type))
    cdef Py_ssize_t k
    if is_in_place(call):
        stride[0] = call.weight_stride
        return source
    stride[0] = piece * call.kernels.real_bytes
    for k in range(nk):
        call.kernels.widen(copies + k * stride[0], source + k * call.weight_stride, piece,
                           call.weight_type)
    return copies


cdef void store_tile(const LinearCall *call, char *S, Py_ssize_t begin, Py_ssize_t count,
                     Py_ssize_t feature, Py_ssize_t nk, int nvec,
                     const double *ones) noexcept nogil:
    """Y = Sᵀ + b"""
    cdef int real_bytes = call.kernels.real_bytes
    cdef char *rows[MAX_LANES]
    cdef Py_ssize_t i, ld = nvec * call.kernels.lanes
    if call.bias != NULL and real_bytes == 4:
        add_bias(<float *>S, <const float *>call.bias + feature, nk, ld)
    elif call.bias != NULL:
        add_bias(<double *>S, <const double *>call.bias + feature, nk, ld)
    for i in range(count):
        rows[i] = call.y + (begin + i) * call.y_stride + feature * real_bytes
    call.kernels.store_rows(rows, <int>count, S, nk, nvec, ones)


cdef void multiply_tiles(const LinearCall *call, char *scratch, Py_ssize_t group,
                         Py_ssize_t feature, Py_ssize_t end) noexcept nogil:
    """Compute the features [feature, end) of a group of tiles."""
    cdef int real_bytes = call.kernels.real_bytes, lanes = call.kernels.lanes, t, tiles = 0
    cdef Py_ssize_t tile_q = call.kernels.tile_q, begin = group * call.tiles_per_task * tile_q
    cdef Py_ssize_t block_bytes = round_up(call.block * tile_q * real_bytes)
    cdef Py_ssize_t nk, at, piece, stride = 0, count
    cdef char *packed = scratch + (call.tiles_per_task + 1) * block_bytes
    cdef char *more = scratch + call.tiles_per_task * block_bytes
    cdef char *copies = packed + call.tiles_per_task * call.packed_bytes
    cdef const char *weights
    cdef Py_ssize_t counts[MAX_LANES]
    cdef int nvec[MAX_LANES]
    cdef double ones[MAX_LANES]
    for t in range(MAX_LANES):
        set_real(ones, t, real_bytes, 1)
    while tiles < call.tiles_per_task and begin + tiles * tile_q < call.rows:
        count = counts[tiles] = min(tile_q, call.rows - begin - tiles * tile_q)
        nvec[tiles] = <int>((count + lanes - 1) // lanes)
        pack_tile(call, packed + tiles * call.packed_bytes, begin + tiles * tile_q, count,
                  nvec[tiles])
        tiles += 1
    while feature < end and not call.interrupt.stop:
        nk = min(call.block, end - feature)
        at = 0
        while at < call.depth or at == 0:
            piece = min(<Py_ssize_t>LINEAR_DEPTH, call.depth - at)
            weights = load_weights(call, copies, feature, nk, at, piece, &stride)
            for t in range(tiles):
                call.kernels.scores(
                    more if at else scratch + t * block_bytes,
                    packed + t * call.packed_bytes + at * nvec[t] * lanes * real_bytes, weights,
                    stride, nk, piece, nvec[t], NULL, NULL)
                if at == 0:
                    continue
                if real_bytes == 4:
                    add(<float *>(scratch + t * block_bytes), <const float *>more,
                        nk * nvec[t] * lanes)
                else:
                    add(<double *>(scratch + t * block_bytes), <const double *>more,
                        nk * nvec[t] * lanes)
            at += LINEAR_DEPTH
        for t in range(tiles):
            store_tile(call, scratch + t * block_bytes, begin + t * tile_q, counts[t], feature,
                       nk, nvec[t], ones)
        feature += nk


# --- Few rows -----------------------------------------------------------------------------------

cdef void pad_rows(LinearCall *call) noexcept nogil:
    """Copy X to call.padded, each row padded with zeros to whole vectors."""
    cdef Py_ssize_t r, bytes = call.depth * call.kernels.real_bytes
    cdef Py_ssize_t stride = call.padded_stride * call.kernels.real_bytes
    for r in range(call.rows):
        memcpy(call.padded + r * stride, call.x + r * call.x_stride, bytes)
        memset(call.padded + r * stride + bytes, 0, stride - bytes)


cdef void store_columns(const LinearCall *call, const real *S, Py_ssize_t feature,
                        Py_ssize_t nk) noexcept nogil:
    """Y = Sᵀ + b"""
    cdef const real *bias = <const real *>call.bias
    cdef real *row
    cdef Py_ssize_t r, k
    for r in range(call.rows):
        row = <real *>(call.y + r * call.y_stride) + feature
        for k in range(nk):
            row[k] = S[k * call.rows + r] if bias == NULL else (
                S[k * call.rows + r] + bias[feature + k])


cdef void multiply_few(const LinearCall *call, char *scratch, Py_ssize_t feature,
                       Py_ssize_t end) noexcept nogil:
    """Compute the features [feature, end) of few rows."""
    cdef const char *runs[RUNS + 8]     # QKV_KEY_RUNS_AHEAD is 4
    cdef Py_ssize_t nk, i
    while feature < end and not call.interrupt.stop:
        nk = min(call.block, end - feature)
        for i in range(RUNS + QKV_KEY_RUNS_AHEAD):
            runs[i] = call.weight + (feature + i * QKV_KEY_RUN) * call.weight_stride
        call.kernels.decode_scores(scratch, call.rows, call.padded, call.padded_stride, runs,
                                   call.weight_stride, nk, call.depth, <int>call.rows,
                                   call.weight_type)
        if call.kernels.real_bytes == 4:
            store_columns(call, <const float *>scratch, feature, nk)
        else:
            store_columns(call, <const double *>scratch, feature, nk)
        feature += nk


# --- A task -------------------------------------------------------------------------------------

cdef void run_linear_task(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    """Run a task of a call (a task_function of parallel.pxd)."""
    cdef const LinearCall *call = <const LinearCall *>context
    cdef char *scratch = call.scratch + thread * call.scratch_bytes
    cdef Py_ssize_t feature = task % call.tasks_per_group * call.features_per_task
    cdef Py_ssize_t end = min(call.features, feature + call.features_per_task)
    if call.is_decode:
        multiply_few(call, scratch, feature, end)
    else:
        multiply_tiles(call, scratch, task // call.tasks_per_group, feature, end)
