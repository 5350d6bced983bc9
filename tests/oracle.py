"""The formula over whole matrices, in NumPy, and the tolerance rule that judges results by it.

It imports nothing from the package. `attention` computes in float64 by default. With `real` set to
the precision of a call it is the "plain computation in the same precision" of the rule.
"""

from __future__ import annotations

from typing import Any

import numpy as np

FLOAT16_LIKE = ("float16", "bfloat16")


def attention(
    query: Any, key: Any, value: Any, *, sinks: Any = None, real: Any = np.float64, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Return (out, lse) of (..., H, L, D) arrays in `real`; head counts give the groups.

    `options` are those of `scores`.
    """
    q, k, v = (np.asarray(x).astype(real) for x in (query, key, value))
    flat = max(q.ndim, k.ndim, v.ndim) == 2
    q, k, v = (x[np.newaxis] if x.ndim == 2 else x for x in (q, k, v))
    v = np.repeat(v, q.shape[-3] // max(1, k.shape[-3]), axis=-3)
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])

    with np.errstate(all="ignore"):
        s, allowed = scores(np.broadcast_to(q, (*batch, *q.shape[-3:])), k, real=real, **options)
        some = allowed.any(axis=-1, keepdims=True)
        weights, m, total = softmax(s, sinks, real)
        lse = np.where(some, m + np.log(total), -np.inf)[..., 0]
        # An excluded key adds nothing, even if its value is NaN: 0 * NaN must not be computed.
        v = np.broadcast_to(v, (*batch, *v.shape[-3:]))
        out = weights @ np.where(np.isfinite(v), v, 0)
        for index in np.argwhere(~np.isfinite(v)):
            *lead, n, d = map(int, index)
            rows = allowed[(*lead, slice(None), n)]
            out[(*lead, rows, d)] += weights[(*lead, rows, n)] * v[(*lead, n, d)]
        out = np.where(some, out, 0)
    return (out[0], lse[0]) if flat else (out, lse)


def weights(
    query: Any,
    key: Any,
    *,
    stage: str = "softmax",
    sinks: Any = None,
    real: Any = np.float64,
    **options: Any,
) -> np.ndarray:
    """Return what `attention_weights` returns of (..., H, L, D) arrays, in `real`."""
    q, k = (np.asarray(x).astype(real) for x in (query, key))
    if max(q.ndim, k.ndim) == 2:
        more = {"stage": stage, "sinks": sinks, "real": real}
        return weights(q[np.newaxis], k[np.newaxis], **more, **options)[0]
    if stage in ("scaled", "softcapped"):  # before positions and masks: all keys that there are
        kept = ("scale", "key_lengths", *(["softcap"] if stage == "softcapped" else []))
        options = {name: options[name] for name in kept if name in options}
    with np.errstate(all="ignore"):
        s, allowed = scores(q, k, real=real, **options)
        return np.where(allowed, softmax(s, sinks, real)[0], 0) if stage == "softmax" else s


def scores(
    q: np.ndarray,
    k: np.ndarray,
    attn_mask: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    query_offset: Any = 0,
    window: Any = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    attn_bias: Any = None,
    key_ranges: Any = None,
    key_lengths: Any = None,
    real: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of the softmax, -inf where a key is excluded, and which are not."""
    heads, q_len, kv_len = q.shape[-3], q.shape[-2], k.shape[-2]
    k = np.repeat(k, heads // max(1, k.shape[-3]), axis=-3)
    batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3])
    s = q @ np.swapaxes(k, -1, -2)
    s = s * real(q.shape[-1] ** -0.5 if scale is None else scale)
    s = np.broadcast_to(s, (*batch, heads, q_len, kv_len))
    if softcap is not None:
        s = real(softcap) * np.tanh(s / real(softcap))

    offset = np.broadcast_to(query_offset, batch)[..., None, None, None]
    position = offset + np.arange(q_len)[:, None]
    j = np.arange(kv_len)
    if alibi_slopes is not None:
        slopes = np.broadcast_to(alibi_slopes, (*batch, heads))[..., None, None]
        s = s + (-slopes * np.abs(position - j)).astype(real)
    allowed = np.ones(s.shape, bool)
    if attn_mask is not None:
        mask = np.asarray(attn_mask)
        if mask.dtype == bool:
            allowed &= mask
        else:
            allowed &= mask != -np.inf
            s = s + mask.astype(real)
    if attn_bias is not None:
        bias = np.asarray(attn_bias)
        allowed &= bias != -np.inf
        s = s + bias.astype(real)
    if key_ranges is not None:
        begin, end = (None if x is None else np.asarray(x)[..., None] for x in key_ranges)
        if begin is not None:
            allowed &= j >= begin
        if end is not None:
            allowed &= j < end
    if is_causal:
        allowed &= j <= position
    if window is not None:
        left, right = window
        if left is not None:
            allowed &= j >= position - left
        if right is not None:
            allowed &= j <= position + right
    if key_lengths is not None:
        allowed &= j < np.broadcast_to(key_lengths, batch)[..., None, None, None]
    return np.where(allowed, s, -np.inf), allowed


