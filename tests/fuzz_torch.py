"""torch's scaled_dot_product_attention in float64, as a second judge of tests/fuzz.py."""

from __future__ import annotations

from typing import Any

import numpy as np


def attention(query: Any, key: Any, value: Any, options: dict[str, Any]) -> np.ndarray | None:
    """Return what torch gives for a dense problem in float64, or None if torch has no such call.

    Positions, ranges, lengths, ALiBi and a bias become one floating mask. A sink becomes one more
    key of the score that it has, whose value is 0. torch has no softcap, and rows that meet NaN or
    infinities are the oracle's to judge.
    """
    import torch

    if options.get("softcap") is not None or not query.size or not value.size:
        return None
    if not all(np.isfinite(x).all() for x in (query, key, value)):
        return None
    flat = max(query.ndim, key.ndim, value.ndim) == 2
    q, k, v = (x[np.newaxis] if x.ndim == 2 else x for x in (query, key, value))
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    q, k, v = (np.broadcast_to(x, (*batch, *x.shape[-3:])) for x in (q, k, v))
    heads, q_len, kv_len = *q.shape[-3:-1], k.shape[-2]
    added = _mask((*batch, heads, q_len, kv_len), options)
    if added is None:
        return None
    sees = (added > -np.inf).any(axis=-1, keepdims=True)
    sinks = options.get("sinks")
    if sinks is not None:
        if not np.isfinite(sinks).all():
            return None
        column = np.broadcast_to(np.asarray(sinks)[:, None, None], (*added.shape[:-1], 1))
        added = np.concatenate([added, column], axis=-1)
        k, v = (
            np.concatenate([x, np.zeros((*x.shape[:-2], 1, x.shape[-1]))], axis=-2) for x in (k, v)
        )
    out = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(np.array(x)) for x in (q, k, v, added)),
        scale=_scale(options, q.shape[-1]),
        enable_gqa=True,
    ).numpy()
    out = np.where(sees, out, 0.0)
    return out[0] if flat else out


def _scale(options: dict[str, Any], head_dim: int) -> float:
    scale = options.get("scale")
    return float(head_dim**-0.5 if scale is None else scale)


def _mask(shape: tuple[int, ...], options: dict[str, Any]) -> np.ndarray | None:
    """Return what is added to the scores, -inf for an excluded key; None if it is not finite."""
    batch, q_len, kv_len = shape[:-3], *shape[-2:]
    added = np.zeros(shape)
    hidden = np.zeros(shape, bool)
    for name in ("attn_mask", "attn_bias"):
        x = options.get(name)
        if x is None:
            continue
        if x.dtype == bool:
            hidden |= ~x
        else:
            if np.isnan(x).any() or (x == np.inf).any() or (x < -1e300).any(where=x > -np.inf):
                return None
            added += x
    per_entry = (*batch, 1, 1, 1)
    offset = np.broadcast_to(options.get("query_offset", 0), batch).reshape(per_entry)
    row, column = np.indices((q_len, kv_len))
    distance = column - (offset + row)  # of a key behind the query
    if options.get("is_causal"):
        hidden |= distance > 0
    left, right = options.get("window") or (None, None)
    if left is not None:
        hidden |= distance < -left
    if right is not None:
        hidden |= distance > right
    if options.get("key_lengths") is not None:
        hidden |= column >= np.broadcast_to(options["key_lengths"], batch).reshape(per_entry)
    begin, end = options.get("key_ranges") or (None, None)
    if begin is not None:
        hidden |= column < np.asarray(begin)[..., None]
    if end is not None:
        hidden |= column >= np.asarray(end)[..., None]
    if options.get("alibi_slopes") is not None:
        slopes = np.broadcast_to(options["alibi_slopes"], shape[:-2])[..., None, None]
        added -= slopes * np.abs(distance)
    return np.where(hidden, -np.inf, added)
