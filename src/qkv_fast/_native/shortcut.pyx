"""attend(): a plain dense call, from the caller's arrays to its answer; also see stored_shortcut.

attend_tensors() does the same for integrations/torch.py: torch's parameters, a tensor as answer.

A small call computes for less time than the stages of _problem/ take in Python. Most calls need
none of their cases: arrays or tensors of one native element type and one batch shape, perhaps a
mask and positions, and no other options. This module recognises such a call in C and runs the
engine on it. A call that it does not recognise goes through the stages, which alone refuse calls.
So attend() accepts nothing that they refuse, and its answer has the bits, the layout and the type
of theirs.
"""

cimport numpy as cnp
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.math cimport sqrt
from libc.stdint cimport int64_t
from libc.string cimport memset

from .engine cimport Runner, execute
from .kernels cimport QKV_BFLOAT16, QKV_BOOL, QKV_FLOAT16, QKV_FLOAT32, QKV_FLOAT64
from .plan cimport set_scoring, view_numbers, view_tensors
from .tensor_views cimport MAX_AXES, view_tensor
from .tuning cimport SERIAL_WORK
from .types cimport UNBOUNDED, Launch, Plan

cdef extern from "Python.h":
    int PyContextVar_Get(object, PyObject *, PyObject **) except -1

cdef extern from "numpy/arrayobject.h":
    # Both take over a reference to the dtype.
    cnp.ndarray PyArray_Empty(int, cnp.npy_intp *, cnp.PyArray_Descr *, int)
    cnp.ndarray PyArray_NewLikeArray(cnp.ndarray, cnp.NPY_ORDER, cnp.PyArray_Descr *, int)

cnp.import_array()

cdef enum:
    MAX_OFFSET = 1 << 30    # of queries; the stages allow more

cdef object UINT16 = cnp.PyArray_DescrFromType(cnp.NPY_UINT16)

# What connect() was given.
cdef object requested = None
cdef dict runners = {}
cdef object get_num_threads = None


def connect(request_variable, dict known_runners, thread_count):
    """Say where attend() finds the request in force, its Runner, and the number of threads."""
    global requested, runners, get_num_threads
    requested, runners, get_num_threads = request_variable, known_runners, thread_count


# --- What is recognised -------------------------------------------------------------------------

cdef bint is_bool(x) noexcept:
    return x is False or x is True


cdef bint are_plain(is_causal, scale, return_lse, window, softcap, alibi_slopes, sinks, attn_bias,
                    key_ranges) noexcept:
    """Return whether these options ask for no modifier of the scores and need no check."""
    return (is_bool(is_causal) and (scale is None or type(scale) is float) and is_bool(return_lse)
            and window is None and softcap is None and alibi_slopes is None and sinks is None
            and attn_bias is None and key_ranges is None)


cdef inline int code_of(cnp.ndarray array, bint uint16_is_bf16) noexcept:
    """Return the code of a floating type in native byte order; -1 for others, and for rare ones."""
    cdef int number = cnp.PyArray_TYPE(array)
    if not cnp.PyArray_ISNOTSWAPPED(array):
        return -1
    if uint16_is_bf16 and <PyObject *>cnp.PyArray_DESCR(array) == <PyObject *>UINT16:
        return QKV_BFLOAT16
    if number == cnp.NPY_FLOAT32:
        return QKV_FLOAT32
    if number == cnp.NPY_FLOAT64:
        return QKV_FLOAT64
    return QKV_FLOAT16 if number == cnp.NPY_FLOAT16 else -1


cdef cnp.ndarray view(given, bint uint16_is_bf16, int *code):
    """View an ndarray or a tensor and set the code of its element type; None and -1 for others."""
    code[0] = -1
    if given is None:
        return None
    if type(given) is not cnp.ndarray:
        return view_tensor(given, code)
    if cnp.PyArray_TYPE(given) == cnp.NPY_BOOL:
        code[0] = QKV_BOOL
    else:
        code[0] = code_of(given, uint16_is_bf16)
    return given


