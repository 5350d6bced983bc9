"""Engine "python": the algorithm in NumPy, block by block of queries, to read and to fall back on.

For each block of rows, with the keys that at least one of its rows sees:

    scores  = q kᵀ · scale, capped, with ALiBi, the additive mask and the bias
    weights = exp(scores - max), 0 where a key is excluded
    out     = weights v / sum(weights)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._dtypes import BFLOAT16, FLOAT64, Array, bfloat16_bits, reals
from ._problem.problem import UNBOUNDED, Problem
from ._progress import Count

# Scores held at a time: 2 MiB of float32. A block has one batch entry, whose result then does not
# depend on the others. It takes fewer heads before it takes fewer rows than BLOCK_ROWS, since each
# block reads all its keys again.
BLOCK_SCORES = 1 << 19
BLOCK_ROWS = 64
BLOCK_KEYS = 4096  # converted at a time, where the inputs are of another type than the scores
# Values that BLAS sums before the sum goes to float64. A long float32 sum loses digits: for 2^20
# equal values its relative error is 1.4e-2.
SUM_KEYS = 512


def run(problem: Problem) -> None:
    """Compute the problem into its `out` and `lse`."""
    if problem.out.size == 0 and (problem.lse is None or problem.lse.size == 0):
        return  # without a loop over batch entries that have nothing to compute
    *batch, num_heads, q_len, _ = problem.query.shape
    lengths = problem.query_lengths
    rows = math.prod(batch) * q_len if lengths is None else int(lengths.sum())
    count = Count(problem.progress, rows * num_heads)
    with np.errstate(all="ignore"):  # infinities and NaN in the data give what the formula gives
        for index in np.ndindex(*batch):
            _run_batch_entry(problem, index, count)


class Rows(NamedTuple):
    """The keys or the values of a batch entry, in one piece or in pages."""

    array: Array  # (Hkv, rows, D), or (pages, Hkv, page_size, D)
    scales: Array | None  # of that shape without the last axis
    code: int
    blocks: Array | None  # the numbers of the pages, in order

    def is_plain(self, real: npt.DTypeLike) -> bool:
        """Return whether the rows can be read without a copy: in one piece, of the dtype `real`."""
        return self.blocks is None and self.array.dtype == real

    def read(self, heads: slice, keys: slice, real: npt.DTypeLike) -> Array:
        """Return (heads, keys, D) of the dtype `real`."""
        rows = reals(self._take(self.array, heads, keys), self.code, real)
        if self.scales is not None:
            rows = rows * self._take(self.scales, heads, keys)[..., np.newaxis].astype(real)
        return rows

    def _take(self, array: Array, heads: slice, keys: slice) -> Array:
        if self.blocks is None:
            return array[heads, keys]
        size = array.shape[2]
        first = keys.start // size
        pages = self.blocks[first : -(-keys.stop // size)]
        rows = array[pages, heads].swapaxes(0, 1)  # (heads, pages, page_size, ...)
        rows = rows.reshape(rows.shape[0], len(pages) * size, *rows.shape[3:])
        return rows[:, keys.start - first * size : keys.stop - first * size]


class Entry(NamedTuple):
    """A batch entry: its own queries, keys and values, and where its answer goes."""

    query: Array  # (Hq, q_len, D)
    key: Rows
    value: Rows
    mask: Array | None  # (Hq, q_len, kv_len)
    bias: Array | None
    slopes: Array | None  # (Hq,)
    out: Array  # (Hq, q_len, Dv)
    lse: Array | None
    key_begins: Array | None  # (Hq, q_len)
    key_ends: Array | None
    positions: Array  # of the queries, (q_len,)
    kv_len: int  # its keys


def batch_entry(p: Problem, index: tuple[int, ...]) -> Entry:
    def of_entry(array: Array | None, starts: Array | None = None, count: int = 0) -> Any:
        """Return a batch entry's rows: of packed sequences, `count` from its start on."""
        if array is None or starts is None:
            return None if array is None else array[index]
        return array[index][:, int(starts[index]) : int(starts[index]) + count]

    q_len = p.query.shape[-2] if p.query_lengths is None else int(p.query_lengths[index])
    kv_len = p.kv_len if p.key_lengths is None else int(p.key_lengths[index])
    out = p.out.view(np.uint16) if p.out_code == BFLOAT16 else p.out
    pages = None if p.block_table is None else p.block_table[index]
    offset = 0 if p.query_offset is None else int(p.query_offset[index])

    def rows(array: Array, scales: Array | None, code: int) -> Rows:
        if pages is None:
            array, scales = of_entry(array, p.key_starts, kv_len), of_entry(scales)
        return Rows(array, scales, code, pages)

    return Entry(
        of_entry(p.query, p.query_starts, q_len),
        rows(p.key, p.key_scales, p.key_code),
        rows(p.value, p.value_scales, p.value_code),
        of_entry(p.attn_mask),
        of_entry(p.attn_bias),
        of_entry(p.alibi_slopes),
        of_entry(out, p.query_starts, q_len),
        of_entry(p.lse, p.query_starts, q_len),
        of_entry(p.key_begins, p.query_starts, q_len),
        of_entry(p.key_ends, p.query_starts, q_len),
        np.arange(offset, offset + q_len),
        kv_len,
    )


