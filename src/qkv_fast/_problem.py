"""One normalisation: what the caller gave becomes a Problem, or an error that says what is wrong.

Every refusal of the library is raised here, before any work, whichever engine will compute.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from . import _threads
from ._arrays import as_array, integers, is_tensor, plain, shown
from ._dtypes import (
    ACCEPTED,
    BFLOAT16,
    BOOL,
    CODES_BY_NUM,
    FLOAT16,  # noqa: F401  for tests/test_tile_kernels.py
    FLOAT32,
    FLOAT64,
    INT8,
    SWAPPED,
    UINT16,
    Array,
    code_of,
    dtype_name,
    holds_integers,
    named,
    result_dtype,
    storage_code,
    uint16_hint,
    widened,
)

UNBOUNDED = 1 << 62  # of a window's side
_MAX_OFFSET = 1 << 61
_OVERLAP_WORK = 10_000  # candidates that the search for overlapping elements may look at


class Problem:
    """What an engine computes: arrays of one layout, and plain numbers.

    Attributes
    ----------
    query, key, value : ndarray
        (*batch, Hq, Lq, D), (*batch, Hkv, Lk, D), (*batch, Hkv, Lk, Dv); any strides, 0 where an
        axis was broadcast.
    kv_len : int
        Lk: keys that a batch entry has at most.
    query_starts, key_starts : ndarray of int64, (*batch,) or None
        Packed sequences: a batch entry's queries (and rows of out and lse) are those from its start
        on, `query_lengths` many; its keys those from its start on, `key_lengths` many.
    query_lengths : ndarray of int64, (*batch,) or None
        None: Lq each.
    block_table : ndarray of int64, (batch, blocks), or None
        Keys in pages: key and value are (pages, Hkv, page_size, ...), and key j of a batch entry is
        row j % page_size of page ``block_table[entry, j // page_size]``. Entries that no query of
        the batch entry can see may hold anything.
    key_scales, value_scales : ndarray of float32, or None
        Of the shape of key and value without the last axis: factors of int8 rows.
    attn_mask : ndarray or None
        (*batch, Hq, Lq, Lk), boolean or floating. bfloat16 may be anywhere as uint16.
    out, lse : ndarray
        (*batch, Hq, Lq, Dv) and (*batch, Hq, Lq): where the answer goes; lse may be None.
    query_code, key_code, value_code, mask_code, out_code : int
        Element types; mask_code is -1 without a mask.
    code : int
        The element type that is computed with: that of all tensors, else float64 where one is,
        else float32.
    scale, softcap : float
        softcap is 0.0 for none.
    left, right : int
        Keys position - left to position + right are visible; UNBOUNDED for no bound.
    query_offset, key_lengths : ndarray of int64, (*batch), or None
    alibi_slopes : ndarray of float64, (*batch, Hq), or None
    sinks : ndarray of float64, (Hq,), or None
    num_threads : int
    result, lse_result : ndarray, or for result also the tensor that was given as `out`
        What the caller gets: the memory of out and lse, in the layout of the caller's query.
    temporary, target : ndarray or None
        When the engine can't write to the memory of `result`: what it writes to instead, and
        that memory, to which it is copied in the end.
    """

    __slots__ = (
        "alibi_slopes",
        "attn_mask",
        "block_table",
        "code",
        "key",
        "key_code",
        "key_lengths",
        "key_scales",
        "key_starts",
        "kv_len",
        "left",
        "lse",
        "lse_result",
        "mask_code",
        "num_threads",
        "out",
        "out_code",
        "query",
        "query_code",
        "query_lengths",
        "query_offset",
        "query_starts",
        "result",
        "right",
        "scale",
        "sinks",
        "softcap",
        "target",
        "temporary",
        "value",
        "value_code",
        "value_scales",
    )

    alibi_slopes: Array | None
    attn_mask: Array | None
    block_table: Array | None
    code: int
    key: Array
    key_code: int
    key_lengths: Array | None
    key_scales: Array | None
    key_starts: Array | None
    kv_len: int
    left: int
    lse: Array | None
    lse_result: Array | None
    mask_code: int
    num_threads: int
    out: Array
    out_code: int
    query: Array
    query_code: int
    query_lengths: Array | None
    query_offset: Array | None
    query_starts: Array | None
    result: Any
    right: int
    scale: float
    sinks: Array | None
    softcap: float
    target: Array | None
    temporary: Array | None
    value: Array
    value_code: int
    value_scales: Array | None

    def __init__(self) -> None:
        self.query_starts = self.key_starts = self.query_lengths = self.block_table = None
        self.key_scales = self.value_scales = self.attn_mask = None
        self.mask_code = -1


def normalize(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
    query_offset: Any,
    window: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    key_lengths: Any,
    out: Any,
    return_lse: Any,
    num_threads: Any,
    dtype: Any,
) -> Problem:
    """Check everything, in the order of the facade's parameters, and lay it out for an engine."""
    if type(query) is not np.ndarray:
        query = as_array("query", query)
    if type(key) is not np.ndarray:
        key = as_array("key", key)
    if type(value) is not np.ndarray:
        value = as_array("value", value)

    p = Problem()
    raw = dtype is not None
    dtype_out = query.dtype
    if not raw:
        code = CODES_BY_NUM.get(dtype_out.num, -1)
    else:
        known = type(dtype) is str and dtype == "bfloat16" and dtype_out is UINT16
        code = BFLOAT16 if known else -1
    p.query_code = p.key_code = p.value_code = p.out_code = p.code = code
    if (code < 0 or key.dtype is not dtype_out or value.dtype is not dtype_out
            or not dtype_out.isnative):  # fmt: skip
        _set_codes(p, query, key, value, dtype)
        dtype_out = result_dtype(dtype_out)

    axes = query.ndim
    batch = query.shape[:-3]
    if not (axes == key.ndim == value.ndim and axes > 2
            and batch == key.shape[:-3] and batch == value.shape[:-3]):  # fmt: skip
        query, key, value, batch, axes = _broadcast(query, key, value)
    num_heads, q_len, head_dim = query.shape[-3:]
    kv_len = key.shape[-2]
    v_dim = _check_sizes(query, key, value, enable_gqa)
    p.query, p.key, p.value = query, key, value
    p.kv_len = kv_len
    heads_shape = (*batch, num_heads)
    if attn_mask is not None:
        _set_mask(p, attn_mask, (*heads_shape, q_len, kv_len), raw)
    if (type(dropout_p) is not float or dropout_p) and _number("dropout_p", dropout_p) != 0.0:
        raise ValueError(
            f"dropout_p is {dropout_p!r}: it must be 0.0, since this op is for inference"
        )
    _set_modifiers(p, heads_shape, head_dim, is_causal, scale, query_offset, window, softcap,
                   alibi_slopes, sinks)  # fmt: skip
    p.key_lengths = None
    if key_lengths is not None:
        p.key_lengths = _per_batch("key_lengths", key_lengths, batch, 0, kv_len)
    p.num_threads = (
        _threads.get_num_threads() if num_threads is None else _threads.checked(num_threads)
    )
    wants_lse = return_lse is not False and _flag("return_lse", return_lse)
    shape = (*heads_shape, q_len, v_dim)
    if axes > 2:
        _set_output(p, query, out, shape, dtype_out, raw)
    else:
        _set_output(p, query[0], out, shape[1:], dtype_out, raw)
        p.out = p.out[np.newaxis]
    p.lse = p.lse_result = None
    if wants_lse:
        p.lse = np.empty((*heads_shape, q_len), _lse_dtype(p))
        p.lse_result = p.lse if axes > 2 else p.lse[0]
    return p


def normalize_varlen(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
    query_offset: Any,
    window: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    key_lengths: Any,
    out: Any,
    return_lse: Any,
    num_threads: Any,
    dtype: Any,
) -> Problem:
    """Packed sequences: each becomes a batch entry, whose axis has stride 0 in all tensors."""
    query, key, value = as_array("query", query), as_array("key", key), as_array("value", value)
    p = Problem()
    _set_codes(p, query, key, value, dtype)
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 3:
            raise ValueError(
                f"{name} has shape {array.shape}: it must be (total, heads, head size)"
            )
    total_q, num_heads, head_dim = query.shape
    q, k, v = (x.transpose(1, 0, 2) for x in (query, key, value))
    v_dim = _check_sizes(q, k, v, enable_gqa)
    starts_q = _starts("cu_seqlens_q", cu_seqlens_q, "query", total_q)
    starts_k = starts_q
    if cu_seqlens_k is not None:
        starts_k = _starts("cu_seqlens_k", cu_seqlens_k, "key", key.shape[0])
    elif key.shape[0] != total_q:
        raise ValueError(
            f"key has length {key.shape[0]} on axis 0, but query has {total_q}: without "
            "cu_seqlens_k both must hold the same tokens"
        )
    if len(starts_k) != len(starts_q):
        raise ValueError(
            f"cu_seqlens_q has length {len(starts_q)}, but cu_seqlens_k has {len(starts_k)}: both "
            "must hold the same number of sequences, and one more"
        )
    batch = (len(starts_q) - 1,)
    p.query, p.key, p.value = (np.broadcast_to(x, (*batch, *x.shape)) for x in (q, k, v))
    p.query_starts, p.key_starts = starts_q[:-1], starts_k[:-1]
    p.query_lengths, p.key_lengths = np.diff(starts_q), np.diff(starts_k)
    p.kv_len = int(p.key_lengths.max(initial=0))
    if query_offset is None:
        query_offset = p.key_lengths - p.query_lengths
    _set_modifiers(p, (*batch, num_heads), head_dim, is_causal, scale, query_offset, window,
                   softcap, alibi_slopes, sinks)  # fmt: skip
    if key_lengths is not None:
        lengths = _per_batch("key_lengths", key_lengths, batch, 0, p.kv_len)
        if (lengths > p.key_lengths).any():
            i = int(np.argmax(lengths > p.key_lengths))
            raise ValueError(
                f"key_lengths holds {lengths[i]} for sequence {i}, which has {p.key_lengths[i]} "
                "keys"
            )
        p.key_lengths = lengths
    p.num_threads = (
        _threads.get_num_threads() if num_threads is None else _threads.checked(num_threads)
    )
    wants_lse = _flag("return_lse", return_lse)
    dtype_out = result_dtype(query.dtype)
    _set_output(p, query, out, (total_q, num_heads, v_dim), dtype_out, dtype is not None)
    p.out = _repeat(p.out.transpose(1, 0, 2), *batch)
    p.lse = p.lse_result = None
    if wants_lse:
        p.lse_result = np.empty((total_q, num_heads), _lse_dtype(p))
        p.lse = _repeat(p.lse_result.T, *batch)
    return p


def normalize_paged(
    query: Any,
    key_pages: Any,
    value_pages: Any,
    block_table: Any,
    key_lengths: Any,
    attn_mask: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
    query_offset: Any,
    window: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    key_scales: Any,
    value_scales: Any,
    out: Any,
    return_lse: Any,
    num_threads: Any,
    dtype: Any,
) -> Problem:
    """Keys and values in pages, of any element type that a cache may have."""
    p = Problem()
    raw = wants_bits(dtype)
    key, value = as_array("key_pages", key_pages), as_array("value_pages", value_pages)
    p.key_code, p.key_scales = _page_code("key", key, key_scales, raw)
    p.value_code, p.value_scales = _page_code("value", value, value_scales, raw)
    for name, array in (("key_pages", key), ("value_pages", value)):
        if array.ndim != 4:
            raise ValueError(
                f"{name} has shape {array.shape}: it must be (pages, Hkv, page_size, head size)"
            )
    if len(value) != len(key):
        raise ValueError(
            f"value_pages has {len(value)} pages, but key_pages has {len(key)}: both must have the "
            "same"
        )
    if key.shape[2] == 0:
        raise ValueError("key_pages has length 0 on axis -2: a page must hold at least one key")
    p.key, p.value = key, value
    query = _check_paged_query(query)
    table = plain("block_table", block_table)
    if not holds_integers(table) or table.ndim != 2 or len(table) != len(query):
        raise ValueError(
            f"block_table is an array of {named(table.dtype)} of shape {table.shape}: integers of "
            f"shape (batch, blocks) = ({len(query)}, ...) are needed"
        )
    p.block_table = np.require(table, np.int64, ("C", "ALIGNED"))
    room = table.shape[1] * key.shape[2]
    p.key_lengths = _per_batch("key_lengths", key_lengths, query.shape[:1], 0, room)
    p.kv_len = int(p.key_lengths.max(initial=0))
    _set_paged_query(p, query, attn_mask, is_causal, scale, enable_gqa, query_offset, window,
                     softcap, alibi_slopes, sinks, out, return_lse, num_threads, raw)  # fmt: skip
    _check_table(p)
    return p


def normalize_cached(
    query: Any,
    key: Array,
    value: Array,
    code: int,
    key_scales: Array | None,
    value_scales: Array | None,
    block_table: Array | None,
    lengths: Array,
    attn_mask: Any,
    is_causal: Any,
    scale: Any,
    window: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    out: Any,
    return_lse: Any,
    num_threads: Any,
) -> Problem:
    """Keys as a KVCache has them, checked when they came in; `code` is that of both arrays.

    No block_table: sequence i is key[i], value[i].
    A model calls this for each layer and token, with CPU caches that the last keys have swept: each
    line of memory that it leaves alone counts.
    """
    p = Problem()
    p.key, p.value, p.key_code, p.value_code = key, value, code, code
    p.key_scales, p.value_scales = key_scales, value_scales
    p.block_table, p.key_lengths = block_table, lengths
    p.kv_len = max(lengths.tolist(), default=0)
    query = _check_paged_query(query)
    if len(query) != len(lengths):
        raise ValueError(
            f"query has shape {query.shape}: its first axis stands for {len(lengths)} sequences"
        )
    _set_paged_query(p, query, attn_mask, is_causal, scale, True, None, window, softcap,
                     alibi_slopes, sinks, out, return_lse, num_threads, True)  # fmt: skip
    return p


def _check_paged_query(given: Any) -> Array:
    query = given if type(given) is np.ndarray else as_array("query", given)
    if query.ndim != 4:
        raise ValueError(f"query has shape {query.shape}: it must be (batch, Hq, Lq, D)")
    return query


def _set_paged_query(
    p: Problem,
    query: Array,
    attn_mask: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
    query_offset: Any,
    window: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    out: Any,
    return_lse: Any,
    num_threads: Any,
    raw: bool,
) -> None:
    """Set all but keys and values, which `p` has."""
    dtype = query.dtype
    p.query_code = code_of(dtype, raw)
    p.out_code = out_code = p.query_code & ~SWAPPED
    if p.query_code < 0:
        raise TypeError(
            f"query has dtype {named(dtype)}: it must be one of {ACCEPTED}{uint16_hint(dtype)}"
        )
    key_code, value_code = p.key_code & ~SWAPPED, p.value_code & ~SWAPPED
    p.code = FLOAT64 if FLOAT64 in (out_code, key_code, value_code) else FLOAT32
    if out_code == key_code == value_code:
        p.code = out_code
    p.query = query
    num_batch, num_heads, q_len, head_dim = query.shape
    v_dim = _check_sizes(query, p.key, p.value, enable_gqa)
    heads_shape = (num_batch, num_heads)
    if attn_mask is not None:
        _set_mask(p, attn_mask, (*heads_shape, q_len, p.kv_len), raw)
    _set_modifiers(p, heads_shape, head_dim, is_causal, scale, query_offset, window, softcap,
                   alibi_slopes, sinks)  # fmt: skip
    # Not in vain: it costs a third of what all the rest of KVCache.attend does in Python.
    positions_matter = p.left < UNBOUNDED or p.right < UNBOUNDED or alibi_slopes is not None
    if query_offset is None and positions_matter:
        assert p.key_lengths is not None
        p.query_offset = p.key_lengths - q_len
    p.num_threads = (
        _threads.get_num_threads() if num_threads is None else _threads.checked(num_threads)
    )
    wants_lse = return_lse is not False and _flag("return_lse", return_lse)
    dtype_out = dtype if p.query_code == out_code != BFLOAT16 else result_dtype(dtype)
    _set_output(p, query, out, (*heads_shape, q_len, v_dim), dtype_out, raw)
    p.lse = p.lse_result = None
    if wants_lse:
        p.lse = p.lse_result = np.empty((*heads_shape, q_len), _lse_dtype(p))


def _set_modifiers(
    p: Problem,
    heads_shape: tuple[int, ...],
    head_dim: int,
    is_causal: Any,
    scale: Any,
    query_offset: Any,
    window: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
) -> None:
    """Set what scores and visibility depend on besides the tensors and the mask."""
    p.left = p.right = UNBOUNDED
    if is_causal is not False and _flag("is_causal", is_causal):
        p.right = 0
    p.scale = 1.0 / math.sqrt(head_dim) if scale is None else _number("scale", scale)
    p.query_offset = None
    if query_offset is not None and not (type(query_offset) is int and query_offset == 0):
        p.query_offset = _per_batch(
            "query_offset", query_offset, heads_shape[:-1], -_MAX_OFFSET, _MAX_OFFSET
        )
    if window is not None:
        _set_window(p, window)
    p.softcap = 0.0
    if softcap is not None:
        p.softcap = _number("softcap", softcap)
        if not 0.0 < p.softcap < math.inf:
            raise ValueError(
                f"softcap is {softcap!r}: it must be positive and finite, or None for no cap"
            )
    p.alibi_slopes = None
    if alibi_slopes is not None:
        slopes = _reals("alibi_slopes", alibi_slopes)
        p.alibi_slopes = _broadcast_to("alibi_slopes", slopes, heads_shape, "(*batch, Hq)")
    p.sinks = None
    if sinks is not None:
        p.sinks = _reals("sinks", sinks)
        if p.sinks.shape != heads_shape[-1:]:
            raise ValueError(
                f"sinks has shape {p.sinks.shape}: one logit for each of {heads_shape[-1]} query "
                f"heads is needed, ({heads_shape[-1]},)"
            )


def _starts(name: str, given: Any, tensor: str, total: int) -> Array:
    """Return cumulative lengths as int64: from 0 to `total`, never falling."""
    what = "ints of shape (sequences + 1,)"
    rule = f"it must rise from 0 to the length of {tensor} on axis 0, {total}"
    starts = integers(name, given, what, 0, total, rule)
    if starts.ndim != 1 or not len(starts):
        raise TypeError(f"{name} must be {what}, not of shape {starts.shape}")
    falls = np.flatnonzero(starts[1:] < starts[:-1])  # differences might wrap
    if starts[0] != 0 or starts[-1] != total or falls.size:
        way = f", but falls from {starts[falls[0]]} to {starts[falls[0] + 1]}" if falls.size else ""
        raise ValueError(f"{name} goes from {starts[0]} to {starts[-1]}{way}: {rule}")
    return starts


def _page_code(name: str, pages: Array, scales: Any, raw: bool) -> tuple[int, Array | None]:
    """Return the code of pages and their scales, which go with int8 alone."""
    code = storage_code(pages.dtype, raw)
    if code < 0:
        raise TypeError(
            f"{name}_pages has dtype {named(pages.dtype)}: it must be {ACCEPTED} or int8"
            f"{uint16_hint(pages.dtype)}"
        )
    if (code == INT8) != (scales is not None):
        raise TypeError(
            f"{name}_pages has dtype {named(pages.dtype)} and {name}_scales is "
            f"{'None' if scales is None else 'given'}: int8 has scales, and nothing else has"
        )
    if scales is None:
        return code, None
    array = as_array(f"{name}_scales", scales)
    if array.dtype != np.float32 or not array.dtype.isnative or array.shape != pages.shape[:-1]:
        raise ValueError(
            f"{name}_scales is an array of {named(array.dtype)} of shape {array.shape}: float32 of "
            f"shape {pages.shape[:-1]} is needed, a factor for each row"
        )
    return code, array


def _check_table(p: Problem) -> None:
    """Raise when a page that some query can see is none."""
    table, lengths = p.block_table, p.key_lengths
    assert table is not None
    assert lengths is not None
    num_pages, page_size, q_len = len(p.key), p.key.shape[2], p.query.shape[2]
    if table.size == 0 or (table.min() >= 0 and table.max() < num_pages):
        return
    begin = np.arange(table.shape[1], dtype=np.int64) * page_size
    offset = np.zeros_like(lengths) if p.query_offset is None else p.query_offset
    seen = begin < lengths[:, np.newaxis]
    if p.left < UNBOUNDED:
        seen &= begin + page_size > (offset - p.left)[:, np.newaxis]
    if p.right < UNBOUNDED:
        seen &= begin <= (offset + (q_len - 1 + p.right))[:, np.newaxis]
    wrong = seen & ((table < 0) | (table >= num_pages))
    if wrong.any():
        i, j = np.argwhere(wrong)[0]
        raise ValueError(
            f"block_table[{i}, {j}] is {table[i, j]}: it must be a page, from 0 to {num_pages - 1}"
        )


def _repeat(array: Array, count: int) -> Array:
    """Return a writeable view with a first axis that shows the same memory `count` times."""
    return np.lib.stride_tricks.as_strided(
        array, (count, *array.shape), (0, *array.strides), writeable=True
    )


def _lse_dtype(p: Problem) -> type[np.floating[Any]]:
    return np.float64 if p.code == FLOAT64 else np.float32


def wants_bits(dtype: Any) -> bool:
    """Whether an argument `dtype` says that uint16 holds bfloat16."""
    if dtype is None:
        return False
    if dtype_name(dtype) != "bfloat16":
        raise ValueError(
            f"dtype is {shown(dtype)}: it must be 'bfloat16', where uint16 arrays hold that, or "
            "None"
        )
    return True


def _set_codes(p: Problem, query: Array, key: Array, value: Array, dtype: Any) -> None:
    raw = wants_bits(dtype)
    p.query_code, p.key_code, p.value_code = codes = (
        code_of(query.dtype, raw),
        code_of(key.dtype, raw),
        code_of(value.dtype, raw),
    )
    p.out_code = p.code = codes[0] & ~SWAPPED
    if raw and any(code & ~SWAPPED != BFLOAT16 for code in codes):
        raise TypeError(
            f"{_three_dtypes(query, key, value)}: with dtype='bfloat16' all three must be uint16 "
            "arrays of its bit patterns, or bfloat16"
        )
    if min(codes) < 0 or any(code & ~SWAPPED != p.out_code for code in codes):
        raise TypeError(
            f"{_three_dtypes(query, key, value)}: all three must have the same one of {ACCEPTED}"
            f"{uint16_hint(query.dtype, key.dtype, value.dtype)}"
        )


def _three_dtypes(*tensors: Array) -> str:
    query, key, value = (named(tensor.dtype) for tensor in tensors)
    return f"query, key and value have dtypes {query}, {key} and {value}"


def _broadcast(
    query: Array, key: Array, value: Array
) -> tuple[Array, Array, Array, tuple[int, ...], int]:
    """Give all three a head axis and the same batch axes; also return the result's axes."""
    given = {"query": query, "key": key, "value": value}
    for name, array in given.items():
        if array.ndim < 2:
            raise ValueError(
                f"{name} has shape {array.shape}: at least two axes are needed, "
                "(..., heads, length, head size) or (length, head size)"
            )
    axes = max(array.ndim for array in given.values())
    query, key, value = (a if a.ndim > 2 else a[np.newaxis] for a in given.values())
    try:
        batch = np.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except ValueError:
        raise ValueError(
            f"query, key and value have batch axes {query.shape[:-3]}, {key.shape[:-3]} and "
            f"{value.shape[:-3]}: they must broadcast"
        ) from None
    query, key, value = (
        np.broadcast_to(a, (*batch, *a.shape[-3:])) for a in (query, key, value)
    )  # fmt: skip
    return query, key, value, batch, axes


def _check_sizes(query: Array, key: Array, value: Array, enable_gqa: Any) -> int:
    """Raise when heads, lengths or head sizes don't fit; return the values' head size."""
    num_heads, head_dim = query.shape[-3], query.shape[-1]
    num_kv_heads, kv_len, key_dim = key.shape[-3:]
    v_dim: int
    value_heads, value_len, v_dim = value.shape[-3:]
    if key_dim != head_dim or head_dim == 0 or value_len != kv_len or value_heads != num_kv_heads:
        _refuse_sizes(query, key, value)
    if enable_gqa is not False:
        enable_gqa = _flag("enable_gqa", enable_gqa)
    if num_heads != num_kv_heads:
        _check_groups(num_heads, num_kv_heads, enable_gqa)
    return v_dim


def _refuse_sizes(query: Array, key: Array, value: Array) -> None:
    if query.shape[-1] == 0:
        raise ValueError("query has length 0 on axis -1: the head size must be at least 1")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key has length {key.shape[-1]} on axis -1, but query has {query.shape[-1]}: both "
            "must have the same head size"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"value has length {value.shape[-2]} on axis -2, but key has {key.shape[-2]}: both "
            "must hold the same number of keys"
        )
    raise ValueError(
        f"value has length {value.shape[-3]} on axis -3, but key has {key.shape[-3]}: both must "
        "have the same number of heads"
    )


