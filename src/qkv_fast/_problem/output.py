"""Where the answer goes: new arrays, or the caller's memory if the engine can write there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .._dtypes import (
    BFLOAT16,
    CODES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    SWAPPED,
    UINT16,
    Array,
    code_of,
    dtype_name,
    named,
    result_dtype,
)
from .._memory import available_memory
from .._options import Progress
from .._threads import checked, get_num_threads
from .arguments import as_array, flag, is_tensor, shown
from .problem import Problem

STATISTICS = 8  # numbers for each row
NARROW = (FLOAT16, BFLOAT16)

_SMALL = 1 << 28  # bytes of weights up to which the available memory is not looked up
_OVERLAP_WORK = 10_000  # candidates that np.shares_memory may look at


def output(p: Problem, out: Any, return_lse: Any, num_threads: Any, out_dtype: Any = None) -> None:
    """Set what the engine writes to and what the caller gets, with how many threads."""
    p.num_threads = get_num_threads() if num_threads is None else checked(num_threads)
    wants_lse = return_lse is not False and flag("return_lse", return_lse)
    like = p.caller_query
    dtype = like.dtype
    if p.out_code == BFLOAT16 or p.query_code != p.out_code:
        dtype = result_dtype(dtype)
    if out_dtype is not None:
        own = p.out_code
        p.out_code = result_code(out_dtype, own, "query", (FLOAT32,) if own in NARROW else ())
        if p.out_code != own:
            dtype = np.dtype(np.float32)
    shape = like.shape[:-1] + p.value.shape[-1:]
    if out is None:
        if like.flags.c_contiguous or repeats(like):
            rows = np.empty(shape, dtype)
        else:
            rows = np.empty_like(like, dtype=dtype, shape=shape)
        p.result = rows
    else:
        rows = _given(p, out, shape, dtype)
    p.out = rows if like is p.query else _as_batch(p, rows)
    if wants_lse:
        lse: Array = np.empty(shape[:-1], np.float64 if p.code == FLOAT64 else np.float32)
        p.lse_result = lse
        p.lse = lse if like is p.query else _as_batch(p, lse)


def watch(p: Problem, progress: Progress) -> None:
    """Set the function that is told of the call's progress."""
    if not callable(progress):
        raise TypeError(
            f"progress is {shown(progress)}: it must be a function of (done, total), or None"
        )
    p.progress = progress


def output_of_weights(p: Problem, out: Any, num_threads: Any) -> None:
    """Set the same for the weights, the scores or their sums of a problem with a selection."""
    p.num_threads = get_num_threads() if num_threads is None else checked(num_threads)
    is_double = p.code == FLOAT64 or p.stage == "statistics"
    p.out_code = FLOAT64 if is_double else FLOAT32
    dtype: np.dtype[Any] = np.dtype(np.float64 if is_double else np.float32)
    *batch, num_heads, q_len, _ = p.query.shape
    num_heads = num_heads if p.heads is None else len(p.heads)
    q_len = q_len if p.rows is None else len(p.rows)
    shape = (*batch, num_heads, q_len, p.kv_len)
    if p.stage == "received":
        shape = (*batch, num_heads, p.kv_len)
    elif p.stage == "statistics":
        shape = (*batch, num_heads, q_len, STATISTICS)
    if p.caller_query is not p.query:
        shape = shape[1:]
    if out is None:
        p.result = rows = _new(shape, dtype)
    else:
        rows = _given(p, out, shape, dtype)
    if p.caller_query is not p.query:
        rows = _as_batch(p, rows)
    p.out = rows[..., np.newaxis, :] if p.stage == "received" else rows


