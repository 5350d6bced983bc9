"""The norm of models: rows divided by the root of their mean square."""

from __future__ import annotations

import numpy as np

from ._dtypes import Array


def rms_norm(x: Array, weight: Array, epsilon: float, out: Array | None = None) -> Array:
    """Return x / sqrt(mean(x²) + epsilon) · weight over the last axis (Zhang and Sennrich 2019)."""
    real = x.dtype.type
    factor = np.einsum("...d,...d->...", x, x)[..., np.newaxis]
    factor /= real(x.shape[-1])
    factor += real(epsilon)
    y: Array = np.divide(x, np.sqrt(factor, factor), out=out)
    y *= weight
    return y
