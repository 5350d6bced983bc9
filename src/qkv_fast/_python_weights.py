"""attention_weights in NumPy, a block of rows of one query head at a time: see `_python_engine`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._dtypes import Array
from ._problem.problem import Problem
from ._python_engine import (
    BLOCK_SCORES,
    Entry,
    batch_entry,
    modified,
    products,
    visible_keys,
)


def run(p: Problem) -> None:
    """Compute the weights or scores of a problem into its `out`."""
    if p.out.size == 0:
        return
    heads = range(p.query.shape[-3]) if p.heads is None else p.heads.tolist()
    rows = np.arange(p.query.shape[-2]) if p.rows is None else p.rows
    at_once = max(1, BLOCK_SCORES // p.out.shape[-1])
    with np.errstate(all="ignore"):  # infinities and NaN in the data give what the formula gives
        for index in np.ndindex(p.query.shape[:-3]):
            entry = batch_entry(p, index)
            for at, head in enumerate(heads):
                for begin in range(0, len(rows), at_once):
                    block = slice(begin, begin + at_once)
                    lse = None if p.known_lse is None else p.known_lse[index][at, block]
                    _write_block(p, _select(entry, head, rows[block]), head, lse,
                                 p.out[index][at, block])  # fmt: skip


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


def _write_block(p: Problem, entry: Entry, head: int, lse: Array | None, out: Array) -> None:
    """Write the rows of an entry that has only these, of a query head; out is (rows, Lk)."""
    kv_head = head // (p.query.shape[-3] // p.key.shape[-3])
    all_rows, only = slice(0, len(out)), slice(0, 1)
    keys = visible_keys(p, entry, only, all_rows)
    scores = products(p, entry, slice(kv_head, kv_head + 1), only, all_rows, keys)
    scores, allowed = modified(p, entry, scores, only, all_rows, keys)
    scores, allowed = scores[0, 0], allowed[0, 0]
    out[...] = 0 if p.stage == "softmax" else -np.inf
    if p.stage != "softmax":
        out[:, keys] = scores
        return
    real = scores.dtype.type
    if lse is None:
        top = scores.max(axis=-1, keepdims=True, initial=np.finfo(real).min)
    else:
        top = lse[:, np.newaxis]
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True) if lse is None else np.ones_like(top)
    if p.sinks is not None:
        sink = real(p.sinks[head])
        highest = np.maximum(top, sink)
        rescale = np.exp(top - highest)
        total = np.where(sink == np.inf, np.inf, total * rescale + np.exp(sink - highest))
        weights *= rescale
    out[:, keys] = np.where(allowed, weights / total, 0)
