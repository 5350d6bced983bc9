"""Sums of the oracle's weights, in NumPy: attention received, and statistics of the rows.

It imports nothing from the package. `real` is as in oracle.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle


def selected(x: np.ndarray, rows: Any = None, heads: Any = None, ends: int = 0) -> np.ndarray:
    """Return some rows and heads of (..., H, Lq) with `ends` axes behind."""
    tail = (slice(None),) * ends
    if rows is not None:
        x = x[(..., rows if isinstance(rows, slice) else np.array(rows, int), *tail)]
    if heads is not None:
        number = heads if isinstance(heads, slice) else np.array(heads, int)
        x = x[(..., number, slice(None), *tail)]
    return x


def received(
    query: Any, key: Any, *, rows: Any = None, heads: Any = None, real: Any = np.float64, **options
) -> np.ndarray:
    """Return the sums of the weights over the queries, (..., H, Lk)."""
    w = oracle.weights(query, key, real=real, **options)
    return selected(w, rows, heads, 1).sum(axis=-2, dtype=real)


def statistics(
    query: Any,
    key: Any,
    *,
    rows: Any = None,
    heads: Any = None,
    sinks: Any = None,
    query_offset: Any = 0,
    real: Any = np.float64,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Return each number by its name, (..., H, Lq), and under "weights" the weights themselves."""
    options["query_offset"] = query_offset
    w = oracle.weights(query, key, sinks=sinks, real=real, **options)
    p = oracle.weights(query, key, real=real, **options)  # what goes to keys alone
    kv_len = p.shape[-1]
    key_at = np.arange(kv_len)
    offset = np.asarray(query_offset)[..., None, None] if np.ndim(query_offset) else query_offset
    position = np.broadcast_to(offset + np.arange(p.shape[-2]), p.shape[:-1])[..., None]
    with np.errstate(all="ignore"):
        logs = np.where(p > 0, np.log2(np.where(p > 0, p, 1)), np.where(np.isnan(p), np.nan, 0))
        distance = np.abs(position - key_at).astype(real)
        answer = {
            "entropy": -(p * logs).sum(axis=-1) + 0,
            "max_weight": w.max(axis=-1, initial=0),
            "mean_distance": (p * distance).sum(axis=-1),
        }
    places = {"first": 0 * position, "self": position, "previous": position - 1,
              "next": position + 1}  # fmt: skip
    for name, place in places.items():
        answer[f"on_{name}"] = np.where(key_at == place, w, 0).sum(axis=-1)
    answer = {name: selected(x, rows, heads) for name, x in answer.items()}
    return answer | {"weights": selected(w, rows, heads, 1)}
