"""Merging: attention over parts of the keys becomes that over all of them, in one pass over rows.

For each row, with m the largest lse of its parts:

    w_i = exp(lse_i - m)                          0: the part is not read, whatever it holds
    out = sum_i w_i part_i / (sum_i w_i + exp(sink - m))
    lse = m + log(sum_i w_i)

Sums run in the order of the parts: those of the weights in double, those of the rows in reals. A
row is read from all parts before it is written, so the result may lie in one of them.
"""

cimport numpy as cnp
from libc.math cimport INFINITY, exp, log
from libc.string cimport memset

from .kernels cimport QKV_BFLOAT16, QKV_FLOAT16, QKV_FLOAT32, QKV_FLOAT64
from .rows cimport read_row, round_row
from .tuning cimport MERGE_COLUMNS, MERGE_TASK, MERGE_WORK
from .types cimport real, round_up, size_of

cnp.import_array()


cdef struct MergeScratch:               # of a thread
    char **rows                         # [parts] parts, [parts] lses, result, lse, sinks
    double *weights                     # [parts]
    const char **used                   # the rows of parts whose weight is not 0
    char *factors                       # [parts] reals, their weights over the denominator
    char *sums                          # [MERGE_COLUMNS] reals of the result, before conversion
    char *copies                        # [parts][MERGE_COLUMNS] reals, converted


# --- Planning -----------------------------------------------------------------------------------

cdef inline Py_ssize_t count_arrays(const MergeCall *call) noexcept nogil:
    return 2 * call.parts + 3


cdef void measure_merge(MergeCall *call, const qkv_tile_kernels *kernels, list outputs) noexcept:
    """Set the sizes of an empty call."""
    cdef cnp.ndarray first = outputs[0]
    cdef int axis
    call.kernels = kernels
    call.parts = len(outputs)
    call.axes = cnp.PyArray_NDIM(first) - 1
    call.v_dim = cnp.PyArray_DIMS(first)[call.axes]
    call.rows = 1
    for axis in range(call.axes):
        call.rows *= cnp.PyArray_DIMS(first)[axis]
    call.work = <double>call.rows * call.parts * (call.v_dim + 1) * MERGE_WORK


cdef Py_ssize_t views_bytes(const MergeCall *call) noexcept:
    """Return the bytes that view_parts needs."""
    cdef Py_ssize_t axes = call.axes + 1
    return (round_up(count_arrays(call) * sizeof(MergeArray))
            + round_up((count_arrays(call) + 1) * axes * sizeof(Py_ssize_t)))


cdef bint is_readable(const MergeArray *array, int real_type, Py_ssize_t length) noexcept:
    """Return whether kernels can use the rows where they are."""
    cdef bint is_narrow = array.type == QKV_FLOAT16 or array.type == QKV_BFLOAT16
    if array.type != real_type and not (is_narrow and real_type == QKV_FLOAT32):
        return False
    return array.col == size_of(array.type) or length <= 1


cdef void view_array(MergeArray *view, cnp.ndarray array, int type, Py_ssize_t axes) noexcept:
    """View an array of rows, or of numbers of each row."""
    cdef cnp.npy_intp *strides = cnp.PyArray_STRIDES(array)
    cdef Py_ssize_t axis
    view.data = <char *>cnp.PyArray_DATA(array)
    view.type = type
    view.col = strides[axes] if cnp.PyArray_NDIM(array) > axes else 0
    for axis in range(axes):
        view.strides[axis] = strides[axis]


cdef bint continues(const MergeCall *call, Py_ssize_t axis) noexcept:
    """Return whether all arrays go on along an axis as along the next one."""
    cdef Py_ssize_t i
    cdef const MergeArray *array
    for i in range(count_arrays(call)):
        array = &call.arrays[i]
        if array.data != NULL and (
                array.strides[axis] != array.strides[axis + 1] * call.shape[axis + 1]):
            return False
    return True


cdef void remove_axis(MergeCall *call, Py_ssize_t axis) noexcept:
    cdef Py_ssize_t i, j
    call.axes -= 1
    for i in range(axis, call.axes):
        call.shape[i] = call.shape[i + 1]
        for j in range(count_arrays(call)):
            call.arrays[j].strides[i] = call.arrays[j].strides[i + 1]


cdef void join_axes(MergeCall *call) noexcept:
    """Make one axis of neighbouring ones along which all arrays go on, and none of those of 1."""
    cdef Py_ssize_t axis = call.axes - 1
    while axis >= 0 and call.axes > 1:
        if call.shape[axis] == 1:
            remove_axis(call, axis)
        elif axis + 1 < call.axes and continues(call, axis):
            call.shape[axis + 1] *= call.shape[axis]
            remove_axis(call, axis)
        axis -= 1


