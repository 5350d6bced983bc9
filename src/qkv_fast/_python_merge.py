"""merge_attention in NumPy, a block of rows at a time. See `_merge`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ._dtypes import BFLOAT16, FLOAT64, SWAPPED, Array, bfloat16_bits, reals

BLOCK_ELEMENTS = 1 << 19  # of the result, computed at a time: 2 MiB of float32


def run(
    outputs: list[Array],
    codes: list[int],
    lses: list[Array],
    sinks: Array | None,
    out: Array,
    out_code: int,
    lse: Array,
    num_threads: int,
) -> None:
    """Merge parts of a result into `out` and `lse`, each of which may be one of the inputs."""
    rows = max(1, BLOCK_ELEMENTS // max(1, out.shape[-1]))
    real = np.float64 if codes[0] & ~SWAPPED == FLOAT64 else np.float32
    bits = out.view(np.uint16) if out_code == BFLOAT16 else out
    with np.errstate(all="ignore"):  # infinities and NaN in the data give what the formula gives
        for at in _blocks(lse.shape, rows):
            result, total = _merge_block(
                [reals(x[at], code, real) for x, code in zip(outputs, codes, strict=True)],
                [part[at] for part in lses],
                None if sinks is None else sinks[at].astype(real),
                real,
            )
            bits[at] = bfloat16_bits(result) if out_code == BFLOAT16 else result
            lse[at] = total


def _merge_block(
    outputs: list[Array], lses: list[Array], sinks: Array | None, real: Any
) -> tuple[Array, Array]:
    """Return the result and the lse of some rows."""
    top: Array = np.full(lses[0].shape, -np.inf, real)
    for lse in lses:
        np.maximum(top, lse, out=top)
    base: Array = np.where(top == -np.inf, 0, top).astype(real)
    total: Array = np.zeros(top.shape, real)
    acc: Array = np.zeros(outputs[0].shape, real)
    for output, lse in zip(outputs, lses, strict=True):
        weight = np.exp(lse - base)
        total += weight
        acc += np.where(weight[..., np.newaxis] == 0, 0, weight[..., np.newaxis] * output)
    denominator = total
    if sinks is not None:
        highest = np.maximum(base, sinks)
        rescale = np.exp(base - highest)
        acc *= rescale[..., np.newaxis]
        denominator = total * rescale + np.exp(sinks - highest)
    result = np.where(total[..., np.newaxis] == 0, 0, acc / denominator[..., np.newaxis])
    if sinks is not None:  # a share of nothing, and NaN stays NaN
        result = np.where((sinks == np.inf)[..., np.newaxis], acc * 0, result)
    return result, base + np.log(total)


def _blocks(shape: tuple[int, ...], rows: int) -> Iterator[tuple[slice, ...]]:
    """Yield what cuts an array of this shape into blocks of at most so many elements."""
    if not shape:
        yield ()
        return
    step = rows // max(1, math.prod(shape[1:]))
    for begin in range(0, shape[0], max(1, step)):
        first = slice(begin, begin + max(1, step))
        for rest in _blocks(shape[1:], rows) if step == 0 else [()]:
            yield (first, *rest)
