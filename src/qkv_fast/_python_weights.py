"""attention_weights in NumPy, and sums of the weights, of a block of rows of one query head.

See `_python_engine`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._dtypes import Array
from ._problem.problem import Problem
from ._progress import Count
from ._python_engine import (
    BLOCK_SCORES,
    Entry,
    batch_entry,
    modified,
    products,
    visible_keys,
)

# A weight is larger than 1 where its score is above a given log-sum-exp, as rounding alone may
# leave it: units in the last place of scores of 10^9 are 64. Up to 2^64, sums stay finite.
MAX_EXCESS = 64 * math.log(2)


def run(p: Problem) -> None:
    """Compute what the problem's stage names into its `out`."""
    if p.out.size == 0:
        return
    heads = range(p.query.shape[-3]) if p.heads is None else p.heads.tolist()
    rows = np.arange(p.query.shape[-2]) if p.rows is None else p.rows
    at_once = max(1, BLOCK_SCORES // max(1, p.kv_len))
    batch = p.query.shape[:-3]
    count = Count(p.progress, math.prod(batch) * len(heads) * len(rows))
    with np.errstate(all="ignore"):  # infinities and NaN in the data give what the formula gives
        for index in np.ndindex(batch):
            entry = batch_entry(p, index)
            for at, head in enumerate(heads):
                received = np.zeros(p.kv_len)
                for begin in range(0, len(rows), at_once):
                    block = slice(begin, begin + at_once)
                    lse = None if p.known_lse is None else p.known_lse[index][at, block]
                    part = _select(entry, head, rows[block])
                    if p.stage == "received":
                        _add_received(p, part, head, lse, received)
                    elif p.stage == "statistics":
                        _write_statistics(p, part, head, p.out[index][at, block])
                    else:
                        _write_block(p, part, head, lse, p.out[index][at, block])
                    count.add(len(rows[block]))
                if p.stage == "received":
                    p.out[index][at, 0] = received


def _select(entry: Entry, head: int, rows: Array) -> Entry:
    """Return the entry of rows of one query head alone."""

    def of_head(array: Array | None) -> Any:
        return None if array is None else array[head : head + 1]

    def of_rows(array: Array | None) -> Any:
        return None if array is None else array[head, rows][np.newaxis]

    return entry._replace(
        query=of_rows(entry.query),
        mask=of_rows(entry.mask),
        bias=of_rows(entry.bias),
        slopes=of_head(entry.slopes),
        key_begins=of_rows(entry.key_begins),
        key_ends=of_rows(entry.key_ends),
        positions=entry.positions[rows],
    )


def _scores(p: Problem, entry: Entry, head: int) -> tuple[slice, Array, Array]:
    """Return which keys the rows of such an entry see, their scores, and which are not excluded.

    Both are (rows, keys).
    """
    kv_head = head // (p.query.shape[-3] // p.key.shape[-3])
    all_rows, only = slice(0, len(entry.positions)), slice(0, 1)
    keys = visible_keys(p, entry, only, all_rows)
    scores = products(p, entry, slice(kv_head, kv_head + 1), only, all_rows, keys)
    scores, allowed = modified(p, entry, scores, only, all_rows, keys)
    return keys, scores[0, 0], allowed[0, 0]


def _weights(scores: Array, allowed: Array, lse: Array | None, sink: float | None) -> Array:
    """Return the softmax of scores, or their weights relative to known log-sum-exps."""
    real = scores.dtype.type
    if lse is None:
        top = scores.max(axis=-1, keepdims=True, initial=np.finfo(real).min)
    else:
        top = lse[:, np.newaxis]
    excess = scores - top
    excess[(excess > MAX_EXCESS) & (scores < np.inf)] = MAX_EXCESS
    weights = np.exp(excess)
    total = weights.sum(axis=-1, keepdims=True) if lse is None else np.ones_like(top)
    if sink is not None:
        sink = real(sink)
        highest = np.maximum(top, sink)
        rescale = np.exp(top - highest)
        total = np.where(sink == np.inf, np.inf, total * rescale + np.exp(sink - highest))
        weights *= rescale
    return np.where(allowed, weights / total, 0)


def _sink(p: Problem, head: int) -> float | None:
    return None if p.sinks is None else float(p.sinks[head])


def _write_block(p: Problem, entry: Entry, head: int, lse: Array | None, out: Array) -> None:
    """Write the weights or scores of an entry of rows of a query head; out is (rows, Lk)."""
    keys, scores, allowed = _scores(p, entry, head)
    out[...] = 0 if p.stage == "softmax" else -np.inf
    if p.stage == "softmax":
        scores = _weights(scores, allowed, lse, _sink(p, head))
    out[:, keys] = scores


def _add_received(p: Problem, entry: Entry, head: int, lse: Array | None, received: Array) -> None:
    """Add what each key receives from the rows; received is (Lk,)."""
    keys, scores, allowed = _scores(p, entry, head)
    weights = _weights(scores, allowed, lse, _sink(p, head))
    received[keys] += weights.sum(axis=0, dtype=np.float64)


def _write_statistics(p: Problem, entry: Entry, head: int, out: Array) -> None:
    """Write the fields of `analysis.Statistics`; out is (rows, 8) of float64."""
    keys, scores, allowed = _scores(p, entry, head)
    key_at = np.arange(keys.start, keys.stop)
    shares = _weights(scores, allowed, None, None).astype(np.float64)  # of what goes to keys
    weights = shares
    if p.sinks is not None:
        weights = _weights(scores, allowed, None, _sink(p, head)).astype(np.float64)
    distance = np.abs(entry.positions[:, np.newaxis] - key_at)
    row_is_nan = np.isnan(shares).any(axis=-1)
    no_key = ~allowed.any(axis=-1)
    logs = np.log2(shares, out=np.zeros_like(shares), where=shares > 0)
    out[:, 0] = np.abs((shares * logs).sum(axis=-1))
    out[:, 1] = weights.max(axis=-1, initial=0)
    out[:, 2] = np.where(no_key | row_is_nan, -1, keys.start)
    if key_at.size:
        out[:, 2] += np.where(no_key | row_is_nan, 0, scores.argmax(axis=-1))
    out[:, 3] = (shares * distance).sum(axis=-1)
    out[row_is_nan, 0:2] = out[row_is_nan, 3] = np.nan
    first = np.zeros_like(entry.positions)
    for number, key in enumerate(
        (first, entry.positions, entry.positions - 1, entry.positions + 1), 4
    ):
        out[:, number] = np.where(key_at == key[:, np.newaxis], weights, 0).sum(axis=-1)
    out[np.isnan(out[:, 1]), 2] = -1
