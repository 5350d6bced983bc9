"""Weights that a caller gives, for pictures and statistics: checked before any work."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import numpy as np

from ._dtypes import BFLOAT16, SWAPPED, Array, code_of, widened
from ._problem.arguments import plain


def real_weights(given: Any, dimensions: Container[int], accepted: str, dtype: Any = None) -> Array:
    """Return weights as an array of real numbers, of a dtype if one is given.

    `dimensions` are the numbers of axes that are accepted; `accepted` ends the message that refuses
    others.
    """
    array = plain("weights", given)
    if code_of(array.dtype) & ~SWAPPED == BFLOAT16:
        array = widened(array)
    elif array.dtype.kind not in "fiu":
        raise TypeError(f"weights have dtype {array.dtype}: real numbers are needed")
    if array.ndim not in dimensions:
        raise ValueError(f"weights have shape {array.shape}: they must be {accepted}")
    if 0 in array.shape:
        raise ValueError(f"weights have shape {array.shape}: no axis may be empty")
    if dtype is not None:
        array = array.astype(dtype, copy=False)
    least, largest = float(array.min()), float(array.max())  # NaN if there is one
    if not (np.isfinite(least) and np.isfinite(largest)):
        wrong = least if not np.isfinite(least) else largest
        raise ValueError(f"weights hold {wrong}: all must be finite")
    if least < 0:
        raise ValueError(
            f"weights hold {least:.6g}: none may be negative; of scores, take a softmax first"
        )
    return array
