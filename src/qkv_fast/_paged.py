"""paged_attention: keys and values spread over pages."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from . import _dispatch
from ._dispatch import notify_call_start, solve
from ._dtypes import Array
from ._options import Ints, KeyRanges, PagedOptions, Progress, Window
from ._problem.output import output, watch
from ._problem.problem import Problem
from ._problem.scoring import mask, scoring
from ._problem.tensors import check_pages, paged


@overload
def paged_attention(
    query: Any,
    key_pages: Any,
    value_pages: Any,
    block_table: Any,
    key_lengths: Ints,
    attn_mask: Any = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[PagedOptions],
) -> Array: ...


@overload
def paged_attention(
    query: Any,
    key_pages: Any,
    value_pages: Any,
    block_table: Any,
    key_lengths: Ints,
    attn_mask: Any = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_lse: Literal[True],
    **options: Unpack[PagedOptions],
) -> tuple[Array, Array]: ...


@overload
def paged_attention(
    query: Any,
    key_pages: Any,
    value_pages: Any,
    block_table: Any,
    key_lengths: Ints,
    attn_mask: Any = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_lse: bool = ...,
    **options: Unpack[PagedOptions],
) -> Array | tuple[Array, Array]: ...


def paged_attention(
    query: Any,
    key_pages: Any,
    value_pages: Any,
    block_table: Any,
    key_lengths: Ints,
    attn_mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = True,
    *,
    query_offset: Ints | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    attn_bias: Any = None,
    key_ranges: KeyRanges | None = None,
    key_scales: Any = None,
    value_scales: Any = None,
    out: Any = None,
    return_lse: bool = False,
    num_threads: int | None = None,
    dtype: Any = None,
    out_dtype: Any = None,
    progress: Progress | None = None,
) -> Array | tuple[Array, Array]:
    r"""Compute attention where each sequence's keys and values are spread over pages.

    Parameters
    ----------
    query : array, shape (batch, Hq, Lq, D)
        float32, float64, float16 or bfloat16. Any of the arrays may be a CPU tensor of torch, as
        in `scaled_dot_product_attention`.
    key_pages : array, shape (pages, Hkv, page_size, D)
        Any of these dtypes, whatever query's is, or int8. With any strides: for storage of shape
        (pages, page_size, Hkv, D) pass ``storage.swapaxes(1, 2)``.
    value_pages : array, shape (pages, Hkv, page_size, Dv)
        Likewise.
    block_table : array of int, shape (batch, blocks)
        Key j of sequence i is row ``j % page_size`` of page ``block_table[i, j // page_size]``.
        Sequences may share pages. Numbers of pages that no query can see are not looked at.
    key_lengths : int or ints, shape broadcastable to (batch,)
        Keys of each sequence, 0 to blocks * page_size.
    attn_mask : array, broadcastable to (batch, Hq, Lq, max(key_lengths)), optional
        Boolean: True where the query may attend to the key. Floating: added to the scores.
    attn_bias : array, broadcastable to (batch, Hq, Lq, max(key_lengths)), optional
        Floating: added to the scores, beside an `attn_mask`.
    is_causal, scale, window, softcap, alibi_slopes, sinks, key_ranges, return_lse, num_threads
        As in `scaled_dot_product_attention`, and so is `progress`.
    out_dtype : "float32", optional
        The result's type where query has 16 bits, as in `scaled_dot_product_attention`.
    enable_gqa : bool
        Allow Hq to be a multiple of Hkv, as it is by default here.
    query_offset : int or ints, shape broadcastable to (batch,), optional
        Position of a sequence's first query, where its first key is at 0. By default
        ``key_lengths - Lq``: the queries are its last tokens.
    key_scales, value_scales : array of float32, shape (pages, Hkv, page_size)
        With int8 pages, and only with them: an int8 row stands for itself times its scale.
    out : ndarray or tensor, shape (batch, Hq, Lq, Dv), optional
        Where the result goes, and what is returned. It may be `query` itself or overlap any input.
        A call that is interrupted (KeyboardInterrupt) leaves it undefined.
    dtype : "bfloat16", optional
        Take uint16 arrays as the bit patterns of bfloat16, and return the result as one if query
        is.

    Returns
    -------
    result : ndarray, shape (batch, Hq, Lq, Dv)
        `out`, or a new array of query's dtype, or of `out_dtype`, in native byte order; for a
        bfloat16 tensor, its bit patterns in uint16.
    lse : ndarray, shape (batch, Hq, Lq)
        With `return_lse`: natural log-sum-exp; float32, or float64 where any input is.

    Raises
    ------
    TypeError
        A dtype that is none of these, or an argument of the wrong kind.
    ValueError
        Shapes, lengths or pages that don't fit, an argument out of range, a read-only `out`.
        Nothing is written then.

    Notes
    -----
    Sums are in float32, in float64 where any input is. A sequence's result depends on its own
    tokens and the page size, not on which pages they are in. Pages are those of Kwon et
    al., *Efficient Memory Management for Large Language Model Serving with PagedAttention* (2023).

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> key, value = rng.standard_normal((2, 5, 2, 4, 8))  # 5 pages, 2 heads, 4 tokens, head size 8
    >>> query = rng.standard_normal((2, 6, 1, 8))  # 2 sequences, 6 query heads, 1 new token
    >>> out = qkv_fast.paged_attention(query, key, value, [[3, 0], [4, -1]], [7, 2])
    >>> keys, values = (x[[3, 0]].swapaxes(0, 1).reshape(2, 8, 8)[:, :7] for x in (key, value))
    >>> dense = qkv_fast.scaled_dot_product_attention(query[0], keys, values, enable_gqa=True)
    >>> bool(np.allclose(out[0], dense))
    True
    """
    if progress is None:
        answer: Array | tuple[Array, Array] | None = _dispatch.shortcuts.attend_pages(
            query, key_pages, value_pages, block_table, key_lengths, attn_mask, is_causal, scale,
            enable_gqa, query_offset, window, softcap, alibi_slopes, sinks, attn_bias, key_ranges,
            key_scales, value_scales, out, return_lse, num_threads, dtype, out_dtype)  # fmt: skip
        if answer is not None:
            return answer
    notify_call_start()
    p = Problem()
    paged(p, query, key_pages, value_pages, block_table, key_lengths, key_scales, value_scales,
          enable_gqa, dtype)  # fmt: skip
    if attn_mask is not None:
        mask(p, attn_mask)
    scoring(p, is_causal, scale, query_offset, window, softcap, alibi_slopes, sinks, attn_bias,
            key_ranges)  # fmt: skip
    output(p, out, return_lse, num_threads, out_dtype)
    if progress is not None:
        watch(p, progress)
    check_pages(p)
    return solve(p)
