"""Patterns in given weights: similar heads, rollout, induction, previous tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ._dtypes import Array
from ._given_weights import real_weights
from ._problem.arguments import integer, plain, real, shown


def head_similarity(weights: Any) -> Array:
    r"""Return how alike the heads' weights are, for each pair of heads.

    The similarity of two heads is 1 minus the mean, over the queries, of the Jensen-Shannon
    divergence of their weights p and q (Lin 1991, doi:10.1109/18.61115, equation 4.1, in base 2)::

        JSD(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2        H(p) = -sum(p * log2(p))

    It is 1 for equal weights, and 0 for heads that never look at the same key.

    Parameters
    ----------
    weights : array of real numbers, (..., H, Lq, Lk)
        Attention weights, each at least 0. Each row is divided by its sum. To compare the heads of
        several layers, reshape (layers, H, Lq, Lk) to (layers * H, Lq, Lk).

    Returns
    -------
    ndarray of float64, (..., H, H)
        Symmetric. Queries without any weight in one of both heads don't count; NaN if none counts.

    Raises
    ------
    TypeError, ValueError
        If `weights` has the wrong type or shape, or a weight is negative, infinite or NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import analysis
    >>> weights = np.array([[[1, 0], [0, 1]], [[1, 0], [0, 1]], [[0, 1], [0.5, 0.5]]])
    >>> analysis.head_similarity(weights).round(3)
    array([[1.   , 1.   , 0.344],
           [1.   , 1.   , 0.344],
           [0.344, 0.344, 1.   ]])
    """
    array = _given(weights)
    *batch, num_heads, _, _ = array.shape
    result = np.empty((*batch, num_heads, num_heads))
    for index in np.ndindex(*batch):
        bits = [_entropy(_shares(array[index][head])) for head in range(num_heads)]
        for i in range(num_heads):
            p = _shares(array[index][i])
            for j in range(i, num_heads):
                q = p if j == i else _shares(array[index][j])
                divergence = _entropy((p + q) / 2) - (bits[i] + bits[j]) / 2
                result[(*index, i, j)] = result[(*index, j, i)] = 1 - _mean(divergence)
    return np.clip(result, 0, 1)


def rollout(weights: Any, residual: float = 0.5) -> Array:
    r"""Return what each token holds of the input tokens after each layer: attention rollout.

    With the mean W of a layer's heads, A = (1 - residual) W + residual I, and the layers are
    multiplied: rollout[i] = A[i] @ rollout[i - 1], rollout[0] = A[0] (Abnar and Zuidema 2020,
    arXiv:2005.00928, section 3, equation 1, where residual is 0.5).

    Parameters
    ----------
    weights : array of real numbers, (layers, H, L, L)
        Attention weights, each at least 0, of self-attention. Each row is divided by its sum; a row
        without any weight holds its own token alone.
    residual : float, default 0.5
        The share of the residual connection, from 0 to 1.

    Returns
    -------
    ndarray of float64, (layers, L, L)
        Its rows sum to 1. The last layer's, ``rollout(weights)[-1]``, is that of the whole model.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or shape, `residual` is out of its range, or a weight is
        negative, infinite or NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import analysis
    >>> layer = np.array([[[1, 0], [1, 0]]])  # one head: both tokens look at the first one
    >>> analysis.rollout(np.stack([layer, layer]))
    array([[[1.  , 0.  ],
            [0.5 , 0.5 ]],
    <BLANKLINE>
           [[1.  , 0.  ],
            [0.75, 0.25]]])
    """
    array = real_weights(weights, (4,), "(layers, heads, queries, keys)")
    layers, num_heads, length, kv_len = array.shape
    if length != kv_len:
        raise ValueError(
            f"weights have shape {array.shape}: rollout is of self-attention, with as many keys as "
            "queries"
        )
    share = real("residual", residual)
    if not 0 <= share <= 1:
        raise ValueError(f"residual is {shown(residual)}: it must be from 0 to 1")
    result = np.empty((layers, length, length))
    identity = np.eye(length)
    for layer in range(layers):
        mean = np.zeros((length, length))
        for head in range(num_heads):
            shares = _shares(array[layer, head])
            mean += np.where(np.isnan(shares), identity, shares) / num_heads
        mixed = (1 - share) * mean + share * identity
        result[layer] = mixed if layer == 0 else mixed @ result[layer - 1]
    return result


def induction_score(weights: Any, tokens: Any, query_offset: int = 0) -> Array:
    """Return how much each head looks at what followed earlier occurrences of a query's token.

    It is the mean, over the queries whose token occurred before, of the sum of the weights of the
    keys right behind these occurrences. Induction heads have a large one: the prefix matching score
    of Olsson et al. 2022 (arXiv:2209.11895), who take it on random tokens that are repeated.

    Parameters
    ----------
    weights : array of real numbers, (..., H, Lq, Lk)
        Attention weights, each at least 0. They count as they are given.
    tokens : sequence of ints or str, Lk
        The tokens of the keys, as ids or as strings.
    query_offset : int, default 0
        The position of the first query among the keys, such as Lk - Lq where the queries are the
        last tokens.

    Returns
    -------
    ndarray of float64, (..., H)
        From 0 to 1. A query's own key doesn't count, also where its token was the one before. NaN
        if no query counts.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or shape, queries stand at no key, or a weight is
        negative, infinite or NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import analysis
    >>> weights = np.eye(6)
    >>> weights[4] = weights[5] = [0, 0.75, 0.25, 0, 0, 0]
    >>> analysis.induction_score(weights[np.newaxis], ["a", "b", "c", "d", "a", "b"])
    array([0.5])
    """
    array = _given(weights)
    positions = _positions(array, query_offset)
    ids = plain("tokens", tokens)
    if ids.ndim != 1 or ids.dtype.kind not in "iuUSO":
        raise TypeError(
            f"tokens is {shown(tokens)}: ints or strings along one axis are needed, one for each "
            "key"
        )
    if len(ids) != array.shape[-1]:
        raise ValueError(
            f"tokens has {len(ids)} entries, but weights have {array.shape[-1]} keys on axis -1: "
            "each key must have one token"
        )
    keys = np.arange(1, len(ids))
    follows = ids[positions, np.newaxis] == ids[keys - 1]  # a key behind the query's token
    follows &= keys < positions[:, np.newaxis]
    counts = follows.any(axis=-1)
    return _mean_of_rows(array, lambda rows: np.where(follows, rows[:, 1:], 0).sum(-1), counts)


def previous_token_score(weights: Any, query_offset: int = 0) -> Array:
    """Return how much each head looks one token back: its mean weight on the previous token.

    Parameters
    ----------
    weights : array of real numbers, (..., H, Lq, Lk)
        Attention weights, each at least 0. They count as they are given.
    query_offset : int, default 0
        The position of the first query among the keys, such as Lk - Lq where the queries are the
        last tokens.

    Returns
    -------
    ndarray of float64, (..., H)
        From 0 to 1. The query at position 0 doesn't count. NaN if no query counts.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or shape, queries stand at no key, or a weight is
        negative, infinite or NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from qkv_fast import analysis
    >>> back = np.eye(4, k=-1)  # each token looks at the one before
    >>> analysis.previous_token_score([back, np.tril(np.ones((4, 4)) / 4)])
    array([1.  , 0.25])
    """
    array = _given(weights)
    positions = _positions(array, query_offset)
    rows = np.arange(len(positions))
    return _mean_of_rows(array, lambda head: head[rows, positions - 1], positions > 0)


def _given(weights: Any) -> Array:
    return real_weights(weights, range(3, 65), "(..., heads, queries, keys)")


def _positions(weights: Array, query_offset: Any) -> Array:
    """Return the positions of the queries, each of which must be that of a key."""
    q_len, kv_len = weights.shape[-2:]
    most = kv_len - q_len
    if most < 0:
        raise ValueError(
            f"weights have {q_len} queries on axis -2 and {kv_len} keys on axis -1: each query "
            "must stand at a key"
        )
    rule = f"it must be from 0 to {most}, so that each of {q_len} queries stands at one of "
    offset = integer("query_offset", query_offset, 0, most, rule=f"{rule}{kv_len} keys")
    return np.arange(offset, offset + q_len)


def _mean_of_rows(weights: Array, score: Callable[[Array], Array], counts: Array) -> Array:
    """Return for each head the mean of its rows' scores, of those rows that count."""
    result = np.empty(weights.shape[:-2])
    for index in np.ndindex(*result.shape):
        result[index] = _mean(np.where(counts, score(weights[index]).astype(np.float64), np.nan))
    return result


def _shares(rows: Array) -> Array:
    """Return rows of weights divided by their sums, as float64; NaN for a row without any."""
    shares: Array = np.full(rows.shape, np.nan)
    total = rows.sum(axis=-1, keepdims=True, dtype=np.float64)
    np.divide(rows, total, out=shares, where=total > 0)
    return shares


def _entropy(shares: Array) -> Array:
    """Return the entropy of each row in bits, NaN for a row that is NaN."""
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    bits: Array = -(shares * logs).sum(axis=-1)
    return bits


def _mean(numbers: Array) -> float:
    """Return the mean of what is not NaN; NaN if all is."""
    known = numbers[~np.isnan(numbers)]
    return float(known.mean()) if known.size else math.nan
