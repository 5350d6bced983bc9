"""attention_weights: its parameters and their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ._dispatch import notify_call_start, solve
from ._dtypes import Array
from ._options import Ints, KeyRanges, Progress, Window
from ._problem.output import output_of_weights, watch
from ._problem.problem import Problem
from ._problem.selection import scores, selection


def attention_weights(
    query: Any,
    key: Any,
    attn_mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    stage: Literal["scaled", "softcapped", "masked", "softmax"] = "softmax",
    rows: slice | Sequence[int] | Array | None = None,
    heads: slice | Sequence[int] | Array | None = None,
    query_offset: Ints = 0,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    attn_bias: Any = None,
    key_ranges: KeyRanges | None = None,
    key_lengths: Ints | None = None,
    lse: Any = None,
    out: Any = None,
    num_threads: int | None = None,
    dtype: Any = None,
    progress: Progress | None = None,
) -> Array:
    r"""Return the weights that `scaled_dot_product_attention` gives each key, or its scores.

    ``attention_weights(query, key, ...) @ value`` is the op's result, up to rounding.

    Parameters
    ----------
    query, key, attn_mask, is_causal, scale, enable_gqa
        As in `scaled_dot_product_attention`.
    stage : {"softmax", "masked", "softcapped", "scaled"}
        What is returned:

        - "scaled": q·k * scale;
        - "softcapped": that after the softcap;
        - "masked": that with ALiBi, a floating mask and a bias added, and -inf where a key is
          excluded;
        - "softmax": the weights. An excluded key has weight 0, and so have all keys of a row that
          sees none. With sinks a row sums to less than 1.
    rows : slice or ints, optional
        The query rows that are computed, in this order; all by default. Negative numbers count from
        the end. A row keeps its position, its row of the mask and its lse.
    heads : slice or ints, optional
        The query heads that are computed, likewise.
    query_offset, window, softcap, alibi_slopes, sinks, attn_bias, key_ranges, key_lengths
        As in `scaled_dot_product_attention`. Keys past `key_lengths` are -inf at each stage but
        "softmax", where they are 0.
    lse : array, shape (..., Hq, Lq), optional
        Log-sum-exps of all rows, as the op returns them: a weight is ``exp(score - lse)``, or less
        with sinks and at most 2^64, and no sum over the keys is needed. With those that
        `merge_attention` returns for several parts of the keys, the weights of a part are its
        share of the whole. For the stage "softmax" only.
    out : ndarray or tensor, of the result's shape and dtype, optional
        Where the result goes, and what is returned. It may overlap any input: the answer is as if
        it did not. A memory map serves where the weights exceed the memory.
    num_threads, dtype, progress
        As in `scaled_dot_product_attention`.

    Returns
    -------
    ndarray, shape (..., len(heads), len(rows), Lk)
        `out`, or a new C-contiguous array: float64 for float64, else float32, bfloat16 and float16
        included. Without an axis of heads if `query` and `key` have none.

    Raises
    ------
    TypeError, ValueError
        As in `scaled_dot_product_attention`; a stage, rows, heads or an lse that don't fit.
    MemoryError
        The result does not fit into the memory that is available; the message has its size.

    Notes
    -----
    The result has Lq · Lk numbers for each head, which the op itself never holds. Of long
    sequences, ask for some rows and heads.

    A row's weights do not depend on the number of threads, nor on which other rows and heads are
    computed. With the Python engine or BLAS tiles (see `backend`), last bits may depend on the
    other rows.

    On CPUs that multiply bfloat16, the op rounds its weights to that type. These are not rounded.

    A call that is interrupted (KeyboardInterrupt), or whose `progress` raises, leaves `out`
    undefined.

    See Also
    --------
    scaled_dot_product_attention : The op, and the order in which it changes the scores.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> query = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> qkv_fast.attention_weights(query, query, is_causal=True, scale=1.0).round(2)
    array([[1.  , 0.  , 0.  ],
           [0.27, 0.73, 0.  ],
           [0.21, 0.21, 0.58]])
    >>> qkv_fast.attention_weights(query, query, is_causal=True, scale=1.0, stage="masked")
    array([[  1., -inf, -inf],
           [  0.,   1., -inf],
           [  1.,   1.,   2.]])

    The last token's row alone, of one head out of twelve:

    >>> q, k = np.random.default_rng(0).standard_normal((2, 12, 1000, 64), np.float32)
    >>> qkv_fast.attention_weights(q, k, is_causal=True, rows=[-1], heads=[5]).shape
    (1, 1, 1000)
    """
    notify_call_start()
    p = Problem()
    scores(p, query, key, attn_mask, is_causal, scale, enable_gqa, query_offset, window, softcap,
           alibi_slopes, sinks, key_lengths, dtype, attn_bias, key_ranges)  # fmt: skip
    selection(p, stage, rows, heads, lse)
    output_of_weights(p, out, num_threads)
    if progress is not None:
        watch(p, progress)
    solve(p)
    weights: Array = p.result
    return weights
