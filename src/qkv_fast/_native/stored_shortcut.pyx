"""attend_pages(), attend_cache(): plain calls on stored keys; shortcut.pyx has the dense ones.

Plain are: queries (batch, Hq, Lq, D) at the end of their sequences, which are not all empty; keys
and values of the element types that can be stored; perhaps a mask and causal positions.
"""

cimport numpy as cnp
from libc.stdint cimport INT64_MAX, int64_t
from libc.string cimport memset

from .engine cimport Runner, execute
from .kernels cimport QKV_BFLOAT16, QKV_BOOL, QKV_FLOAT32, QKV_FLOAT64, QKV_INT8
from .plan cimport view_numbers, view_tensors
from .shortcut cimport (
    are_plain, count_threads, find_runner, fit, is_bool, is_writable, new_lse, new_rows, overlap,
    set_plain_scoring, view, view_mask,
)
from .tensor_views cimport MAX_AXES
from .types cimport Launch, Plan

cnp.import_array()

cdef struct Stored:                     # codes of element types; mask: -1 without one
    int query, key, value, mask
    int code                            # of the arithmetic


cdef cnp.ndarray view_stored(given, bint uint16_is_bf16, int *code):
    """View keys or values and set the code of their element type; None and -1 for others."""
    cdef cnp.ndarray array = view(given, uint16_is_bf16, code)
    if array is not None and cnp.PyArray_TYPE(array) == cnp.NPY_INT8:
        code[0] = QKV_INT8
    return array


cdef bint set_code(Stored *types) noexcept:
    """Set the type of the arithmetic; return False if some type is not plain."""
    cdef int low = min(types.query, types.key, types.value)
    if low < 0 or QKV_BOOL in (types.query, types.key, types.value):
        return False
    types.code = types.query
    if types.key != types.query or types.value != types.query:
        types.code = QKV_FLOAT32
        if QKV_FLOAT64 in (types.query, types.key, types.value):
            types.code = QKV_FLOAT64
    return True


cdef bint are_scales(scales, int code, cnp.ndarray stored) noexcept:
    """Return whether these scales go with what is stored: a factor for each int8 row, or None."""
    cdef int axis
    if code != QKV_INT8 or scales is None:
        return code != QKV_INT8 and scales is None
    if (type(scales) is not cnp.ndarray or cnp.PyArray_TYPE(scales) != cnp.NPY_FLOAT32
            or not cnp.PyArray_ISNOTSWAPPED(scales) or cnp.PyArray_NDIM(scales) != 3):
        return False
    for axis in range(3):
        if cnp.PyArray_DIMS(scales)[axis] != cnp.PyArray_DIMS(stored)[axis]:
            return False
    return True


cdef cnp.ndarray integers(given, int axes, int flags):
    """Return an ndarray of integers as int64 in C order; None if it is not plain."""
    cdef int number
    if type(given) is not cnp.ndarray or cnp.PyArray_NDIM(given) != axes:
        return None
    number = cnp.PyArray_TYPE(given)
    if number != cnp.NPY_INT64 and number != cnp.NPY_INT32:
        return None
    return cnp.PyArray_FROM_OTF(given, cnp.NPY_INT64, cnp.NPY_ARRAY_CARRAY_RO | flags)


cdef int64_t greatest(cnp.ndarray array, int64_t limit) noexcept:
    """Return the greatest of int64 in C order that are from 0 to limit; -1 if some is not."""
    cdef int64_t *numbers = <int64_t *>cnp.PyArray_DATA(array)
    cdef int64_t found = -1
    cdef cnp.npy_intp i
    for i in range(cnp.PyArray_SIZE(array)):
        if numbers[i] < 0 or numbers[i] > limit:
            return -1
        found = max(found, numbers[i])
    return found


cdef cnp.ndarray offsets_of(cnp.ndarray lengths, cnp.npy_intp q_len):
    """Return the position of each sequence's first query, if the last one stands at the end."""
    cdef cnp.ndarray offsets = cnp.PyArray_EMPTY(1, cnp.PyArray_DIMS(lengths), cnp.NPY_INT64, False)
    cdef cnp.npy_intp i
    for i in range(cnp.PyArray_DIMS(lengths)[0]):
        (<int64_t *>cnp.PyArray_DATA(offsets))[i] = (
            (<int64_t *>cnp.PyArray_DATA(lengths))[i] - q_len)
    return offsets


