"""The tensors of a call: dense, packed, in pages or of a cache, as one layout for the engines."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._dtypes import (
    ACCEPTED,
    BFLOAT16,
    CODES_BY_NUM,
    FLOAT32,
    FLOAT64,
    INT8,
    SWAPPED,
    UINT16,
    Array,
    code_of,
    holds_integers,
    named,
    storage_code,
    uint16_hint,
)
from .arguments import as_array, cumulative, flag, per_batch, plain, wants_bf16_bits
from .problem import UNBOUNDED, Problem


def dense(p: Problem, query: Any, key: Any, value: Any, enable_gqa: Any, dtype: Any) -> None:
    """Set tensors (*batch, heads, length, head size) of one element type; two axes are one head."""
    if type(query) is not np.ndarray:
        query = as_array("query", query)
    if type(key) is not np.ndarray:
        key = as_array("key", key)
    if type(value) is not np.ndarray:
        value = as_array("value", value)
    given = query.dtype
    if dtype is None:
        code = CODES_BY_NUM.get(given.num, -1)
    else:
        p.uint16_is_bf16 = True
        known = type(dtype) is str and dtype == "bfloat16" and given is UINT16
        code = BFLOAT16 if known else -1
    if (code < 0 or key.dtype is not given or value.dtype is not given
            or not given.isnative):  # fmt: skip
        _set_codes(p, query, key, value, dtype)
    else:
        p.query_code = p.key_code = p.value_code = p.out_code = p.code = code
    batch, axes = query.shape[:-3], query.ndim
    if (axes == key.ndim == value.ndim and axes > 2
            and batch == key.shape[:-3] and batch == value.shape[:-3]):  # fmt: skip
        p.caller_query = query
    else:
        query, key, value, has_heads = _broadcast(query, key, value)
        p.caller_query = query if has_heads else query[0]
    _check_sizes(query, key, value, enable_gqa)
    p.query, p.key, p.value = query, key, value
    p.kv_len = key.shape[-2]


def without_values(p: Problem, query: Any, key: Any, enable_gqa: Any, dtype: Any) -> None:
    """Set tensors as `dense` does, with values of size 0."""
    query, key = as_array("query", query), as_array("key", key)
    dense(p, query, key, key[..., :0] if key.ndim else key, enable_gqa, dtype)


def packed(
    p: Problem,
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    enable_gqa: Any,
    dtype: Any,
) -> None:
    """Set sequences packed one after another, (total, heads, head size).

    Each becomes a batch entry, and the batch axis has stride 0 in all tensors.
    """
    query, key, value = as_array("query", query), as_array("key", key), as_array("value", value)
    p.uint16_is_bf16 = dtype is not None
    _set_codes(p, query, key, value, dtype)
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 3:
            raise ValueError(
                f"{name} has shape {array.shape}: it must be (total, heads, head size)"
            )
    q, k, v = (x.transpose(1, 0, 2) for x in (query, key, value))
    _check_sizes(q, k, v, enable_gqa)
    starts_q = starts_k = cumulative("cu_seqlens_q", cu_seqlens_q, "query", len(query))
    if cu_seqlens_k is not None:
        starts_k = cumulative("cu_seqlens_k", cu_seqlens_k, "key", len(key))
    elif len(key) != len(query):
        raise ValueError(
            f"key has length {len(key)} on axis 0, but query has {len(query)}: without "
            "cu_seqlens_k both must hold the same tokens"
        )
    if len(starts_k) != len(starts_q):
        raise ValueError(
            f"cu_seqlens_q has length {len(starts_q)}, but cu_seqlens_k has {len(starts_k)}: both "
            "must hold the same number of sequences, and one more"
        )
    batch = len(starts_q) - 1
    p.caller_query = query
    p.query, p.key, p.value = (np.broadcast_to(x, (batch, *x.shape)) for x in (q, k, v))
    p.query_starts, p.key_starts = starts_q[:-1], starts_k[:-1]
    p.query_lengths, p.key_lengths = np.diff(starts_q), np.diff(starts_k)
    p.kv_len = int(p.key_lengths.max(initial=0))


def paged(
    p: Problem,
    query: Any,
    key_pages: Any,
    value_pages: Any,
    block_table: Any,
    key_lengths: Any,
    key_scales: Any,
    value_scales: Any,
    enable_gqa: Any,
    dtype: Any,
) -> None:
    """Set queries, and keys and values in pages, of any element type that a cache may have."""
    p.uint16_is_bf16 = wants_bf16_bits(dtype)
    key, value = as_array("key_pages", key_pages), as_array("value_pages", value_pages)
    p.key_code, p.key_scales = _page_code(p, "key", key, key_scales)
    p.value_code, p.value_scales = _page_code(p, "value", value, value_scales)
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
    _set_query(p, query)
    table = plain("block_table", block_table)
    if not holds_integers(table) or table.ndim != 2 or len(table) != len(p.query):
        raise ValueError(
            f"block_table is an array of {named(table.dtype)} of shape {table.shape}: integers of "
            f"shape (batch, blocks) = ({len(p.query)}, ...) are needed"
        )
    p.block_table = np.require(table, np.int64, ("C", "ALIGNED"))
    p.key_lengths = lengths = per_batch(
        "key_lengths", key_lengths, p.query.shape[:1], 0, table.shape[1] * key.shape[2]
    )
    p.kv_len = int(lengths.max(initial=0))
    _set_mixed_codes(p)
    _check_sizes(p.query, key, value, enable_gqa)


def cached(
    p: Problem,
    query: Any,
    key: Array,
    value: Array,
    code: int,
    key_scales: Array | None,
    value_scales: Array | None,
    block_table: Array | None,
    lengths: Array,
) -> None:
    """Set queries, and keys and values as a KVCache has them, checked when they came in.

    `code` is that of key and value. Without a block_table, sequence i has key[i] and value[i].
    A model calls this for each layer and token, and the last keys have swept everything else from
    the CPU's caches: each line of memory that it leaves alone saves time.
    """
    p.uint16_is_bf16 = True
    p.key, p.value, p.key_code, p.value_code = key, value, code, code
    if key_scales is not None:
        p.key_scales, p.value_scales = key_scales, value_scales
    if block_table is not None:
        p.block_table = block_table
    p.key_lengths = lengths
    p.kv_len = max(lengths.tolist(), default=0)
    _set_query(p, query)
    if len(p.query) != len(lengths):
        raise ValueError(
            f"query has shape {p.query.shape}: its first axis stands for {len(lengths)} sequences"
        )
    _set_mixed_codes(p)
    _check_sizes(p.query, key, value, True)


def check_pages(p: Problem) -> None:
    """Raise if the block table sends some query that can see it to a page that does not exist."""
    table, lengths = p.block_table, p.key_lengths
    assert table is not None
    assert lengths is not None
    num_pages, page_size, q_len = len(p.key), p.key.shape[2], p.query.shape[2]
    if table.size == 0 or (table.min() >= 0 and table.max() < num_pages):
        return
    begin = np.arange(table.shape[1], dtype=np.int64) * page_size
    offset = np.zeros_like(lengths) if p.query_offset is None else p.query_offset
    visible = begin < lengths[:, np.newaxis]
    if p.left < UNBOUNDED:
        visible &= begin + page_size > (offset - p.left)[:, np.newaxis]
    if p.right < UNBOUNDED:
        visible &= begin <= (offset + (q_len - 1 + p.right))[:, np.newaxis]
    if p.key_begins is not None and p.key_ends is not None:
        some, axes = p.key_begins < p.key_ends, (1, 2)
        first = p.key_begins.min(axis=axes, where=some, initial=p.kv_len, keepdims=True)
        last = p.key_ends.max(axis=axes, where=some, initial=0, keepdims=True)
        visible &= (begin + page_size > first[:, 0]) & (begin < last[:, 0])
    wrong = visible & ((table < 0) | (table >= num_pages))
    if wrong.any():
        i, j = np.argwhere(wrong)[0]
        raise ValueError(
            f"block_table[{i}, {j}] is {table[i, j]}: it must be a page, from 0 to {num_pages - 1}"
        )


def _set_codes(p: Problem, query: Array, key: Array, value: Array, dtype: Any) -> None:
    """Set the element types of tensors that must all have the same."""
    uint16_is_bf16 = wants_bf16_bits(dtype)
    p.query_code, p.key_code, p.value_code = codes = (
        code_of(query.dtype, uint16_is_bf16),
        code_of(key.dtype, uint16_is_bf16),
        code_of(value.dtype, uint16_is_bf16),
    )
    p.out_code = p.code = codes[0] & ~SWAPPED
    if uint16_is_bf16 and any(code & ~SWAPPED != BFLOAT16 for code in codes):
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


def _set_query(p: Problem, given: Any) -> None:
    query = given if type(given) is np.ndarray else as_array("query", given)
    if query.ndim != 4:
        raise ValueError(f"query has shape {query.shape}: it must be (batch, Hq, Lq, D)")
    p.query = p.caller_query = query


def _set_mixed_codes(p: Problem) -> None:
    """Set the element types of a query and of what is computed with, whatever keys have."""
    dtype = p.query.dtype
    p.query_code = code_of(dtype, p.uint16_is_bf16)
    if p.query_code < 0:
        raise TypeError(
            f"query has dtype {named(dtype)}: it must be one of {ACCEPTED}{uint16_hint(dtype)}"
        )
    p.out_code = out_code = p.query_code & ~SWAPPED
    key_code, value_code = p.key_code & ~SWAPPED, p.value_code & ~SWAPPED
    if out_code == key_code == value_code:
        p.code = out_code
    else:
        p.code = FLOAT64 if FLOAT64 in (out_code, key_code, value_code) else FLOAT32


def _page_code(p: Problem, name: str, pages: Array, scales: Any) -> tuple[int, Array | None]:
    """Return the code of pages and their scales, which go with int8 alone."""
    code = storage_code(pages.dtype, p.uint16_is_bf16)
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


def _broadcast(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array, bool]:
    """Give all three a head axis and the same batch axes; also return whether one had heads."""
    given = {"query": query, "key": key, "value": value}
    for name, array in given.items():
        if array.ndim < 2:
            raise ValueError(
                f"{name} has shape {array.shape}: at least two axes are needed, "
                "(..., heads, length, head size) or (length, head size)"
            )
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
    return query, key, value, any(a.ndim > 2 for a in given.values())


def _check_sizes(query: Array, key: Array, value: Array, enable_gqa: Any) -> None:
    """Raise if heads, lengths or head sizes don't fit."""
    num_heads, head_dim = query.shape[-3], query.shape[-1]
    num_kv_heads, kv_len, key_dim = key.shape[-3:]
    value_heads, value_len, _ = value.shape[-3:]
    if key_dim != head_dim or head_dim == 0 or value_len != kv_len or value_heads != num_kv_heads:
        _refuse_sizes(query, key, value)
    if enable_gqa is not False:
        enable_gqa = flag("enable_gqa", enable_gqa)
    if num_heads != num_kv_heads:
        _check_groups(num_heads, num_kv_heads, enable_gqa)


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
