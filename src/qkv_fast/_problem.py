"""One normalisation: what the caller gave becomes a Problem, or an error that says what is wrong.

Every refusal of the library is raised here, before any work, whichever engine will compute.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _threads

Array = npt.NDArray[Any]

UNBOUNDED = 1 << 62  # of a window's side
_MAX_OFFSET = 1 << 61
_OVERLAP_WORK = 10_000  # candidates that the search for overlapping elements may look at

# Codes of the element types, as csrc/convert.h numbers them, by NumPy's type number.
FLOAT32, FLOAT64, FLOAT16, BFLOAT16, BOOL, SWAPPED = 0, 1, 2, 3, 4, 8
_CODES = {
    np.dtype(np.float32).num: FLOAT32,
    np.dtype(np.float64).num: FLOAT64,
    np.dtype(np.float16).num: FLOAT16,
}
_UINT16 = np.dtype(np.uint16).num
_ACCEPTED = "float32, float64, float16 or bfloat16"


class Problem:
    """What an engine computes: arrays of one layout, and plain numbers.

    Attributes
    ----------
    query, key, value : ndarray
        (*batch, Hq, Lq, D), (*batch, Hkv, Lk, D), (*batch, Hkv, Lk, Dv); any strides, 0 where an
        axis was broadcast.
    attn_mask : ndarray or None
        (*batch, Hq, Lq, Lk), boolean or floating. bfloat16 may be anywhere as uint16.
    out, lse : ndarray
        (*batch, Hq, Lq, Dv) and (*batch, Hq, Lq): where the answer goes; lse may be None.
    query_code, key_code, value_code, mask_code, out_code : int
        Element types; mask_code is -1 without a mask.
    scale, softcap : float
        softcap is 0.0 for none.
    left, right : int
        Keys position - left to position + right are visible; UNBOUNDED for no bound.
    query_offset, key_lengths : ndarray of int64, (*batch), or None
    alibi_slopes : ndarray of float64, (*batch, Hq), or None
    sinks : ndarray of float64, (Hq,), or None
    num_threads : int
    result, lse_result : ndarray
        What the caller gets: views of out and lse without the axes that were added.
    destination : ndarray or None
        Where `out` is copied to in the end, when it had to be a temporary.
    """

    __slots__ = (
        "alibi_slopes",
        "attn_mask",
        "destination",
        "key",
        "key_code",
        "key_lengths",
        "left",
        "lse",
        "lse_result",
        "mask_code",
        "num_threads",
        "out",
        "out_code",
        "query",
        "query_code",
        "query_offset",
        "result",
        "right",
        "scale",
        "sinks",
        "softcap",
        "value",
        "value_code",
    )

    alibi_slopes: Array | None
    attn_mask: Array | None
    destination: Array | None
    key: Array
    key_code: int
    key_lengths: Array | None
    left: int
    lse: Array | None
    lse_result: Array | None
    mask_code: int
    num_threads: int
    out: Array
    out_code: int
    query: Array
    query_code: int
    query_offset: Array | None
    result: Array
    right: int
    scale: float
    sinks: Array | None
    softcap: float
    value: Array
    value_code: int


def normalize(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any,
    dropout_p: Any,
    is_causal: Any,
    scale: Any,
    enable_gqa: Any,
    query_offset: Any,
    window: Any,
    softcap: Any,
    alibi_slopes: Any,
    sinks: Any,
    key_lengths: Any,
    out: Any,
    return_lse: Any,
    num_threads: Any,
    dtype: Any,
) -> Problem:
    """Check everything, in the order of the facade's parameters, and lay it out for an engine."""
    if type(query) is not np.ndarray:
        query = as_array("query", query)
    if type(key) is not np.ndarray:
        key = as_array("key", key)
    if type(value) is not np.ndarray:
        value = as_array("value", value)

    p = Problem()
    raw = dtype is not None
    dtype_out = query.dtype
    if not raw:
        code = _CODES.get(dtype_out.num, -1)
    else:
        code = BFLOAT16 if dtype == "bfloat16" and dtype_out.num == _UINT16 else -1
    p.query_code = p.key_code = p.value_code = p.out_code = code
    if (code < 0 or key.dtype is not dtype_out or value.dtype is not dtype_out
            or not dtype_out.isnative):  # fmt: skip
        _set_codes(p, query, key, value, dtype)
        dtype_out = dtype_out.newbyteorder("=")

    axes = query.ndim
    batch = query.shape[:-3]
    if not (axes == key.ndim == value.ndim and axes > 2
            and batch == key.shape[:-3] and batch == value.shape[:-3]):  # fmt: skip
        query, key, value, batch, axes = _broadcast(query, key, value)
    num_heads, q_len, head_dim = query.shape[-3:]
    num_kv_heads, kv_len, key_dim = key.shape[-3:]
    value_heads, value_len, v_dim = value.shape[-3:]
    if key_dim != head_dim or head_dim == 0 or value_len != kv_len or value_heads != num_kv_heads:
        _refuse_sizes(query, key, value)
    if enable_gqa is not False:
        enable_gqa = _flag("enable_gqa", enable_gqa)
    if num_heads != num_kv_heads:
        _check_groups(num_heads, num_kv_heads, enable_gqa)
    p.query, p.key, p.value = query, key, value
    heads_shape = (*batch, num_heads)

    p.attn_mask = None
    p.mask_code = -1
    if attn_mask is not None:
        _set_mask(p, attn_mask, (*heads_shape, q_len, kv_len), raw)
    if (type(dropout_p) is not float or dropout_p) and _number("dropout_p", dropout_p) != 0.0:
        raise ValueError(
            f"dropout_p is {dropout_p!r}: it must be 0.0, since this op is for inference"
        )
    p.left = p.right = UNBOUNDED
    if is_causal is not False and _flag("is_causal", is_causal):
        p.right = 0
    p.scale = 1.0 / math.sqrt(head_dim) if scale is None else _number("scale", scale)
    p.query_offset = None
    if query_offset is not None and not (type(query_offset) is int and query_offset == 0):
        p.query_offset = _per_batch("query_offset", query_offset, batch, -_MAX_OFFSET, _MAX_OFFSET)
    if window is not None:
        _set_window(p, window)
    p.softcap = 0.0
    if softcap is not None:
        p.softcap = _number("softcap", softcap)
        if not 0.0 < p.softcap < math.inf:
            raise ValueError(
                f"softcap is {softcap!r}: it must be positive and finite, or None for no cap"
            )
    p.alibi_slopes = None
    if alibi_slopes is not None:
        slopes = _reals("alibi_slopes", alibi_slopes)
        p.alibi_slopes = _broadcast_to("alibi_slopes", slopes, heads_shape, "(*batch, Hq)")
    p.sinks = None
    if sinks is not None:
        p.sinks = np.ascontiguousarray(_reals("sinks", sinks))
        if p.sinks.shape != (num_heads,):
            raise ValueError(
                f"sinks has shape {p.sinks.shape}: one logit for each of {num_heads} query heads "
                f"is needed, ({num_heads},)"
            )
    p.key_lengths = None
    if key_lengths is not None:
        p.key_lengths = _per_batch("key_lengths", key_lengths, batch, 0, kv_len)
    p.num_threads = (
        _threads.get_num_threads() if num_threads is None else _threads.checked(num_threads)
    )
    wants_lse = return_lse is not False and _flag("return_lse", return_lse)
    _set_output(p, out, (*heads_shape, q_len, v_dim), dtype_out, axes, raw)
    p.lse = p.lse_result = None
    if wants_lse:
        lse_dtype = np.float64 if p.out_code == FLOAT64 else np.float32
        p.lse = np.empty((*heads_shape, q_len), lse_dtype)
        p.lse_result = p.lse if axes > 2 else p.lse[0]
    return p