cdef bint fit(cnp.ndarray query, cnp.ndarray key, cnp.ndarray value, bint enable_gqa,
              bint same_batch) noexcept:
    """Return whether the tensors fit together and hold something.

    same_batch: query and key have the same batch axes; else the first axis of key counts pages.
    """
    cdef int ndim = cnp.PyArray_NDIM(query), axis
    cdef cnp.npy_intp *q = cnp.PyArray_DIMS(query)
    cdef cnp.npy_intp *k = cnp.PyArray_DIMS(key)
    cdef cnp.npy_intp *v = cnp.PyArray_DIMS(value)
    if (ndim < 3 or ndim > MAX_AXES or ndim != cnp.PyArray_NDIM(key)
            or ndim != cnp.PyArray_NDIM(value)):
        return False
    for axis in range(ndim):
        if q[axis] == 0 or k[axis] == 0 or k[axis] != v[axis] and axis < ndim - 1:
            return False
        if same_batch and q[axis] != k[axis] and axis < ndim - 3:
            return False
    if q[ndim - 3] != k[ndim - 3] and not (enable_gqa and q[ndim - 3] % k[ndim - 3] == 0):
        return False
    return q[ndim - 1] == k[ndim - 1] and v[ndim - 1] != 0


cdef bint view_mask(Plan *plan, cnp.ndarray mask, int code, cnp.npy_intp *strides) noexcept:
    """View a mask as broadcast to the scores; return whether it broadcasts.

    strides: filled with those of the view, as np.broadcast_to gives them.
    """
    cdef int ndim = plan.batch_ndim + 3, axis, missing = ndim - cnp.PyArray_NDIM(mask)
    cdef bint same = missing == 0
    cdef cnp.npy_intp length, own
    if code < 0 or missing < 0:
        return False
    for axis in range(ndim):
        length = plan.kv_len if axis == ndim - 1 else plan.batch_shape[axis]
        own = 1 if axis < missing else cnp.PyArray_DIMS(mask)[axis - missing]
        if own != length and own != 1:
            return False
        same = same and own == length
        strides[axis] = 0 if own == 1 else cnp.PyArray_STRIDES(mask)[axis - missing]
    plan.mask.batch_strides = <const Py_ssize_t *>(cnp.PyArray_STRIDES(mask) if same else strides)
    plan.mask.data = cnp.PyArray_BYTES(mask)
    plan.mask.head = plan.mask.batch_strides[ndim - 3]
    plan.mask.row = plan.mask.batch_strides[ndim - 2]
    plan.mask.col = plan.mask.batch_strides[ndim - 1]
    plan.mask.type = code
    plan.mask_len = plan.kv_len
    return True


