"""Which weights are wanted, or sums of them: of what, which stage, heads and rows, by which lse."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._dtypes import FLOAT64, Array
from .arguments import integers, real_array, shown
from .problem import UNBOUNDED, Problem
from .scoring import limit_keys, mask, scoring
from .tensors import dense, without_values

STAGES = ("scaled", "softcapped", "masked", "softmax")


def scores(
    p: Problem,
    query: Any,
    key: Any,
    attn_mask: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
    query_offset: Any,
    window: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    key_lengths: Any,
    dtype: Any,
    attn_bias: Any,
    key_ranges: Any,
    value: Any = None,
) -> None:
    """Set all that the scores of dense queries and keys depend on, and values where given."""
    if value is None:
        without_values(p, query, key, enable_gqa, dtype)
    else:
        dense(p, query, key, value, enable_gqa, dtype)
    if attn_mask is not None:
        mask(p, attn_mask)
    scoring(p, is_causal, scale, query_offset, window, softcap, alibi_slopes, sinks, attn_bias,
            key_ranges)  # fmt: skip
    if key_lengths is not None:
        limit_keys(p, key_lengths)


def selection(p: Problem, stage: Any, rows: Any, heads: Any, lse: Any) -> None:
    """Set what is wanted, after all that the scores depend on: what comes later is undone."""
    if not isinstance(stage, str) or stage not in STAGES:
        raise ValueError(f"stage is {shown(stage)}: it must be one of {', '.join(STAGES)}")
    if lse is not None and stage != "softmax":
        raise ValueError(f"lse is given for the stage {stage!r}: only 'softmax' depends on it")
    choose(p, stage, rows, heads, lse)
    if stage in ("scaled", "softcapped"):
        p.attn_mask, p.mask_code, p.alibi_slopes = None, -1, None
        p.attn_bias, p.bias_code = None, -1
        p.key_begins = p.key_ends = None
        p.left = p.right = UNBOUNDED
    if stage == "scaled":
        p.softcap = 0.0


def choose(p: Problem, stage: str, rows: Any, heads: Any, lse: Any = None) -> None:
    """Set what is computed of which rows and heads, relative to which log-sum-exps."""
    p.stage = stage
    if heads is not None and p.caller_query is not p.query:
        raise ValueError("heads is given, but query and key have no axis of heads")
    p.heads = _numbers("heads", heads, p.query.shape[-3])
    p.rows = _numbers("rows", rows, p.query.shape[-2])
    if lse is not None:
        p.known_lse = _known_lse(p, lse)


def _numbers(name: str, given: Any, count: int) -> Array | None:
    """Return the numbers of some of `count` rows or heads; None for all of them in order."""
    if given is None:
        return None
    if isinstance(given, slice):
        try:
            numbers: Array = np.arange(count, dtype=np.int64)[given]
        except TypeError:
            raise TypeError(f"{name} is {shown(given)}: a slice must be of ints") from None
    else:
        rule = f"each must be from {-count} to {count - 1}, as NumPy's indices are"
        numbers = integers(name, given, "ints or a slice", -count, count - 1, rule)
        if numbers.ndim != 1:
            raise TypeError(
                f"{name} must be ints along one axis or a slice, not of shape {numbers.shape}"
            )
        numbers = np.where(numbers < 0, numbers + count, numbers)
    if len(numbers) == count and (numbers == np.arange(count)).all():
        return None
    return np.ascontiguousarray(numbers)


def _known_lse(p: Problem, given: Any) -> Array:
    """Return the log-sum-exps of the wanted rows, in an array of the problem's own."""
    lse = real_array("lse", given)
    shape = p.caller_query.shape[:-1]
    if lse.shape != shape:
        raise ValueError(
            f"lse has shape {lse.shape}: that of all rows is needed, (*batch, Hq, Lq) = {shape}"
        )
    lse = lse.reshape(p.query.shape[:-1])
    if p.heads is not None:
        lse = lse[..., p.heads, :]
    if p.rows is not None:
        lse = lse[..., p.rows]
    return lse.astype(np.float64 if p.code == FLOAT64 else np.float32)