def _run_batch_entry(p: Problem, index: tuple[int, ...], count: Count) -> None:
    entry = batch_entry(p, index)
    num_heads, q_len, _ = entry.query.shape
    num_kv_heads, kv_len = p.key.shape[-3], entry.kv_len
    if num_heads == 0:
        return
    group = num_heads // num_kv_heads
    heads_at_once = max(1, BLOCK_SCORES // max(1, group * kv_len * min(q_len, BLOCK_ROWS)))
    rows_at_once = max(1, BLOCK_SCORES // max(1, min(heads_at_once, num_kv_heads) * group * kv_len))
    for kv_head in range(0, num_kv_heads, heads_at_once):
        kv_heads = slice(kv_head, min(kv_head + heads_at_once, num_kv_heads))
        for row in range(0, q_len, rows_at_once):
            rows = slice(row, min(row + rows_at_once, q_len))
            _run_block(p, entry, kv_heads, group, rows)
            count.add((kv_heads.stop - kv_heads.start) * group * (rows.stop - rows.start))


def _run_block(p: Problem, entry: Entry, kv_heads: slice, group: int, rows: slice) -> None:
    """Compute rows of the query heads of some key heads."""
    real = np.float64 if p.code == FLOAT64 else np.float32
    heads = slice(kv_heads.start * group, kv_heads.stop * group)
    keys = visible_keys(p, entry, heads, rows)
    # (kv heads, group, rows, keys)
    scores = products(p, entry, kv_heads, heads, rows, keys)
    scores, allowed = modified(p, entry, scores, heads, rows, keys)

    lowest = np.finfo(real).min  # instead of -inf: all excluded, or every visible score is -inf
    row_max = scores.max(axis=-1, keepdims=True, initial=lowest)
    weights = np.exp(scores - row_max)
    row_sum = weights.sum(axis=-1, keepdims=True)
    has_keys = allowed.any(axis=-1, keepdims=True)
    acc = np.zeros((*scores.shape[:3], p.value.shape[-1]))
    for block, at in _key_blocks(keys, SUM_KEYS):
        value = entry.value.read(kv_heads, block, real)
        acc += _mix(weights[..., at], value, allowed[..., at])
    if p.sinks is None:
        result = acc / row_sum
    else:
        sinks = p.sinks[heads].reshape(*scores.shape[:2], 1, 1).astype(real)
        top = np.maximum(row_max, sinks)
        rescale = np.exp(row_max - top)
        result = acc * rescale / (row_sum * rescale + np.exp(sinks - top))
        result = np.where(sinks == np.inf, acc * (row_sum * 0), result)
    shape = (heads.stop - heads.start, rows.stop - rows.start)
    result = np.where(has_keys, result, 0).reshape(*shape, -1)
    entry.out[heads, rows] = bfloat16_bits(result) if p.out_code == BFLOAT16 else result
    if entry.lse is not None:
        lse = np.where(has_keys, row_max + np.log(row_sum), -np.inf)
        entry.lse[heads, rows] = lse.reshape(shape)


def products(
    p: Problem, entry: Entry, kv_heads: slice, heads: slice, rows: slice, keys: slice
) -> Array:
    """Return q kᵀ of some key heads and the query heads that share them.

    It is (kv heads, group, rows, keys).
    """
    real = np.float64 if p.code == FLOAT64 else np.float32
    group = (heads.stop - heads.start) // (kv_heads.stop - kv_heads.start)
    # (kv heads, group · rows, D): the query heads of a group are more rows against its keys.
    query = reals(entry.query[heads, rows], p.query_code, real)
    shape = (kv_heads.stop - kv_heads.start, group, rows.stop - rows.start)
    stacked = query.reshape(shape[0], shape[1] * shape[2], -1)
    products = np.empty((*stacked.shape[:2], keys.stop - keys.start), real)
    at_once = products.shape[-1] if entry.key.is_plain(real) else BLOCK_KEYS
    for block, at in _key_blocks(keys, at_once):
        products[..., at] = stacked @ entry.key.read(kv_heads, block, real).swapaxes(-1, -2)
    return products.reshape(*shape, -1)


def modified(
    p: Problem, entry: Entry, scores: Array, heads: slice, rows: slice, keys: slice
) -> tuple[Array, Array]:
    """Return the scores of the softmax, and whether a row may attend to a key."""
    real = scores.dtype.type
    scores *= real(p.scale)
    if p.softcap:
        scores = real(p.softcap) * np.tanh(scores / real(p.softcap))
    distance = entry.positions[rows, np.newaxis] - np.arange(keys.start, keys.stop)
    if entry.slopes is not None:
        slopes = entry.slopes[heads].reshape(*scores.shape[:2], 1, 1)
        scores += (-slopes * np.abs(distance)).astype(real)
    allowed = np.broadcast_to((distance <= p.left) & (-distance <= p.right), scores.shape)
    if entry.key_begins is not None and entry.key_ends is not None:
        key, shape = np.arange(keys.start, keys.stop), (*scores.shape[:3], 1)
        begins = entry.key_begins[heads, rows].reshape(shape)
        ends = entry.key_ends[heads, rows].reshape(shape)
        allowed = allowed & (begins <= key) & (key < ends)
    for array, code in ((entry.mask, p.mask_code), (entry.bias, p.bias_code)):
        if array is None:
            continue
        mask = array[heads, rows, keys].reshape(scores.shape)
        if mask.dtype == np.bool_:
            allowed = allowed & mask
        else:
            mask = reals(mask, code)
            limit = np.finfo(real).max  # a finite bias of a wider type stays finite
            bias = np.where(np.isfinite(mask), np.clip(mask, -limit, limit), mask)
            scores += bias.astype(real)
            allowed = allowed & (mask != -np.inf)
    return np.where(allowed, scores, -np.inf).astype(real, copy=False), allowed


def visible_keys(p: Problem, entry: Entry, heads: slice, rows: slice) -> slice:
    """Return the keys from the first to the last that some row may see.

    It is what the rows' positions and their ranges allow.
    """
    start, stop = 0, entry.kv_len
    if p.left < UNBOUNDED:
        start = min(stop, max(0, int(entry.positions[rows].min()) - p.left))
    if p.right < UNBOUNDED:
        stop = max(start, min(stop, int(entry.positions[rows].max()) + p.right + 1))
    if entry.key_begins is not None and entry.key_ends is not None:
        begins, ends = entry.key_begins[heads, rows], entry.key_ends[heads, rows]
        some = begins < ends
        start = min(stop, max(start, int(begins.min(where=some, initial=stop))))
        stop = max(start, min(stop, int(ends.max(where=some, initial=start))))
    return slice(start, stop)


def _key_blocks(keys: slice, at_once: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of `at_once` keys, and where they stand among `keys`."""
    count = keys.stop - keys.start
    for at in range(0, count, max(1, at_once)):
        stop = min(count, at + at_once)
        yield slice(keys.start + at, keys.start + stop), slice(at, stop)


def _mix(weights: Array, value: Array, allowed: Array) -> Array:
    """Return weights @ value, where an excluded key adds nothing even if its value is not finite.

    weights and allowed are (kv heads, group, rows, keys), value is (kv heads, keys, Dv).
    """
    shape = weights.shape
    stacked = weights.reshape(shape[0], shape[1] * shape[2], shape[3])
    acc_shape = (*shape[:3], value.shape[-1])
    if allowed.all():
        return (stacked @ value).reshape(acc_shape)
    finite = np.isfinite(value)
    nonfinite_keys = np.flatnonzero(~finite.all(axis=(0, 2)))
    clean = np.where(finite, value, 0) if nonfinite_keys.size else value
    acc = (stacked @ clean).reshape(acc_shape)
    for key in nonfinite_keys:
        values = np.where(finite[:, key], 0, value[:, key])[:, np.newaxis, np.newaxis]
        added = weights[..., key, np.newaxis] * values
        acc += np.where(allowed[..., key, np.newaxis] & (values != 0), added, 0)
    return acc
