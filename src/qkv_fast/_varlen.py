"""varlen_attention: sequences of different lengths, packed one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

from ._dispatch import notify_call_start, solve
from ._dtypes import Array
from ._options import Ints, KeyRanges, Progress, VarlenOptions, Window
from ._problem.output import output, watch
from ._problem.problem import Problem
from ._problem.scoring import limit_keys, scoring
from ._problem.tensors import packed


@overload
def varlen_attention(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Sequence[int] | Array,
    cu_seqlens_k: Sequence[int] | Array | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[VarlenOptions],
) -> Array: ...


@overload
def varlen_attention(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Sequence[int] | Array,
    cu_seqlens_k: Sequence[int] | Array | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_lse: Literal[True],
    **options: Unpack[VarlenOptions],
) -> tuple[Array, Array]: ...


@overload
def varlen_attention(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Sequence[int] | Array,
    cu_seqlens_k: Sequence[int] | Array | None = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_lse: bool = ...,
    **options: Unpack[VarlenOptions],
) -> Array | tuple[Array, Array]: ...


def varlen_attention(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Sequence[int] | Array,
    cu_seqlens_k: Sequence[int] | Array | None = None,
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
    key_lengths: Ints | None = None,
    out: Any = None,
    return_lse: bool = False,
    num_threads: int | None = None,
    dtype: Any = None,
    out_dtype: Any = None,
    progress: Progress | None = None,
) -> Array | tuple[Array, Array]:
    r"""Compute attention within each of several sequences that are packed one after another.

    No padding is stored or computed, however much the lengths differ.

    Parameters
    ----------
    query : array, shape (total_q, Hq, D)
        The tokens of all sequences, in float32, float64, float16 or bfloat16. Any of the arrays
        may be a CPU tensor of torch, as in `scaled_dot_product_attention`.
    key : array, shape (total_k, Hkv, D)
        Of query's dtype.
    value : array, shape (total_k, Hkv, Dv)
        Of query's dtype.
    cu_seqlens_q : ints, shape (sequences + 1,)
        Where each sequence begins on query's first axis, and the total: sequence i is
        ``query[cu_seqlens_q[i]:cu_seqlens_q[i + 1]]``.
    cu_seqlens_k : ints, shape (sequences + 1,), optional
        Likewise for key and value; `cu_seqlens_q` by default.
    is_causal, scale, window, softcap, sinks, return_lse, num_threads, dtype, out_dtype, progress
        As in `scaled_dot_product_attention`.
    enable_gqa : bool
        Allow Hq to be a multiple of Hkv, as it is by default here.
    query_offset : int or ints, shape broadcastable to (sequences,), optional
        Position of a sequence's first query, where its first key is at 0. By default its keys less
        its queries, so that the last query and the last key are at the same position
        (bottom-right, as in flash-attn). In `scaled_dot_product_attention` the default is 0
        (top-left, as in torch).
    alibi_slopes : array, shape broadcastable to (sequences, Hq), optional
        ``-slope * abs(position - j)`` is added to the scores.
    attn_bias : array, broadcastable to (sequences, Hq, Lq, Lk), optional
        Floating: added to the scores; -inf excludes the key. Lq and Lk are the most queries and
        keys that a sequence has, and a sequence takes the first rows and columns.
    key_ranges : pair (begin, end), optional
        Ints or arrays of ints, each of a shape broadcastable to (Hq, total_q), or None: a token
        sees keys ``begin <= j < end`` of its sequence only, whose first key is 0. For the rest as
        in `scaled_dot_product_attention`.
    key_lengths : int or ints, shape broadcastable to (sequences,), optional
        Keys of a sequence from there on are never read.
    out : ndarray or tensor, shape (total_q, Hq, Dv), optional
        Where the result goes, and what is returned. It may be `query` itself or overlap any input.
        A call that is interrupted (KeyboardInterrupt) leaves it undefined.

    Returns
    -------
    result : ndarray, shape (total_q, Hq, Dv)
        `out`, or a new array of query's dtype, or of `out_dtype`, in native byte order; for a
        bfloat16 tensor, its bit patterns in uint16.
    lse : ndarray, shape (total_q, Hq)
        With `return_lse`: natural log-sum-exp; float32, or float64 for float64.

    Raises
    ------
    TypeError
        Dtypes that differ or are none of the four, or an argument of the wrong kind.
    ValueError
        Shapes or lengths that don't fit, an argument out of range, a read-only `out`. Nothing is
        written then.

    Notes
    -----
    A sequence's result is to the bit what it is alone, whatever it is packed with. The maths
    is that of `scaled_dot_product_attention`.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 10, 4, 8))  # 10 tokens, 4 heads
    >>> packed = qkv_fast.varlen_attention(q, k, v, [0, 7, 10], is_causal=True)
    >>> heads_first = (x[7:].swapaxes(0, 1) for x in (q, k, v))
    >>> alone = qkv_fast.scaled_dot_product_attention(*heads_first, is_causal=True)
    >>> bool((packed[7:].swapaxes(0, 1) == alone).all())
    True
    """
    notify_call_start()
    p = Problem()
    packed(p, query, key, value, cu_seqlens_q, cu_seqlens_k, enable_gqa, dtype)
    scoring(p, is_causal, scale, query_offset, window, softcap, alibi_slopes, sinks, attn_bias,
            key_ranges)  # fmt: skip
    if key_lengths is not None:
        limit_keys(p, key_lengths)
    output(p, out, return_lse, num_threads, out_dtype)
    if progress is not None:
        watch(p, progress)
    return solve(p)