def as_array(name: str, given: Any) -> Array:
    """View what was given as an ndarray, without a copy."""
    if isinstance(given, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a MaskedArray, whose mask would be lost: pass its data and an attn_mask"
        )
    if isinstance(given, np.ndarray):
        return given.view(np.ndarray)
    if hasattr(given, "__array_interface__") or hasattr(given, "__buffer__"):
        return np.asarray(given)
    if hasattr(given, "__dlpack__"):
        try:
            return np.from_dlpack(given)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"{name} is a {type(given).__name__} that NumPy can't view: {error}"
            ) from error
    try:
        return np.asarray(memoryview(given))
    except TypeError:
        raise TypeError(
            f"{name} is a {type(given).__name__}: pass a NumPy array, or an object that NumPy can "
            "view through the buffer protocol, __array_interface__ or DLPack"
        ) from None


def code_of(dtype: np.dtype[Any], raw: bool = False) -> int:
    """Return the code of an element type, or -1; raw: uint16 holds bfloat16."""
    code = _CODES.get(dtype.num, -1)
    if code < 0 and raw and dtype.num == _UINT16:
        code = BFLOAT16
    elif code < 0 and dtype.itemsize == 2 and dtype.name == "bfloat16":
        code = _CODES[dtype.num] = BFLOAT16  # the number that it got when it was registered
    return code if code < 0 or dtype.isnative else code + SWAPPED


def wants_bits(dtype: Any) -> bool:
    """Whether an argument `dtype` says that uint16 holds bfloat16."""
    if dtype is None:
        return False
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = ""
    if name != "bfloat16":
        raise ValueError(
            f"dtype is {dtype!r}: it must be 'bfloat16', where uint16 arrays hold that, or None"
        )
    return True