cdef bint compute(const Stored *types, cnp.ndarray query, cnp.ndarray key, cnp.ndarray value,
                  key_scales, value_scales, cnp.ndarray table, cnp.ndarray lengths, int64_t kv_len,
                  cnp.ndarray mask, bint is_causal, scale, cnp.ndarray out, cnp.ndarray lse,
                  num_threads) except -1:
    """Compute into `out` and `lse`; return whether mask and num_threads were recognised."""
    cdef Runner runner = find_runner(types.code)
    cdef cnp.ndarray offsets
    cdef Launch launch
    cdef Plan *plan = &launch.prefill
    cdef cnp.npy_intp mask_strides[MAX_AXES]
    cdef int budget
    if runner is None:
        return False
    memset(&launch, 0, sizeof(Launch))
    view_tensors(plan, query, key, value, out, types.query, types.key, types.value, types.query)
    plan.kv_len = kv_len
    view_numbers(&plan.key_lengths, lengths, 1)
    view_numbers(&plan.key_scales, key_scales, 1)
    view_numbers(&plan.value_scales, value_scales, 1)
    if table is not None:
        view_numbers(&plan.block_table, table, 1)
        plan.page_size = cnp.PyArray_DIMS(key)[2]
    if mask is not None and not view_mask(plan, mask, types.mask, mask_strides):
        return False
    budget = count_threads(plan, num_threads)
    if budget == 0:
        return False
    if is_causal:
        offsets = offsets_of(lengths, plan.q_len)
        view_numbers(&plan.query_offset, offsets, 1)
    view_numbers(&plan.lse, lse, 1)
    set_plain_scoring(plan, scale, is_causal)
    execute(&launch, runner, budget, NULL)
    return True


cdef object attend(query, key, value, key_scales, value_scales, cnp.ndarray table,
                   cnp.ndarray lengths, bint is_checked, attn_mask, bint is_causal, scale,
                   bint enable_gqa, out, bint return_lse, num_threads, bint uint16_is_bf16):
    """Return the answer of a call, or None if it is not plain.

    is_checked: lengths are not negative, and those keys are there.
    """
    cdef cnp.ndarray q, k, v, mask, rows, lse = None
    cdef Stored types
    cdef int64_t kv_len
    cdef int out_type
    q = view(query, uint16_is_bf16, &types.query)
    k = view_stored(key, uint16_is_bf16, &types.key)
    v = view_stored(value, uint16_is_bf16, &types.value)
    mask = view(attn_mask, uint16_is_bf16, &types.mask)
    if (q is None or k is None or v is None or not set_code(&types)
            or cnp.PyArray_NDIM(q) != 4 or not fit(q, k, v, enable_gqa, False)
            or mask is None and attn_mask is not None
            or cnp.PyArray_DIMS(q)[0] != cnp.PyArray_DIMS(lengths)[0]
            or not are_scales(key_scales, types.key, k)
            or not are_scales(value_scales, types.value, v)):
        return None
    kv_len = greatest(lengths, INT64_MAX if is_checked else
                      cnp.PyArray_DIMS(table)[1] * cnp.PyArray_DIMS(k)[2])
    if kv_len <= 0 or not is_checked and greatest(table, cnp.PyArray_DIMS(k)[0] - 1) < 0:
        return None
    if out is None:
        out = rows = new_rows(q, v, types.query)
        if rows is None:
            return None
    else:
        rows = view(out, uint16_is_bf16 or types.query == QKV_BFLOAT16, &out_type)
        if out_type != types.query or not is_writable(rows, q, k, v, mask):
            return None
        for array in (key_scales, value_scales, table, lengths):
            if array is not None and overlap(rows, array):
                return None
    if return_lse:
        lse = new_lse(q, types.code)
    if not compute(&types, q, k, v, key_scales, value_scales, table, lengths, kv_len, mask,
                   is_causal, scale, rows, lse, num_threads):
        return None
    return out if lse is None else (out, lse)


def attend_pages(query, key_pages, value_pages, block_table, key_lengths, attn_mask, is_causal,
                 scale, enable_gqa, query_offset, window, softcap, alibi_slopes, sinks, attn_bias,
                 key_ranges, key_scales, value_scales, out, return_lse, num_threads, dtype,
                 out_dtype):
    """Return the answer of paged_attention; None if its stages have to look."""
    cdef cnp.ndarray table, lengths
    if not (are_plain(is_causal, scale, return_lse, window, softcap, alibi_slopes, sinks, attn_bias,
                      key_ranges)
            and is_bool(enable_gqa) and query_offset is None and out_dtype is None
            and (dtype is None or type(dtype) is str and dtype == "bfloat16")):
        return None
    # A copy, since another thread may write to the caller's lengths after they are checked.
    lengths = integers(key_lengths, 1, cnp.NPY_ARRAY_ENSURECOPY)
    table = integers(block_table, 2, 0)
    if (lengths is None or table is None
            or cnp.PyArray_DIMS(table)[0] != cnp.PyArray_DIMS(lengths)[0]):
        return None
    return attend(query, key_pages, value_pages, key_scales, value_scales, table, lengths, False,
                  attn_mask, is_causal, scale, enable_gqa, out, return_lse, num_threads,
                  dtype is not None)


def attend_cache(query, cnp.ndarray key, cnp.ndarray value, cnp.ndarray key_scales,
                 cnp.ndarray value_scales, cnp.ndarray table, cnp.ndarray lengths, attn_mask,
                 is_causal, scale, window, softcap, alibi_slopes, sinks, attn_bias, key_ranges, out,
                 return_lse, num_threads, out_dtype):
    """Return the answer of KVCache.attend, whose storage is given; None if stages have to look."""
    if not (are_plain(is_causal, scale, return_lse, window, softcap, alibi_slopes, sinks, attn_bias,
                      key_ranges)
            and out_dtype is None):
        return None
    return attend(query, key, value, key_scales, value_scales, table, lengths, True, attn_mask,
                  is_causal, scale, True, out, return_lse, num_threads, True)