cdef int view_parts(MergeCall *call, char *memory, list outputs, list codes, list lses, out,
                    int out_code, lse, sinks) except -1:
    """Note in `memory` where the arrays lie; lses and lse are reals, sinks float64."""
    cdef Py_ssize_t i, axes = call.axes, count = count_arrays(call)
    cdef int real_type = QKV_FLOAT32 if call.kernels.real_bytes == 4 else QKV_FLOAT64
    cdef cnp.ndarray first = outputs[0]
    cdef MergeArray *result
    call.arrays = <MergeArray *>memory
    call.shape = <Py_ssize_t *>(memory + round_up(count * sizeof(MergeArray)))
    memset(memory, 0, views_bytes(call))
    for i in range(count):
        call.arrays[i].strides = call.shape + (i + 1) * (axes + 1)
    for i in range(axes):
        call.shape[i] = cnp.PyArray_DIMS(first)[i]
    for i in range(call.parts):
        view_array(&call.arrays[i], outputs[i], codes[i], axes)
        view_array(&call.arrays[call.parts + i], lses[i], real_type, axes)
        if (not is_readable(&call.arrays[i], real_type, call.v_dim)
                or call.arrays[i].type != call.arrays[0].type):
            call.converts_parts = True
    result = &call.arrays[2 * call.parts]
    view_array(result, out, out_code, axes)
    view_array(result + 1, lse, real_type, axes)
    if sinks is not None:
        view_array(result + 2, sinks, QKV_FLOAT64, axes)
    call.converts_out = not is_readable(result, real_type, call.v_dim)
    if axes == 0:
        call.axes = call.shape[0] = 1
    join_axes(call)
    return 0


cdef Py_ssize_t plan_merge(MergeCall *call, Py_ssize_t threads) noexcept:
    """Choose the tasks, of which the number is returned, and the scratch of a thread."""
    cdef Py_ssize_t real_bytes = call.kernels.real_bytes, parts = call.parts
    cdef Py_ssize_t most = max(1, MERGE_TASK // (parts * (call.v_dim + 1)))
    cdef Py_ssize_t share = call.rows if threads <= 1 else (call.rows + 4 * threads - 1) // (
        4 * threads)
    call.rows_per_task = max(1, min(most, share))
    call.scratch_bytes = (round_up(count_arrays(call) * sizeof(char *))
                          + round_up(parts * sizeof(double)) + round_up(parts * sizeof(char *))
                          + round_up(parts * real_bytes) + round_up(MERGE_COLUMNS * real_bytes)
                          + round_up(parts * MERGE_COLUMNS * real_bytes))
    return (call.rows + call.rows_per_task - 1) // call.rows_per_task


# --- A row --------------------------------------------------------------------------------------

cdef void lay_out_scratch(const MergeCall *call, char *at, MergeScratch *scratch) noexcept nogil:
    scratch.rows = <char **>at
    at += round_up(count_arrays(call) * sizeof(char *))
    scratch.weights = <double *>at
    at += round_up(call.parts * sizeof(double))
    scratch.used = <const char **>at
    at += round_up(call.parts * sizeof(char *))
    scratch.factors = at
    at += round_up(call.parts * call.kernels.real_bytes)
    scratch.sums = at
    scratch.copies = at + round_up(MERGE_COLUMNS * call.kernels.real_bytes)


cdef double weigh_parts(const MergeCall *call, MergeScratch *scratch, const real **lses,
                        real *lse) noexcept nogil:
    """Set a row's weights and write its lse; return the factor that makes them shares of all."""
    cdef double top = -INFINITY, total = 0, x, sink, highest
    cdef real weight
    cdef Py_ssize_t i
    for i in range(call.parts):
        x = lses[i][0]
        if x > top or x != x:
            top = x                     # NaN stays, since nothing is greater
    if top == -INFINITY:
        top = 0
    for i in range(call.parts):
        x = lses[i][0] - top
        weight = <real>1 if x == 0 else <real>exp(x)    # a weight is 0 if it is as a real
        scratch.weights[i] = weight
        total += weight
    lse[0] = <real>(top + log(total))
    if call.arrays[2 * call.parts + 2].data == NULL:
        return 1 / total
    sink = (<const double *>scratch.rows[2 * call.parts + 2])[0]
    if sink == INFINITY:
        return 0 * total                # NaN stays NaN
    highest = sink if sink > top else top
    x = exp(top - highest)
    return x / (total * x + exp(sink - highest))