def _check_groups(num_heads: int, num_kv_heads: int, enable_gqa: Any) -> None:
    if not enable_gqa:
        raise ValueError(
            f"query has {num_heads} heads, but key and value have {num_kv_heads}: they must be "
            "equal, or enable_gqa=True lets groups of query heads share a key head"
        )
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"query has {num_heads} heads, but key and value have {num_kv_heads}: with enable_gqa "
            "the first must be a multiple of the second"
        )


def _set_mask(p: Problem, given: Any, shape: tuple[int, ...], raw: bool) -> None:
    mask = given if type(given) is np.ndarray else as_array("attn_mask", given)
    p.mask_code = BOOL if mask.dtype == np.bool_ else code_of(mask.dtype, raw)
    if p.mask_code < 0:
        raise TypeError(
            f"attn_mask has dtype {mask.dtype}: it must be bool (True = may attend) or {ACCEPTED} "
            f"(added to the scores){uint16_hint(mask.dtype)}"
        )
    cure = ""
    if len(shape) == 4 and mask.shape == (shape[0], shape[-1]):
        cure = "; pass a padding mask of shape (batch, Lk) as mask[:, None, None]"
    p.attn_mask = _broadcast_to("attn_mask", mask, shape, "(*batch, Hq, Lq, Lk)", cure)