def _set_codes(p: Problem, query: Array, key: Array, value: Array, dtype: Any) -> None:
    raw = wants_bits(dtype)
    p.query_code, p.key_code, p.value_code = codes = (
        code_of(query.dtype, raw),
        code_of(key.dtype, raw),
        code_of(value.dtype, raw),
    )
    p.out_code = codes[0] & ~SWAPPED
    if raw and any(code & ~SWAPPED != BFLOAT16 for code in codes):
        raise TypeError(
            f"query, key and value have dtypes {query.dtype}, {key.dtype} and {value.dtype}: with "
            "dtype='bfloat16' all three must be uint16 arrays of its bit patterns, or bfloat16"
        )
    if min(codes) < 0 or any(code & ~SWAPPED != p.out_code for code in codes):
        raise TypeError(
            f"query, key and value have dtypes {query.dtype}, {key.dtype} and {value.dtype}: all "
            f"three must have the same one of {_ACCEPTED}"
        )


def _broadcast(
    query: Array, key: Array, value: Array
) -> tuple[Array, Array, Array, tuple[int, ...], int]:
    """Give all three a head axis and the same batch axes; also return the result's axes."""
    given = {"query": query, "key": key, "value": value}
    for name, array in given.items():
        if array.ndim < 2:
            raise ValueError(
                f"{name} has shape {array.shape}: at least two axes are needed, "
                "(..., heads, length, head size) or (length, head size)"
            )
    axes = max(array.ndim for array in given.values())
    query, key, value = (a if a.ndim > 2 else a[np.newaxis] for a in given.values())
    try:
        batch = np.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except ValueError:
        raise ValueError(
            f"query, key and value have batch axes {query.shape[:-3]}, {key.shape[:-3]} and "
            f"{value.shape[:-3]}: they must broadcast"
        ) from None
    query, key, value = (
        np.broadcast_to(a, (*batch, *a.shape[-3:])) for a in (query, key, value)
    )  # fmt: skip
    return query, key, value, batch, axes


def _refuse_sizes(query: Array, key: Array, value: Array) -> None:
    if query.shape[-1] == 0:
        raise ValueError("query has length 0 on axis -1: the head size must be at least 1")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key has length {key.shape[-1]} on axis -1, but query has {query.shape[-1]}: both "
            "must have the same head size"
        )
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"value has length {value.shape[-2]} on axis -2, but key has {key.shape[-2]}: both "
            "must hold the same number of keys"
        )
    raise ValueError(
        f"value has length {value.shape[-3]} on axis -3, but key has {key.shape[-3]}: both must "
        "have the same number of heads"
    )


def _check_groups(num_heads: int, num_kv_heads: int, enable_gqa: Any) -> None:
    if not enable_gqa:
        raise ValueError(
            f"query has {num_heads} heads, but key and value have {num_kv_heads}: they must be "
            "equal, or enable_gqa=True lets groups of query heads share a key head"
        )
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"query has {num_heads} heads, but key and value have {num_kv_heads}: with enable_gqa "
            "the first must be a multiple of the second"
        )


def _set_mask(p: Problem, given: Any, shape: tuple[int, ...], raw: bool) -> None:
    mask = given if type(given) is np.ndarray else as_array("attn_mask", given)
    p.mask_code = BOOL if mask.dtype == np.bool_ else code_of(mask.dtype, raw)
    if p.mask_code < 0:
        raise TypeError(
            f"attn_mask has dtype {mask.dtype}: it must be bool (True = may attend) or {_ACCEPTED} "
            "(added to the scores)"
        )
    p.attn_mask = _broadcast_to("attn_mask", mask, shape, "(*batch, Hq, Lq, Lk)")


def _broadcast_to(name: str, array: Array, shape: tuple[int, ...], meaning: str) -> Array:
    if array.shape == shape:
        return array
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"{name} has shape {array.shape}: it must broadcast to {meaning} = {shape}"
        ) from None


