"""The products around attention, x Wᵀ + b, on the engine in force."""

from __future__ import annotations

import numpy as np

from . import _dispatch
from ._dtypes import FLOAT32, FLOAT64, Array, reals
from ._threads import get_num_threads

BLOCK_BYTES = 1 << 20  # of a 16-bit weight, converted at a time by the Python engine


def linear(
    x: Array, weight: Array, code: int, bias: Array | None, out: Array, num_threads: int | None
) -> None:
    """Compute out = x weightᵀ + bias.

    x is (rows, depth), weight (features, depth), bias (features,), out (rows, features), all with
    unit stride on the last axis. x, bias and out are float32, or float64 where weight is; code is
    weight's element type.
    """
    runner = _dispatch.runner_of(FLOAT64 if out.dtype == np.float64 else FLOAT32)
    threads = get_num_threads() if num_threads is None else num_threads
    runner.linear(x, weight, code, bias, out, threads)


def python_linear(
    x: Array, weight: Array, code: int, bias: Array | None, out: Array, num_threads: int
) -> None:
    """Compute it in NumPy, whose BLAS has threads of its own."""
    with np.errstate(all="ignore"):
        if weight.dtype == out.dtype:
            np.matmul(x, weight.T, out=out)
        else:
            step = max(1, BLOCK_BYTES // (4 * max(1, weight.shape[1])))
            for begin in range(0, len(weight), step):
                block = slice(begin, begin + step)
                np.matmul(x, reals(weight[block], code, out.dtype).T, out=out[:, block])
        if bias is not None:
            out += bias