def _broadcast_to(
    name: str, array: Array, shape: tuple[int, ...], meaning: str, cure: str = ""
) -> Array:
    if array.shape == shape:
        return array
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"{name} has shape {array.shape}: it must broadcast to {meaning} = {shape}{cure}"
        ) from None


def _flag(name: str, given: Any) -> bool:
    if not isinstance(given, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, not {type(given).__name__}")
    return bool(given)


def _number(name: str, given: Any) -> float:
    try:
        if isinstance(given, str | bytes | bytearray):
            raise TypeError
        return float(given)
    except OverflowError:
        raise ValueError(
            f"{name} is {shown(given)}: it must not exceed the largest float64, 1.8e308"
        ) from None
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number, not {type(given).__name__}") from None


def _reals(name: str, given: Any) -> Array:
    """Return a float64 array of the real numbers that were given, as an array or in lists."""
    array = plain(name, given)
    if code_of(array.dtype) & ~SWAPPED == BFLOAT16:
        array = widened(array)
    elif array.dtype.kind not in "fiu":
        raise TypeError(f"{name} has dtype {array.dtype}: real numbers are needed")
    return array.astype(np.float64, order="C")


def _per_batch(name: str, given: Any, batch: tuple[int, ...], least: int, most: int) -> Array:
    """Return an int64 array of shape `batch`, its elements between least and most."""
    array = integers(
        name,
        given,
        "an int, or ints for each batch entry",
        least,
        most,
        f"it must be between {least} and {most}",
    )
    return _broadcast_to(name, array, batch, "the batch axes")


def _set_window(p: Problem, window: Any) -> None:
    p.left, right = window_sides(window)
    p.right = min(p.right, right)


def window_sides(window: Any) -> tuple[int, int]:
    """Return both sides of a window; UNBOUNDED for none, or for one that is as wide."""
    try:
        left, right = window
    except (TypeError, ValueError):
        raise TypeError(
            f"window is {shown(window)}: it must be a pair (left, right) of ints or None"
        ) from None
    return _window_side("left", left), _window_side("right", right)


def _window_side(name: str, given: Any) -> int:
    if given is None:
        return UNBOUNDED
    try:
        side = operator.index(given)
    except TypeError:
        raise TypeError(
            f"window's {name} side is {shown(given)}: it must be an int or None"
        ) from None
    if side < 0:
        raise ValueError(
            f"window's {name} side is {shown(side)}: it must be at least 0, or None for no bound "
            "(which flash-attn writes as -1)"
        )
    return min(side, UNBOUNDED)


def _set_output(
    p: Problem,
    query: Array,
    out: Any,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    raw: bool,
) -> None:
    """Choose where the engine writes and what the caller gets; all of `shape`, as is `p.out`."""
    p.temporary = p.target = None
    if out is None:
        if query.flags.c_contiguous or query.ndim != len(shape) or _repeats(query):
            p.out = np.empty(shape, dtype)
        else:
            p.out = np.empty_like(query, dtype=dtype, shape=shape)
        p.result = p.out
        return
    p.result = out
    if type(out) is not np.ndarray:
        known = is_tensor(out) or isinstance(out, np.ndarray)
        if not known or isinstance(out, np.ma.MaskedArray):
            raise TypeError(f"out must be a NumPy array or a tensor, not {type(out).__name__}")
        out = as_array("out", out, in_place=True)
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}: the result's shape is {shape}")
    if code_of(out.dtype, raw or dtype is UINT16) & ~SWAPPED != p.out_code:
        wanted = "bfloat16, or uint16 for its bit patterns" if dtype is UINT16 else dtype
        raise TypeError(f"out has dtype {named(out.dtype)}: the result's dtype is {wanted}")
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    p.out = out
    inputs = (p.key, p.value, p.attn_mask, p.alibi_slopes, p.sinks, p.query_offset,
              p.key_lengths, p.key_scales, p.value_scales, p.block_table, p.query_starts,
              p.query_lengths, p.key_starts)  # fmt: skip
    if (
        not out.dtype.isnative
        or (not out.flags.c_contiguous and (_repeats(out) or (out.size and _overlaps_itself(out))))
        or (not _same_memory(out, query) and _in_the_way(out, query))
        or any([a is not None and _in_the_way(out, a) for a in inputs])
    ):
        p.target = out  # of out's dtype: uint16 and bfloat16 differ for NumPy
        p.out = p.temporary = np.empty(shape, out.dtype.newbyteorder("="))


def _repeats(array: Array) -> bool:
    """Whether some axis shows the same memory more than once."""
    return any(s == 0 and n > 1 for s, n in zip(array.strides, array.shape, strict=True))


def _overlaps_itself(array: Array) -> bool:
    """Whether elements may overlap; contiguous memory in some order of the axes never does."""
    if array.flags.c_contiguous or array.flags.f_contiguous:
        return False
    reach = array.itemsize
    for stride, length in sorted((abs(s), n) for s, n in zip(array.strides, array.shape,
                                                             strict=True) if n > 1):  # fmt: skip
        if stride < reach:
            return True
        reach = stride * (length - 1) + reach
    return False


def _same_memory(a: Array, b: Array) -> bool:
    return (
        a.shape == b.shape
        and a.strides == b.strides
        and a.ctypes.data == b.ctypes.data
        and a.dtype == b.dtype
    )


def _in_the_way(out: Array, array: Array) -> bool:
    """Whether writing `out` may change what is still to be read of an input.

    A task reads all its queries before it writes their rows, so `out` may be the query itself.
    """
    if not np.may_share_memory(out, array):
        return False
    try:
        return bool(np.shares_memory(out, array, max_work=_OVERLAP_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