def _new(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return an array, or raise where it would not fit into memory."""
    size = math.prod(shape) * dtype.itemsize
    available = available_memory() if size > _SMALL else None
    if available is None or size <= available:
        try:
            return np.empty(shape, dtype)
        except (MemoryError, ValueError):  # ValueError: more bytes than NumPy can count
            pass
    free = "no memory is" if available is None else f"{available / 1e9:.1f} GB are"
    raise MemoryError(
        f"the weights of shape {shape} take {size / 1e9:.1f} GB, but {free} available for them: "
        "compute fewer at a time with rows= and heads="
    )


def _as_batch(p: Problem, rows: Array) -> Array:
    """Show results that are laid out as the caller's query as those of a batch."""
    if p.query_starts is None:  # one head: (Lq, Dv), (Lq,)
        return rows[np.newaxis]
    rows = rows.swapaxes(0, 1)  # packed: (total, Hq, Dv), (total, Hq)
    shape, strides = (len(p.query_starts), *rows.shape), (0, *rows.strides)
    return np.lib.stride_tricks.as_strided(rows, shape, strides, writeable=True)


def _given(p: Problem, out: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Check the caller's `out`; return what the engine writes to instead, or its own memory."""
    p.result = out
    array = checked_out("out", out, shape, dtype, p.out_code, p.uint16_is_bf16)
    if _can_be_written_to(p, array):
        return array
    p.target = array  # of its own dtype: uint16 and bfloat16 differ for NumPy
    native = array.dtype.newbyteorder("=")
    p.temporary = _new(shape, native) if p.stage else np.empty(shape, native)
    return p.temporary


def result_code(out_dtype: Any, own: int, of: str, others: tuple[int, ...]) -> int:
    """Return the code of the result's element type: that of `of`, or one of the others."""
    code = CODES.get(dtype_name(out_dtype), -1)
    if code != own and code not in others:
        names = {code: name for name, code in CODES.items()}
        *rest, last = (repr(names[code]) for code in (*others, own))
        wanted = f"{', '.join(rest)} or {last}" if rest else last
        raise ValueError(
            f"out_dtype is {shown(out_dtype)}: for {of} of {names[own]} it must be {wanted}"
        )
    return code


def checked_out(
    name: str,
    out: Any,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    code: int,
    uint16_is_bf16: bool,
) -> Array:
    """Return the memory that the caller wants a result in, a view of it if it is a tensor's."""
    if type(out) is not np.ndarray:
        known = is_tensor(out) or isinstance(out, np.ndarray)
        if not known or isinstance(out, np.ma.MaskedArray):
            raise TypeError(f"{name} must be a NumPy array or a tensor, not {type(out).__name__}")
        out = as_array(name, out, in_place=True)
    array: Array = out
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}: the result's shape is {shape}")
    if code_of(array.dtype, uint16_is_bf16 or dtype is UINT16) & ~SWAPPED != code:
        wanted = "bfloat16, or uint16 for its bit patterns" if dtype is UINT16 else dtype
        raise TypeError(f"{name} has dtype {named(array.dtype)}: the result's dtype is {wanted}")
    if not array.flags.writeable:
        raise ValueError(f"{name} is read-only")
    return array


def holds_a_result(out: Array) -> bool:
    """Return whether an engine may write to an array that overlaps nothing else."""
    if not out.dtype.isnative:
        return False
    return out.flags.c_contiguous or not (repeats(out) or (out.size and overlaps_itself(out)))


def _can_be_written_to(p: Problem, out: Array) -> bool:
    """Return whether an engine may write to `out` while it reads the inputs."""
    if not holds_a_result(out):
        return False
    if p.stage and not (out.flags.aligned and _has_unit_stride(out)):
        return False
    query = p.caller_query
    in_place = not p.stage and same_memory(out, query)
    if not in_place and may_change(out, query):
        return False
    inputs = (p.key, p.value, p.attn_mask, p.attn_bias, p.alibi_slopes, p.sinks, p.query_offset,
              p.key_lengths, p.key_scales, p.value_scales, p.block_table, p.query_starts,
              p.query_lengths, p.key_starts)  # fmt: skip
    return not any([array is not None and may_change(out, array) for array in inputs])


def _has_unit_stride(array: Array) -> bool:
    """Return whether the elements of a row lie side by side, as a single one does."""
    return array.strides[-1] == array.itemsize or array.shape[-1] <= 1


def repeats(array: Array) -> bool:
    """Return whether some axis shows the same memory more than once."""
    return any(s == 0 and n > 1 for s, n in zip(array.strides, array.shape, strict=True))


def overlaps_itself(array: Array) -> bool:
    """Return whether elements may overlap: never if contiguous in some order of the axes."""
    if array.flags.c_contiguous or array.flags.f_contiguous:
        return False
    reach = array.itemsize
    for stride, length in sorted((abs(s), n) for s, n in zip(array.strides, array.shape,
                                                             strict=True) if n > 1):  # fmt: skip
        if stride < reach:
            return True
        reach = stride * (length - 1) + reach
    return False


def same_memory(a: Array, b: Array) -> bool:
    return (
        a.shape == b.shape
        and a.strides == b.strides
        and a.ctypes.data == b.ctypes.data
        and a.dtype == b.dtype
    )


def may_change(out: Array, array: Array) -> bool:
    """Return whether writing `out` may change what is still to be read of an input.

    A task reads all its queries before it writes their rows, so `out` may be the query itself,
    unless a selection of rows stands elsewhere in `out` than in the query.
    """
    if not np.may_share_memory(out, array):
        return False
    try:
        return bool(np.shares_memory(out, array, max_work=_OVERLAP_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