def softmax(s: np.ndarray, sinks: Any, real: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the weights and, without the sinks, the maximum and the sum relative to it."""
    m = np.max(s, axis=-1, keepdims=True, initial=np.finfo(real).min)
    p = np.exp(s - m)
    total = p.sum(axis=-1, keepdims=True)
    whole = total
    if sinks is not None:
        whole = total + np.exp(np.asarray(sinks, real)[:, None, None] - m)
    return p / whole, m, total


def assert_close(
    actual: np.ndarray,
    query: Any,
    key: Any,
    value: Any,
    *,
    largest_score: float = 0.0,
    **options: Any,
) -> None:
    """Check that the error is at most twice that of a plain computation in the same precision.

    `largest_score` adds a tolerance: a weight is no more exact than the last place of its score.
    ALiBi adds it by itself, since it makes scores large. The plain computation can round less
    there: slopes such as 0.5 are exact in it, but not in the units of log2 that the native engine
    computes in.
    """
    dtype = np.asarray(query).dtype.newbyteorder("=")
    assert actual.dtype == dtype
    exact, _ = attention(query, key, value, **options)
    real = np.float32 if dtype.name in FLOAT16_LIKE else dtype.type
    plain = attention(query, key, value, real=real, **options)[0].astype(dtype)
    largest = largest_score
    if options.get("alibi_slopes") is not None and exact.size:
        ends = np.asarray(options.get("query_offset", 0)) + np.array([[0], [query.shape[-2]]])
        distance = np.abs(ends[..., np.newaxis] - [0, key.shape[-2]]).max()
        largest += float(np.abs(options["alibi_slopes"]).max() * distance)
    assert_error_at_most_twice(actual, plain, exact, largest)


def assert_error_at_most_twice(
    actual: np.ndarray, plain: np.ndarray, exact: np.ndarray, largest_score: float = 0
) -> None:
    """Check the rule, with a floor of some units in the last place of the largest number."""
    assert actual.shape == exact.shape
    with np.errstate(all="ignore"):
        exact_here = exact.astype(actual.dtype).astype(np.float64)
    got = actual.astype(np.float64)
    odd = ~np.isfinite(exact_here)
    np.testing.assert_array_equal(got[odd], exact_here[odd])
    if odd.all():
        return
    eps = 2.0**-7 if actual.dtype.name == "bfloat16" else float(np.finfo(actual.dtype).eps)
    # The oracle is no more exact than a float64 result, so only the floor judges that.
    units = 64 if actual.dtype == np.float64 else 4
    score_eps = float(np.finfo(np.float64 if actual.dtype == np.float64 else np.float32).eps)
    floor = (units * eps + largest_score * score_eps) * max(1e-30, float(np.abs(exact[~odd]).max()))
    plain_error = np.abs(plain.astype(np.float64)[~odd] - exact[~odd])
    plain_error = float(np.max(plain_error, where=np.isfinite(plain_error), initial=0))
    error = float(np.abs(got[~odd] - exact[~odd]).max())
    assert error <= 2 * plain_error + floor, (error, plain_error, floor)
