"""scaled_dot_product_attention: its parameters and their meaning."""

from __future__ import annotations

from typing import Any, Literal, Unpack, overload

from . import _dispatch
from ._dispatch import notify_call_start, solve
from ._dtypes import Array
from ._options import DenseOptions, Ints, KeyRanges, Progress, Window
from ._problem.output import output, watch
from ._problem.problem import Problem
from ._problem.scoring import limit_keys, mask, no_dropout, scoring
from ._problem.tensors import dense


@overload
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[DenseOptions],
) -> Array: ...


@overload
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_lse: Literal[True],
    **options: Unpack[DenseOptions],
) -> tuple[Array, Array]: ...


@overload
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = ...,
    dropout_p: float = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    enable_gqa: bool = ...,
    *,
    return_lse: bool = ...,
    **options: Unpack[DenseOptions],
) -> Array | tuple[Array, Array]: ...


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    query_offset: Ints = 0,
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
    r"""Compute ``softmax(query @ key.T * scale + bias) @ value`` for every head.

    The first eight parameters are those of ``torch.nn.functional.scaled_dot_product_attention``,
    in its order and meaning.

    Parameters
    ----------
    query : array, shape (..., Hq, Lq, D)
        float32, float64, float16 or bfloat16 (of ``ml_dtypes`` or torch). Two axes (Lq, D) mean one
        head. Any strides, alignment and byte order. Besides ndarrays, CPU tensors of torch, and
        anything that NumPy can view without a copy: the buffer protocol, ``__array_interface__``,
        DLPack. A tensor must not require grad, unless under ``torch.no_grad()``.
    key : array, shape (..., Hkv, Lk, D)
        Of query's dtype. Batch axes (``...``) broadcast, without copies.
    value : array, shape (..., Hkv, Lk, Dv)
        Of query's dtype.
    attn_mask : array, broadcastable to (..., Hq, Lq, Lk), optional
        Boolean: True where the query may attend to the key. Floating: added to the scores, and
        -inf excludes the key as False does. Never materialised.
    dropout_p : float
        Must be 0.0: the op is for inference.
    is_causal : bool
        A query attends to the keys up to its own position only. Together with `attn_mask`,
        both apply.
    scale : float, optional
        Factor of the scores, of any sign; 1/√D by default.
    enable_gqa : bool
        Allow Hq to be a multiple of Hkv: query head h reads key head ``h // (Hq // Hkv)``.
    query_offset : int or ints, shape broadcastable to (...)
        Query i stands at position ``query_offset + i``, key j at j. The default 0 aligns causal
        masks top-left, as torch does; ``Lk - Lq`` aligns them bottom-right, as with a KV cache.
    window : pair (left, right) of int or None, optional
        A query at position p sees keys ``p - left <= j <= p + right``, both ends inclusive, as in
        flash-attn and ONNX; None is no bound on that side. Transformers' ``sliding_window=w`` is
        ``(w - 1, 0)``.
    softcap : float, optional
        Positive c: scores become ``c * tanh(score / c)``. None and 0 are no cap, as in flash-attn
        and ONNX.
    alibi_slopes : array, shape broadcastable to (..., Hq), optional
        ``-slope * abs(position - j)`` is added to the scores.
    sinks : array, shape (Hq,), optional
        Logits, neither scaled nor capped, that join the softmax's denominator only.
    attn_bias : array, broadcastable to (..., Hq, Lq, Lk), optional
        Floating: added to the scores, beside an `attn_mask` of either kind; -inf excludes the key.
        Never materialised.
    key_ranges : pair (begin, end), optional
        Ints or arrays of ints, each of a shape broadcastable to (..., Hq, Lq), or None: a row of
        queries sees keys ``begin <= j < end`` only, and of these what all else allows. None is no
        bound on that side. Ranges may be empty, or reach beyond the keys. Blocks of keys that no
        row of a tile of queries sees are not computed.
    key_lengths : int or ints, shape broadcastable to (...), optional
        Keys from there on are never read, whatever they hold.
    out : ndarray or tensor, shape (..., Hq, Lq, Dv), optional
        Where the result goes, and what is returned. It may be `query` itself or overlap any input:
        the answer is as if it did not.
    return_lse : bool
        Also return the log-sum-exp of the scores.
    num_threads : int, optional
        Threads of this call; see `get_num_threads` for the default.
    dtype : "bfloat16", optional
        Take uint16 arrays as the bit patterns of bfloat16, for which NumPy alone has no type, and
        return the result as one. Arrays of ``ml_dtypes`` and tensors are known to be bfloat16
        without it.
    out_dtype : "float32", optional
        The result's type where `query` is float16 or bfloat16: its rows are written as they were
        summed, not rounded to 16 bits, as partial results for `merge_attention` should be. Query's
        own type means what None does. `out` must have that type.
    progress : callable, optional
        Called as ``progress(done, total)`` with the parts of the call that are done and all parts,
        two ints: by the calling thread, at most ten times a second, and in the end with
        ``done == total``. How large a part is depends on the engine and the number of threads. An
        exception in it ends the call as an interrupt does, and is raised.

    Returns
    -------
    result : ndarray, shape (..., Hq, Lq, Dv)
        `out`, or a new array of query's dtype, or of `out_dtype`, in native byte order, laid out in
        memory like query (order 'K'). For a bfloat16 tensor it holds the bit patterns, in uint16:
        ``torch.from_numpy(result).view(torch.bfloat16)`` is their tensor, without a copy.
    lse : ndarray, shape (..., Hq, Lq)
        With `return_lse`: the natural log-sum-exp of each row's modified scores over the keys that
        it may attend to, without the sink. float32, or float64 for float64.

    Raises
    ------
    TypeError
        Dtypes that differ or are none of the four, or an argument of the wrong kind, such as a
        tensor that is not on the CPU.
    ValueError
        Shapes that don't fit, an argument out of range, a read-only `out`. Nothing is written
        then.

    Notes
    -----
    The order is: score = q·k * scale; softcap; ALiBi, floating mask and bias; exclusion (boolean
    mask, -inf, causal, window, key_ranges, key_lengths); softmax with sinks. A row that may attend
    to no key gives zeros, and -inf as its lse. An excluded key has no influence, even if it holds
    NaN. Sums are in float32, in float64 for float64.

    A row's result depends on its own inputs, and on how many rows its KV group has. It does not
    depend on the number of threads, nor on the rest of the batch. With ``tiles="blas"`` (see
    `backend`) a row's last bits may also depend on its place among the queries.

    A call that is interrupted (KeyboardInterrupt), or whose `progress` raises, leaves `out`
    undefined.

    The maths is equation 1 of Vaswani et al., *Attention Is All You Need* (2017), by the online
    softmax of Milakov and Gimelshein (2018) in blocks as in Dao et al., *FlashAttention* (2022);
    ALiBi is from Press et al., *Train Short, Test Long* (2022), grouped heads from Ainslie et
    al., *GQA* (2023).

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 2, 12, 128, 64), np.float32)  # batch 2, 12 heads
    >>> qkv_fast.scaled_dot_product_attention(q, k, v, is_causal=True).shape
    (2, 12, 128, 64)

    bfloat16 as bit patterns, here those of 1.0:

    >>> x = np.full((2, 3), 0x3F80, np.uint16)
    >>> hex(qkv_fast.scaled_dot_product_attention(x, x, x, dtype="bfloat16")[0, 0])
    '0x3f80'

    Equal keys share the weight evenly:

    >>> q, k = np.ones((1, 4)), np.ones((3, 4))
    >>> v = np.array([[0.0], [3.0], [6.0]])
    >>> qkv_fast.scaled_dot_product_attention(q, k, v).round(12)
    array([[3.]])

    Two texts in a row, of two tokens and of one, that do not see each other:

    >>> tokens = np.array([[1.0], [3.0], [8.0]])
    >>> qkv_fast.scaled_dot_product_attention(
    ...     tokens, tokens, tokens, scale=0.0, key_ranges=([0, 0, 2], [2, 2, 3])
    ... )
    array([[2.],
           [2.],
           [8.]])
    """
    if progress is None:
        answer: Array | tuple[Array, Array] | None = _dispatch.shortcuts.attend(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, query_offset,
            window, softcap, alibi_slopes, sinks, attn_bias, key_ranges, key_lengths, out,
            return_lse, num_threads, dtype, out_dtype)  # fmt: skip
        if answer is not None:
            return answer
    notify_call_start()
    p = Problem()
    dense(p, query, key, value, enable_gqa, dtype)
    if attn_mask is not None:
        mask(p, attn_mask)
    if type(dropout_p) is not float or dropout_p:
        no_dropout(dropout_p)
    scoring(p, is_causal, scale, query_offset, window, softcap, alibi_slopes, sinks, attn_bias,
            key_ranges)  # fmt: skip
    if key_lengths is not None:
        limit_keys(p, key_lengths)
    output(p, out, return_lse, num_threads, out_dtype)
    if progress is not None:
        watch(p, progress)
    return solve(p)