def _flag(name: str, given: Any) -> bool:
    if not isinstance(given, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, not {type(given).__name__}")
    return bool(given)


def _plain(name: str, given: Any) -> Array:
    """Return an array of what was given, as an array, a number or in lists."""
    if isinstance(given, np.ma.MaskedArray):
        raise TypeError(f"{name} is a MaskedArray, whose mask would be lost: pass its data")
    try:
        return np.asarray(given)
    except ValueError:
        raise ValueError(f"{name} is {given!r}: its rows differ in length") from None


def _number(name: str, given: Any) -> float:
    try:
        if isinstance(given, str | bytes | bytearray):
            raise TypeError
        return float(given)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number, not {type(given).__name__}") from None


def _reals(name: str, given: Any) -> Array:
    """Return a float64 array of the real numbers that were given, as an array or in lists."""
    array = _plain(name, given)
    if array.dtype.kind not in "fiu" and code_of(array.dtype) != BFLOAT16:
        raise TypeError(f"{name} has dtype {array.dtype}: real numbers are needed")
    return array.astype(np.float64)


def _per_batch(name: str, given: Any, batch: tuple[int, ...], least: int, most: int) -> Array:
    """Return an int64 array of shape `batch`, its elements between least and most."""
    if isinstance(given, int) and not least <= given <= most:  # before it may overflow int64
        raise ValueError(f"{name} holds {given}: it must be between {least} and {most}")
    array = _plain(name, given)
    if array.dtype.kind not in "iu" and not (array.size == 0 and isinstance(given, list | tuple)):
        kind = type(given).__name__ if array.ndim == 0 else f"array of {array.dtype}"
        raise TypeError(f"{name} must be an int, or ints for each batch entry, not {kind}")
    if array.size:
        low, high = int(array.min()), int(array.max())
        if low < least or high > most:
            wrong = low if low < least else high
            raise ValueError(f"{name} holds {wrong}: it must be between {least} and {most}")
    return _broadcast_to(name, array.astype(np.int64), batch, "the batch axes")


def _set_window(p: Problem, window: Any) -> None:
    try:
        left, right = window
    except (TypeError, ValueError):
        raise TypeError(
            f"window is {window!r}: it must be a pair (left, right) of ints or None"
        ) from None
    p.left = _window_side("left", left)
    p.right = min(p.right, _window_side("right", right))


def _window_side(name: str, given: Any) -> int:
    if given is None:
        return UNBOUNDED
    try:
        side = operator.index(given)
    except TypeError:
        raise TypeError(f"window's {name} side is {given!r}: it must be an int or None") from None
    if side < 0:
        raise ValueError(
            f"window's {name} side is {side}: it must be at least 0, or None for no bound "
            "(which flash-attn writes as -1)"
        )
    return min(side, UNBOUNDED)


def _set_output(
    p: Problem,
    out: Any,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    axes: int,
    raw: bool,
) -> None:
    """Choose where the engine writes and what the caller gets."""
    query = p.query
    p.destination = None
    if out is None:
        if query.flags.c_contiguous or query.ndim != len(shape) or _repeats(query):
            p.out = np.empty(shape, dtype)
        else:
            p.out = np.empty_like(query, dtype=dtype, shape=shape)
        p.result = p.out if axes > 2 else p.out[0]
        return
    expected = shape if axes > 2 else shape[1:]
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out must be a NumPy array, not {type(out).__name__}")
    if out.shape != expected:
        raise ValueError(f"out has shape {out.shape}: the result's shape is {expected}")
    if code_of(out.dtype, raw) & ~SWAPPED != p.out_code:
        raise TypeError(f"out has dtype {out.dtype}: the result's dtype is {dtype}")
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    p.result = out
    if type(out) is not np.ndarray:
        out = out.view(np.ndarray)
    p.out = out if axes > 2 else out[np.newaxis]
    inputs = (query, p.key, p.value, p.attn_mask, p.alibi_slopes, p.sinks, p.query_offset,
              p.key_lengths)  # fmt: skip
    if (
        not out.dtype.isnative
        or (not out.flags.c_contiguous and (_repeats(out) or (out.size and _overlaps_itself(out))))
        or any([a is not None and _in_the_way(p.out, a, a is query) for a in inputs])
    ):
        p.destination = p.out
        p.out = np.empty(shape, dtype)


def _repeats(array: Array) -> bool:
    """Whether some axis shows the same memory more than once."""
    return any(s == 0 and n > 1 for s, n in zip(array.strides, array.shape, strict=True))


def _overlaps_itself(array: Array) -> bool:
    """Whether elements may overlap; contiguous memory in some order of the axes never does."""
    if array.flags.c_contiguous or array.flags.f_contiguous:
        return False
    reach = array.itemsize
    for stride, length in sorted((abs(s), n) for s, n in zip(array.strides, array.shape,
                                                             strict=True) if n > 1):  # fmt: skip
        if stride < reach:
            return True
        reach = stride * (length - 1) + reach
    return False


def _same_memory(a: Array, b: Array) -> bool:
    return (
        a.shape == b.shape
        and a.strides == b.strides
        and a.ctypes.data == b.ctypes.data
        and a.dtype == b.dtype
    )


def _in_the_way(out: Array, array: Array, is_query: bool) -> bool:
    """Whether writing `out` may change what is still to be read of an input.

    A task reads all its queries before it writes their rows, so `out` may be `query` itself.
    """
    if not np.may_share_memory(out, array) or (is_query and _same_memory(out, array)):
        return False
    try:
        return bool(np.shares_memory(out, array, max_work=_OVERLAP_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