cdef Py_ssize_t use_parts(const MergeCall *call, MergeScratch *scratch, double factor,
                          real *factors) noexcept nogil:
    """List the rows whose weight is not 0, and their shares; return how many."""
    cdef Py_ssize_t i, used = 0
    for i in range(call.parts):
        if scratch.weights[i] != 0:
            factors[used] = <real>(scratch.weights[i] * factor)
            scratch.used[used] = scratch.rows[i]
            used += 1
    return used


cdef void merge_columns(const MergeCall *call, const MergeScratch *scratch, Py_ssize_t used,
                        Py_ssize_t begin, Py_ssize_t count) noexcept nogil:
    """Write some columns of a row, where not all arrays can be used in place."""
    cdef const MergeArray *part
    cdef const MergeArray *out = &call.arrays[2 * call.parts]
    cdef int real_type = QKV_FLOAT32 if call.kernels.real_bytes == 4 else QKV_FLOAT64
    cdef int type = real_type if call.converts_parts else call.arrays[0].type
    cdef char *target = scratch.rows[2 * call.parts] + begin * out.col
    cdef const char *source
    cdef char *row = scratch.copies
    cdef Py_ssize_t i, at = 0
    for i in range(call.parts):
        if scratch.weights[i] == 0:
            continue
        part = &call.arrays[i]
        source = scratch.rows[i] + begin * part.col
        if call.converts_parts:
            read_row(call.kernels, row, source, count, part.col, part.type)
            source = row
            row += MERGE_COLUMNS * call.kernels.real_bytes
        scratch.used[at] = source
        at += 1
    if call.converts_out:
        call.kernels.merge_rows(scratch.sums, real_type, scratch.used, scratch.factors, used,
                                count, type)
        round_row(call.kernels, target, scratch.sums, count, out.col, out.type)
    else:
        call.kernels.merge_rows(target, out.type, scratch.used, scratch.factors, used, count, type)


cdef void merge_row(const MergeCall *call, MergeScratch *scratch) noexcept nogil:
    """Merge the row that scratch.rows points at."""
    cdef char **lses = scratch.rows + call.parts
    cdef char *lse = lses[call.parts + 1]
    cdef double factor
    cdef Py_ssize_t i, used
    if call.kernels.real_bytes == 4:
        factor = weigh_parts(call, scratch, <const float **>lses, <float *>lse)
        used = use_parts(call, scratch, factor, <float *>scratch.factors)
    else:
        factor = weigh_parts(call, scratch, <const double **>lses, <double *>lse)
        used = use_parts(call, scratch, factor, <double *>scratch.factors)
    if not (call.converts_parts or call.converts_out):
        call.kernels.merge_rows(scratch.rows[2 * call.parts], call.arrays[2 * call.parts].type,
                                scratch.used, scratch.factors, used, call.v_dim,
                                call.arrays[0].type)
        return
    i = 0
    while i < call.v_dim:
        merge_columns(call, scratch, used, i, min(<Py_ssize_t>MERGE_COLUMNS, call.v_dim - i))
        i += MERGE_COLUMNS


# --- A task -------------------------------------------------------------------------------------

cdef void find_row(const MergeCall *call, Py_ssize_t row, char **rows) noexcept nogil:
    """Point at a row of each array."""
    cdef Py_ssize_t axis = call.axes, index, i
    cdef const MergeArray *array
    for i in range(count_arrays(call)):
        rows[i] = call.arrays[i].data
    while axis > 0:
        axis -= 1
        index = row % call.shape[axis]
        row //= call.shape[axis]
        if index == 0:
            continue
        for i in range(count_arrays(call)):
            rows[i] += index * call.arrays[i].strides[axis]


cdef void run_merge_task(const void *context, int thread, Py_ssize_t task) noexcept nogil:
    """Merge the rows of a task of a call (a task_function of parallel.pxd)."""
    cdef const MergeCall *call = <const MergeCall *>context
    cdef Py_ssize_t row = task * call.rows_per_task, i, last = call.axes - 1
    cdef Py_ssize_t end = min(call.rows, row + call.rows_per_task), along_last
    cdef MergeScratch scratch
    lay_out_scratch(call, call.scratch + thread * call.scratch_bytes, &scratch)
    while row < end:
        find_row(call, row, scratch.rows)
        along_last = min(end - row, call.shape[last] - row % call.shape[last])
        row += along_last
        while along_last > 0:
            merge_row(call, &scratch)
            along_last -= 1
            for i in range(count_arrays(call)):
                scratch.rows[i] += call.arrays[i].strides[last]
