"""What attention heads look at, in numbers. Import it by name: ``import qkv_fast.analysis``.

Of queries and keys, without the Lq x Lk weights, in memory that grows with Lq + Lk:

    attention_received(query, key)      for each key, the sum of its weights over the queries
    attention_statistics(query, key)    for each query: entropy, largest weight, mean distance, and
                                        the shares on the first, its own and its neighbours' tokens

Of weights that `qkv_fast.attention_weights` or a model returns:

    head_similarity(weights)            how alike the heads of a layer are
    rollout(weights)                    what the tokens of each layer hold of the input tokens
    induction_score(weights, tokens)    how much a head looks behind earlier occurrences of a token
    previous_token_score(weights)       how much a head looks one token back
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ._dispatch import notify_call_start, solve
from ._dtypes import FLOAT64, Array
from ._options import Ints, KeyRanges, Progress, Window
from ._patterns import head_similarity, induction_score, previous_token_score, rollout
from ._problem.output import output_of_weights, watch
from ._problem.problem import Problem
from ._problem.selection import choose, scores

__all__ = [
    "Statistics",
    "attention_received",
    "attention_statistics",
    "head_similarity",
    "induction_score",
    "previous_token_score",
    "rollout",
]

Selection = slice | Sequence[int] | Array


class Statistics(NamedTuple):
    """What `attention_statistics` returns of each query: arrays of shape (..., Hq, Lq).

    They are float32, or float64 where the inputs are; `max_key` is int64.
    """

    entropy: Array
    """In bits: 0 for a single key, log2(n) for n keys of the same weight."""
    max_weight: Array
    """The largest weight."""
    max_key: Array
    """The key that has it, the first one of several; -1 where no key is seen, or a score is NaN."""
    mean_distance: Array
    """The mean of |position - key|, weighted, in tokens."""
    on_first: Array
    """The weight of key 0."""
    on_self: Array
    """The weight of the key at the query's position."""
    on_previous: Array
    """The weight of the key before that."""
    on_next: Array
    """The weight of the key behind it."""