cdef bint overlap(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Return whether the memory between the ends of one array and of the other may overlap."""
    cdef char *begin[2]
    cdef char *end[2]
    cdef cnp.ndarray array
    cdef cnp.npy_intp reach
    cdef int i, axis
    for i in range(2):
        array = b if i else a
        begin[i] = cnp.PyArray_BYTES(array)
        end[i] = begin[i] + cnp.PyArray_ITEMSIZE(array)
        for axis in range(cnp.PyArray_NDIM(array)):
            reach = (cnp.PyArray_DIMS(array)[axis] - 1) * cnp.PyArray_STRIDES(array)[axis]
            begin[i] += min(reach, 0)
            end[i] += max(reach, 0)
    return begin[0] < end[1] and begin[1] < end[0]


cdef bint is_writable(cnp.ndarray out, cnp.ndarray query, cnp.ndarray key, cnp.ndarray value,
                      cnp.ndarray mask) noexcept:
    """Return whether the engine can write the result to `out` while it reads the inputs."""
    cdef int ndim = cnp.PyArray_NDIM(query), axis
    cdef cnp.npy_intp *shape = cnp.PyArray_DIMS(out)
    cdef cnp.npy_intp v_dim = cnp.PyArray_DIMS(value)[ndim - 1]
    if (cnp.PyArray_NDIM(out) != ndim or shape[ndim - 1] != v_dim
            or not cnp.PyArray_CHKFLAGS(out, cnp.NPY_ARRAY_C_CONTIGUOUS | cnp.NPY_ARRAY_WRITEABLE)):
        return False
    for axis in range(ndim - 1):
        if shape[axis] != cnp.PyArray_DIMS(query)[axis]:
            return False
    if (cnp.PyArray_BYTES(out) != cnp.PyArray_BYTES(query) or not cnp.PyArray_IS_C_CONTIGUOUS(query)
            or v_dim != cnp.PyArray_DIMS(query)[ndim - 1]) and overlap(out, query):
        return False                    # nor is it the query itself
    return not (overlap(out, key) or overlap(out, value)
                or mask is not None and overlap(out, mask))


cdef cnp.ndarray new_rows(cnp.ndarray query, cnp.ndarray value, int code):
    """Return a new array for the result, laid out like query; None where its strides are rare."""
    cdef int ndim = cnp.PyArray_NDIM(query), axis
    cdef cnp.PyArray_Descr *dtype = cnp.PyArray_DESCR(query)
    cdef cnp.npy_intp shape[MAX_AXES]
    cdef cnp.npy_intp v_dim = cnp.PyArray_DIMS(value)[ndim - 1]
    cdef bint in_c_order = cnp.PyArray_IS_C_CONTIGUOUS(query)
    for axis in range(ndim):
        shape[axis] = cnp.PyArray_DIMS(query)[axis]
        if not in_c_order and cnp.PyArray_STRIDES(query)[axis] == 0:
            return None
    if not in_c_order and v_dim != shape[ndim - 1]:
        return None
    if code == QKV_BFLOAT16:
        dtype = <cnp.PyArray_Descr *><PyObject *>UINT16
    Py_INCREF(<object><PyObject *>dtype)
    if not in_c_order:
        return PyArray_NewLikeArray(query, cnp.NPY_KEEPORDER, dtype, False)
    shape[ndim - 1] = v_dim
    return PyArray_Empty(ndim, shape, dtype, False)


cdef Runner find_runner(int code):
    """Return what computes an element type here; None if that is Python, BLAS or not known yet."""
    cdef PyObject *request = NULL
    PyContextVar_Get(requested, NULL, &request)
    found = runners.get((<object>request, code))
    Py_DECREF(<object>request)
    if type(found) is Runner and not (<Runner>found).uses_blas:
        return found
    return None


cdef int count_threads(const Plan *plan, given) except -1:
    """Return the budget of threads; 0 if the number given is not one to recognise."""
    cdef double work = <double>max(4, plan.group * plan.q_len) * plan.kv_len * plan.num_kv_heads
    cdef int axis
    if given is not None:
        return given if type(given) is int and 1 <= given <= 1 << 16 else 0
    for axis in range(plan.batch_ndim):
        work *= plan.batch_shape[axis]
    if work * (plan.head_dim + plan.v_dim) < SERIAL_WORK:
        return 1                        # as begin_call() will say
    return get_num_threads()


cdef int set_plain_scoring(Plan *plan, scale, bint is_causal) except -1:
    """Set the scoring of a call with a scale or None, and no modifier but a mask."""
    cdef double factor = 1.0 / sqrt(<double>plan.head_dim) if scale is None else scale
    set_scoring(plan, factor, UNBOUNDED, 0 if is_causal else UNBOUNDED, 0.0, NULL)
    return 0


# --- A call -------------------------------------------------------------------------------------

cdef cnp.ndarray new_lse(cnp.ndarray query, int code):
    """Return a new array for the log-sum-exp of each row, for arithmetic of a type."""
    return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(query) - 1, cnp.PyArray_DIMS(query),
                             cnp.NPY_FLOAT64 if code == QKV_FLOAT64 else cnp.NPY_FLOAT32, False)


cdef bint compute(cnp.ndarray query, cnp.ndarray key, cnp.ndarray value, cnp.ndarray mask,
                  cnp.ndarray out, cnp.ndarray lse, int code, int mask_code, scale, bint is_causal,
                  int64_t query_offset, num_threads) except -1:
    """Compute into `out` and `lse`; return whether mask and num_threads were recognised."""
    cdef Runner runner = find_runner(code)
    cdef Launch launch
    cdef Plan *plan = &launch.prefill
    cdef cnp.npy_intp mask_strides[MAX_AXES]
    cdef Py_ssize_t no_strides[MAX_AXES]
    cdef int budget
    if runner is None:
        return False
    memset(&launch, 0, sizeof(Launch))
    view_tensors(plan, query, key, value, out, code, code, code, code)
    if mask is not None and not view_mask(plan, mask, mask_code, mask_strides):
        return False
    budget = count_threads(plan, num_threads)
    if budget == 0:
        return False
    view_numbers(&plan.lse, lse, plan.batch_ndim)
    if query_offset != 0:               # the same for all batch entries
        memset(no_strides, 0, sizeof(no_strides))
        plan.query_offset.batch_strides = no_strides
        plan.query_offset.data = <char *>&query_offset
    set_plain_scoring(plan, scale, is_causal)
    execute(&launch, runner, budget, NULL)
    return True


def attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, query_offset,
           window, softcap, alibi_slopes, sinks, attn_bias, key_ranges, key_lengths, out,
           return_lse, num_threads, dtype, out_dtype):
    """Return the answer of scaled_dot_product_attention; None if its stages have to look."""
    cdef bint uint16_is_bf16 = dtype is not None
    cdef cnp.ndarray q, k, v, mask, rows, lse = None
    cdef int code, key_code, value_code, mask_code, out_code
    if not (are_plain(is_causal, scale, return_lse, window, softcap, alibi_slopes, sinks, attn_bias,
                      key_ranges)
            and key_lengths is None and out_dtype is None and is_bool(enable_gqa)
            and type(dropout_p) is float and dropout_p == 0.0
            and type(query_offset) is int and -MAX_OFFSET <= query_offset <= MAX_OFFSET
            and (not uint16_is_bf16 or type(dtype) is str and dtype == "bfloat16")):
        return None
    q = view(query, uint16_is_bf16, &code)
    k = view(key, uint16_is_bf16, &key_code)
    v = view(value, uint16_is_bf16, &value_code)
    mask = view(attn_mask, uint16_is_bf16, &mask_code)
    if (code < 0 or code == QKV_BOOL or uint16_is_bf16 and code != QKV_BFLOAT16
            or key_code != code or value_code != code or not fit(q, k, v, enable_gqa, True)
            or mask is None and attn_mask is not None):
        return None
    if out is None:
        rows = new_rows(q, v, code)
        if rows is None:
            return None
        out = rows
    else:
        rows = view(out, code == QKV_BFLOAT16, &out_code)
        if out_code != code or not is_writable(rows, q, k, v, mask):
            return None
    if return_lse:
        lse = new_lse(q, code)
    if not compute(q, k, v, mask, rows, lse, code, mask_code, scale, is_causal, query_offset,
                   num_threads):
        return None
    return out if lse is None else (out, lse)


def attend_tensors(query, key, value, attn_mask, is_causal, scale, enable_gqa, empty_like):
    """Return the answer of integrations.torch as a new tensor; None if that module has to look.

    It is laid out like query where torch's own is, by empty_like, which is torch's.
    """
    cdef cnp.ndarray q, k, v, mask = None, rows
    cdef int code = -1, key_code = -1, value_code = -1, mask_code = -1, out_code = -1, ndim
    if not (is_bool(is_causal) and (scale is None or type(scale) is float) and is_bool(enable_gqa)):
        return None
    q = view_tensor(query, &code)
    k = view_tensor(key, &key_code)
    v = view_tensor(value, &value_code)
    if (q is None or k is None or v is None or code < 0 or code == QKV_BOOL or key_code != code
            or value_code != code or not fit(q, k, v, enable_gqa, True)):
        return None
    if attn_mask is not None:
        mask = view_tensor(attn_mask, &mask_code)
        if (mask is None or cnp.PyArray_NDIM(mask) < 2
                or mask_code not in (QKV_BOOL, QKV_FLOAT32, code)):     # as torch wants it
            return None
    ndim = cnp.PyArray_NDIM(q)
    if cnp.PyArray_DIMS(q)[ndim - 1] == cnp.PyArray_DIMS(v)[ndim - 1]:
        out = empty_like(query)
    else:
        out = query.new_empty((*query.shape[:ndim - 1], cnp.PyArray_DIMS(v)[ndim - 1]))
    rows = view_tensor(out, &out_code)
    if out_code != code or not compute(q, k, v, mask, rows, None, code, mask_code, scale, is_causal,
                                       0, None):
        return None
    return out
