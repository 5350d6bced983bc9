"""What the scores depend on besides the tensors: masks, positions and modifiers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .._dtypes import ACCEPTED, BOOL, Array, code_of, uint16_hint
from .arguments import (
    as_array,
    broadcast_to,
    flag,
    integer,
    integers,
    per_batch,
    real,
    real_array,
    shown,
)
from .problem import UNBOUNDED, Problem

_MAX_OFFSET = 1 << 61
_INT64 = np.iinfo(np.int64)


def mask(p: Problem, attn_mask: Any) -> None:
    """Set the mask."""
    array = attn_mask if type(attn_mask) is np.ndarray else as_array("attn_mask", attn_mask)
    p.mask_code = BOOL if array.dtype == np.bool_ else code_of(array.dtype, p.uint16_is_bf16)
    if p.mask_code < 0:
        raise TypeError(
            f"attn_mask has dtype {array.dtype}: it must be bool (True = may attend) or {ACCEPTED} "
            f"(added to the scores){uint16_hint(array.dtype)}"
        )
    shape = (*p.query.shape[:-1], p.kv_len)
    cure = ""
    if len(shape) == 4 and array.shape == (shape[0], shape[-1]):
        cure = "; pass a padding mask of shape (batch, Lk) as mask[:, None, None]"
    p.attn_mask = broadcast_to("attn_mask", array, shape, "(*batch, Hq, Lq, Lk)", cure)


def _bias(p: Problem, attn_bias: Any) -> None:
    array = as_array("attn_bias", attn_bias)
    p.bias_code = code_of(array.dtype, p.uint16_is_bf16)
    if p.bias_code < 0:
        cure = ""
        if array.dtype == np.bool_:
            cure = "; a boolean mask is an attn_mask"
        raise TypeError(
            f"attn_bias has dtype {array.dtype}: it must be {ACCEPTED}{uint16_hint(array.dtype)}"
            f"{cure}"
        )
    *batch, num_heads, q_len, _ = p.query.shape
    if p.query_lengths is not None:
        q_len = int(p.query_lengths.max(initial=0))
    shape = (*batch, num_heads, q_len, p.kv_len)
    p.attn_bias = broadcast_to("attn_bias", array, shape, "(*batch, Hq, Lq, Lk)")


def no_dropout(dropout_p: Any) -> None:
    """Raise unless `dropout_p` is 0.0."""
    if real("dropout_p", dropout_p) != 0.0:
        raise ValueError(
            f"dropout_p is {dropout_p!r}: it must be 0.0, since this op is for inference"
        )


def scoring(
    p: Problem,
    is_causal: Any = False,
    scale: Any = None,
    query_offset: Any = None,
    window: Any = None,
    softcap: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    attn_bias: Any = None,
    key_ranges: Any = None,
) -> None:
    """Set the modifiers of the scores and what a query can see by its position or its range.

    Without a query_offset the last query stands where the last key does, if `p` has key_lengths;
    else the first query stands at 0.
    """
    if is_causal is not False and flag("is_causal", is_causal):
        p.right = 0
    p.scale = 1.0 / math.sqrt(p.query.shape[-1]) if scale is None else real("scale", scale)
    if query_offset is not None and not (type(query_offset) is int and query_offset == 0):
        p.query_offset = per_batch(
            "query_offset", query_offset, p.query.shape[:-3], -_MAX_OFFSET, _MAX_OFFSET
        )
    if window is not None:
        p.left, right = window_sides(window)
        p.right = min(p.right, right)
    if softcap is not None:
        p.softcap = real("softcap", softcap)
        if not 0.0 <= p.softcap < math.inf:
            raise ValueError(
                f"softcap is {softcap!r}: it must be positive and finite, or None or 0 for no cap"
            )
    if alibi_slopes is not None:
        slopes = real_array("alibi_slopes", alibi_slopes)
        shape = p.query.shape[:-2]
        p.alibi_slopes = broadcast_to("alibi_slopes", slopes, shape, "(*batch, Hq)")
    if sinks is not None:
        p.sinks = real_array("sinks", sinks)
        num_heads = p.query.shape[-3]
        if p.sinks.shape != (num_heads,):
            raise ValueError(
                f"sinks has shape {p.sinks.shape}: one logit for each of {num_heads} query heads "
                f"is needed, ({num_heads},)"
            )
    if attn_bias is not None:
        _bias(p, attn_bias)
    if key_ranges is not None:
        _ranges(p, key_ranges)
    if (
        query_offset is None
        and p.key_lengths is not None
        and (p.left < UNBOUNDED or p.right < UNBOUNDED or alibi_slopes is not None)
    ):  # only then: it takes a third of the time that KVCache.attend spends in Python
        p.query_offset = p.key_lengths - (
            p.query.shape[-2] if p.query_lengths is None else p.query_lengths
        )


def _ranges(p: Problem, key_ranges: Any) -> None:
    """Set which keys each row sees at most; a pair of None sets no bound."""
    try:
        begin, end = key_ranges
    except (TypeError, ValueError):
        raise TypeError(
            f"key_ranges is {shown(key_ranges)}: it must be a pair (begin, end) of ints, arrays of "
            "ints or None"
        ) from None
    if begin is None and end is None:
        return
    p.key_begins = _range_end(p, "key_ranges[0]", 0 if begin is None else begin)
    p.key_ends = _range_end(p, "key_ranges[1]", p.kv_len if end is None else end)


def _range_end(p: Problem, name: str, given: Any) -> Array:
    """Return one end of the rows' ranges, limited to the keys that there are."""
    rule = "it must be an int64; what is beyond the keys is limited to them"
    what = "an int, or ints for each row of queries"
    array = integers(name, given, what, _INT64.min, _INT64.max, rule).clip(0, p.kv_len)
    shape, meaning, cure = p.query.shape[:-1], "(*batch, Hq, Lq)", ""
    if p.query_starts is not None:
        meaning = "(Hq, total_q)"
        return np.broadcast_to(broadcast_to(name, array, shape[1:], meaning), shape)
    if len(shape) == 3 and array.shape == (shape[0], shape[2]):
        cure = "; pass ranges of shape (batch, Lq) as x[:, None]"
    return broadcast_to(name, array, shape, meaning, cure)


def window_sides(window: Any) -> tuple[int, int]:
    """Return both sides of a window; UNBOUNDED for none, or for one that is as wide."""
    try:
        left, right = window
    except (TypeError, ValueError):
        raise TypeError(
            f"window is {shown(window)}: it must be a pair (left, right) of ints or None"
        ) from None
    return _window_side("left", left), _window_side("right", right)


def _window_side(name: str, given: Any) -> int:
    if given is None:
        return UNBOUNDED
    rule = "it must be at least 0, or None for no bound (which flash-attn writes as -1)"
    side = integer(f"window's {name} side", given, 0, what="an int or None", rule=rule, bools=True)
    return min(side, UNBOUNDED)


def limit_keys(p: Problem, key_lengths: Any) -> None:
    """Set how many keys each batch entry has, of those that its tensors hold."""
    lengths = per_batch("key_lengths", key_lengths, p.query.shape[:-3], 0, p.kv_len)
    if p.key_lengths is not None and (lengths > p.key_lengths).any():
        i = int(np.argmax(lengths > p.key_lengths))
        raise ValueError(
            f"key_lengths holds {lengths[i]} for sequence {i}, which has {p.key_lengths[i]} keys"
        )
    p.key_lengths = lengths
