"""Engine "python": the algorithm in NumPy, block by block of queries, to read and to fall back on.

For each block of rows, with the keys that some row of it can see:

    scores  = q kᵀ · scale, capped, with ALiBi and the additive mask
    weights = exp(scores - max), 0 where a key is excluded
    out     = weights v / sum(weights)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ._problem import BFLOAT16, FLOAT64, SWAPPED, UNBOUNDED, Problem

Array = npt.NDArray[Any]

# Scores held at a time: 2 MiB of float32. Each batch entry goes alone, so that its result does
# not depend on the others. A block takes fewer heads before it takes fewer rows than BLOCK_ROWS:
# the products of a few rows with many keys are slow, and read all keys again for each block.
BLOCK_SCORES = 1 << 19
BLOCK_ROWS = 64
BLOCK_KEYS = 4096  # converted at a time, where the inputs are of another type than the scores


def run(problem: Problem) -> None:
    """Compute the problem into its `out` and `lse`."""
    with np.errstate(all="ignore"):  # infinities and NaN in the data give what the formula gives
        for index in np.ndindex(problem.query.shape[:-3]):
            _run_batch_entry(problem, index)


def _run_batch_entry(p: Problem, index: tuple[int, ...]) -> None:
    num_heads, q_len, _ = p.query.shape[-3:]
    num_kv_heads, kv_len = p.key.shape[-3:-1]
    if num_heads == 0:
        return
    group = num_heads // num_kv_heads
    heads_at_once = max(1, BLOCK_SCORES // max(1, group * kv_len * min(q_len, BLOCK_ROWS)))
    rows_at_once = max(1, BLOCK_SCORES // max(1, min(heads_at_once, num_kv_heads) * group * kv_len))
    for kv_head in range(0, num_kv_heads, heads_at_once):
        kv_heads = slice(kv_head, min(kv_head + heads_at_once, num_kv_heads))
        for row in range(0, q_len, rows_at_once):
            _run_block(p, index, kv_heads, group, slice(row, min(row + rows_at_once, q_len)))


def _run_block(
    p: Problem, index: tuple[int, ...], kv_heads: slice, group: int, rows: slice
) -> None:
    real = np.float64 if p.out_code == FLOAT64 else np.float32
    heads = slice(kv_heads.start * group, kv_heads.stop * group)
    positions, keys = _reach(p, index, rows)

    # (kv heads, group · rows, D): the query heads of a group are more rows against its keys.
    query = reals(p.query[index][heads, rows], p.query_code, real)
    shape = (kv_heads.stop - kv_heads.start, group, rows.stop - rows.start)
    stacked = query.reshape(shape[0], shape[1] * shape[2], -1)
    key, value = p.key[index][kv_heads, keys], p.value[index][kv_heads, keys]
    scores = np.empty((*stacked.shape[:2], key.shape[1]), real)
    for some in _key_blocks(key, real):
        scores[..., some] = stacked @ reals(key[:, some], p.key_code, real).swapaxes(-1, -2)
    scores = scores.reshape(*shape, -1)
    scores *= real(p.scale)

    if p.softcap:
        scores = real(p.softcap) * np.tanh(scores / real(p.softcap))
    distance = positions[:, np.newaxis] - np.arange(keys.start, keys.stop)
    if p.alibi_slopes is not None:
        slopes = p.alibi_slopes[index][heads].reshape(*shape[:2], 1, 1)
        scores += (-slopes * np.abs(distance)).astype(real)
    allowed = np.broadcast_to((distance <= p.left) & (-distance <= p.right), scores.shape)
    if p.attn_mask is not None:
        mask = p.attn_mask[index][heads, rows, keys].reshape(scores.shape)
        if mask.dtype == np.bool_:
            allowed = allowed & mask
        else:
            mask = reals(mask, p.mask_code)
            limit = np.finfo(real).max  # a finite bias of a wider type stays finite
            bias = np.where(np.isfinite(mask), np.clip(mask, -limit, limit), mask)
            scores += bias.astype(real)
            allowed = allowed & (mask != -np.inf)
    scores = np.where(allowed, scores, -np.inf).astype(real, copy=False)

    lowest = np.finfo(real).min  # instead of -inf: all excluded, or every visible score is -inf
    row_max = scores.max(axis=-1, keepdims=True, initial=lowest)
    weights = np.exp(scores - row_max)
    row_sum = weights.sum(axis=-1, keepdims=True)
    seen = allowed.any(axis=-1, keepdims=True)
    acc = np.zeros((*shape, value.shape[-1]), real)
    for some in _key_blocks(value, real):
        part = reals(value[:, some], p.value_code, real)
        acc += _mix(weights[..., some], part, allowed[..., some])
    if p.sinks is None:
        result = acc / row_sum
    else:
        sinks = p.sinks[heads].reshape(*shape[:2], 1, 1).astype(real)
        top = np.maximum(row_max, sinks)
        decay = np.exp(row_max - top)
        result = acc * decay / (row_sum * decay + np.exp(sinks - top))
        result = np.where(sinks == np.inf, row_sum * 0, result)
    result = np.where(seen, result, 0).reshape(heads.stop - heads.start, shape[2], -1)
    if p.out_code == BFLOAT16:
        p.out.view(np.uint16)[index][heads, rows] = bfloat16_bits(result)
    else:
        p.out[index][heads, rows] = result
    if p.lse is not None:
        lse = np.where(seen, row_max + np.log(row_sum), -np.inf)
        p.lse[index][heads, rows] = lse.reshape(heads.stop - heads.start, shape[2])


def reals(array: Array, code: int, real: npt.DTypeLike | None = None) -> Array:
    """Return the array as real numbers; bfloat16 is the upper half of a float32."""
    if code & ~SWAPPED == BFLOAT16:
        array = (array.view(array.dtype.str.replace("V", "u")).astype(np.uint32) << 16).view(
            np.float32
        )
    return array if real is None else array.astype(real, copy=False)


def bfloat16_bits(x: Array) -> Array:
    """Return float32 rounded to bfloat16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + (0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def _reach(p: Problem, index: tuple[int, ...], rows: slice) -> tuple[Array, slice]:
    """Return the rows' positions, and the slice of keys that some of them can see."""
    offset = 0 if p.query_offset is None else int(p.query_offset[index])
    stop = p.key.shape[-2] if p.key_lengths is None else int(p.key_lengths[index])
    start = 0
    if p.left < UNBOUNDED:
        start = min(stop, max(0, offset + rows.start - p.left))
    if p.right < UNBOUNDED:
        stop = max(start, min(stop, offset + rows.stop - 1 + p.right + 1))
    return np.arange(offset + rows.start, offset + rows.stop), slice(start, stop)


def _key_blocks(array: Array, real: npt.DTypeLike) -> list[slice]:
    """Return the slices of keys to work on: all at once, unless they have to be converted."""
    kv_len = array.shape[1]
    step = kv_len if array.dtype == real else BLOCK_KEYS
    return [slice(start, start + step) for start in range(0, kv_len, max(1, step))]


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
    odd_keys = np.flatnonzero(~finite.all(axis=(0, 2)))
    clean = np.where(finite, value, 0) if odd_keys.size else value
    acc = (stacked @ clean).reshape(acc_shape)
    for key in odd_keys:
        odd = np.where(finite[:, key], 0, value[:, key])[:, np.newaxis, np.newaxis]
        added = weights[..., key, np.newaxis] * odd
        acc += np.where(allowed[..., key, np.newaxis] & (odd != 0), added, 0)
    return acc