def attention_received(
    query: Any,
    key: Any,
    attn_mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    rows: Selection | None = None,
    heads: Selection | None = None,
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
    r"""Return how much attention each key receives: the sum of its weights over the queries.

    It is ``attention_weights(query, key, ...).sum(axis=-2)``, without the weights. Methods that
    shorten a KV cache keep the keys with the largest sums: over all queries so far (H2O, Zhang et
    al. 2023, arXiv:2306.14048, section 4), or over the last ones (``rows=slice(-32, None)``;
    SnapKV, Li et al. 2024, arXiv:2404.14469, section 4).

    Parameters
    ----------
    query, key, attn_mask, is_causal, scale, enable_gqa
        As in `scaled_dot_product_attention`.
    rows : slice or ints, optional
        The query rows whose weights are summed; all by default. Negative numbers count from the
        end. A row keeps its position, its row of the mask and its lse.
    heads : slice or ints, optional
        The query heads that are computed, in this order; all by default.
    query_offset, window, softcap, alibi_slopes, sinks, attn_bias, key_ranges, key_lengths
        As in `scaled_dot_product_attention`. Keys past `key_lengths` receive 0.
    lse : array, shape (..., Hq, Lq), optional
        Log-sum-exps of all rows, as the op returns them with ``return_lse=True``: one of two passes
        over the keys is not needed then. See `attention_weights`.
    out : ndarray or tensor, of the result's shape and dtype, optional
        Where the result goes, and what is returned. It may overlap any input.
    num_threads, dtype, progress
        As in `scaled_dot_product_attention`.

    Returns
    -------
    ndarray, shape (..., len(heads), Lk)
        `out`, or a new array: float64 for float64, else float32, bfloat16 and float16 included.
        Each query head has its own, also where heads share keys. Without an axis of heads if
        `query` and `key` have none. Where no row sees a key, it receives 0.

    Raises
    ------
    TypeError, ValueError
        As in `attention_weights`.

    Notes
    -----
    The memory beyond inputs and output is 2 numbers for each query and head. Blocks of weights
    are summed in float64. The number of threads changes no bit.

    See Also
    --------
    attention_statistics : Sums over the keys of each query.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import analysis
    >>> query = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> analysis.attention_received(query, query, is_causal=True, scale=1.0).round(2)
    array([1.48, 0.94, 0.58])

    The 3 keys of each head that the last 4 queries look at most:

    >>> q, k = np.random.default_rng(0).standard_normal((2, 8, 1000, 64), np.float32)
    >>> received = analysis.attention_received(q, k, is_causal=True, rows=slice(-4, None))
    >>> np.argsort(received, axis=-1)[:, -3:].shape
    (8, 3)
    """
    notify_call_start()
    p = Problem()
    scores(p, query, key, attn_mask, is_causal, scale, enable_gqa, query_offset, window, softcap,
           alibi_slopes, sinks, key_lengths, dtype, attn_bias, key_ranges)  # fmt: skip
    choose(p, "received", rows, heads, lse)
    if p.heads is None:  # a KV group's query heads are summed apart, so none are computed together
        p.heads = np.arange(p.query.shape[-3])
    output_of_weights(p, out, num_threads)
    if progress is not None:
        watch(p, progress)
    solve(p)
    received: Array = p.result
    return received


def attention_statistics(
    query: Any,
    key: Any,
    attn_mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    rows: Selection | None = None,
    heads: Selection | None = None,
    query_offset: Ints = 0,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    attn_bias: Any = None,
    key_ranges: KeyRanges | None = None,
    key_lengths: Ints | None = None,
    num_threads: int | None = None,
    dtype: Any = None,
    progress: Progress | None = None,
) -> Statistics:
    r"""Return what describes each query's weights: entropy, largest weight, distance, shares.

    It takes one pass over the keys, in memory that grows with Lq alone.

    Parameters
    ----------
    query, key, attn_mask, is_causal, scale, enable_gqa
        As in `scaled_dot_product_attention`.
    rows, heads : slice or ints, optional
        The query rows and heads that are computed, in this order, as in `attention_weights`.
    query_offset, window, softcap, alibi_slopes, sinks, attn_bias, key_ranges, key_lengths
        As in `scaled_dot_product_attention`.
    num_threads, dtype, progress
        As in `scaled_dot_product_attention`.

    Returns
    -------
    Statistics
        Arrays of shape (..., len(heads), len(rows)), without an axis of heads if `query` and `key`
        have none. With the weights w of a row and p = w / sum(w):

        - entropy: -sum(p * log2(p)), in bits, as `plot.entropy_map` shows it;
        - max_weight: max(w), and max_key, the first key with the largest score;
        - mean_distance: sum(p * abs(position - key)), in tokens; position = query_offset + row;
        - on_first, on_self, on_previous, on_next: w of key 0 and of the keys position,
          position - 1 and position + 1; 0 where there is no such key or it is not seen.

    Raises
    ------
    TypeError, ValueError
        As in `attention_weights`.

    Notes
    -----
    A row that sees no key is 0 in all arrays, and its max_key is -1. Sinks take their share from
    the weights, so max_weight and the shares are smaller with them, but entropy and mean_distance
    describe only what goes to keys: sinks don't change them. A row with a weight that is NaN is NaN
    in all arrays but where a key is not seen, and its max_key is -1.

    The number of threads changes no bit.

    See Also
    --------
    attention_received : Sums over the queries of each key.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import analysis
    >>> query = np.zeros((4, 8))  # each score is 0, so all keys have the same weight
    >>> rows = analysis.attention_statistics(query, query, is_causal=True)
    >>> rows.entropy
    array([0.       , 1.       , 1.5849625, 2.       ])
    >>> rows.max_key, rows.mean_distance
    (array([0, 0, 0, 0]), array([0. , 0.5, 1. , 1.5]))
    >>> rows.on_previous.round(2)
    array([0.  , 0.5 , 0.33, 0.25])
    """
    notify_call_start()
    p = Problem()
    scores(p, query, key, attn_mask, is_causal, scale, enable_gqa, query_offset, window, softcap,
           alibi_slopes, sinks, key_lengths, dtype, attn_bias, key_ranges)  # fmt: skip
    choose(p, "statistics", rows, heads)
    output_of_weights(p, None, num_threads)
    if progress is not None:
        watch(p, progress)
    numbers = np.asarray(solve(p))
    real = np.float64 if p.code == FLOAT64 else np.float32
    dtypes = [np.int64 if name == "max_key" else real for name in Statistics._fields]
    return Statistics(*(numbers[..., i].astype(t) for i, t in enumerate(dtypes)))


for _name in __all__:  # help and reprs then name this module, not a private one
    globals()[_name].__module__ = __name__
