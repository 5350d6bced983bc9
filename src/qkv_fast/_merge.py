"""merge_attention: the result over all keys from the results over parts of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _dispatch
from ._dispatch import notify_call_start
from ._dtypes import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    STORED,
    SWAPPED,
    Array,
    code_of,
    named,
    result_dtype,
    uint16_hint,
)
from ._problem.arguments import as_array, broadcast_to, real_array, wants_bf16_bits
from ._problem.output import checked_out, holds_a_result, may_change, result_code, same_memory
from ._threads import checked, get_num_threads

# The types that a result may have besides that of the parts.
OTHER_RESULTS = {FLOAT32: (FLOAT16, BFLOAT16), FLOAT16: (FLOAT32,), BFLOAT16: (FLOAT32,)}


def merge_attention(
    outputs: Sequence[Any],
    lses: Sequence[Any],
    *,
    sinks: Any = None,
    out: Any = None,
    lse_out: Any = None,
    num_threads: int | None = None,
    dtype: Any = None,
    out_dtype: Any = None,
) -> tuple[Array, Array]:
    r"""Combine attention over disjoint sets of keys, as if it had been computed over all of them.

    Parameters
    ----------
    outputs : sequence of arrays, each of shape (..., Lq, Dv)
        Results of `scaled_dot_product_attention` for the same queries over different keys; float32,
        float64, float16 or bfloat16, all of one dtype and shape; any strides, alignment and byte
        order; CPU tensors of torch too. Results for inputs of 16 bits lose nothing between the
        parts where they were computed with ``out_dtype="float32"``.
    lses : sequence of arrays, each of shape (..., Lq)
        What it returned with ``return_lse=True``. -inf is an empty part: its output has no
        influence.
    sinks : array, shape (Hq,), optional
        Logits that join the softmax's denominator only, one for each index of the outputs' third
        last axis. Or an array of two and more axes that broadcasts to the shape of an lse: of
        packed sequences, whose outputs are (total, Hq, Dv), pass ``sinks[np.newaxis]``.
    out : ndarray or tensor, shape (..., Lq, Dv), optional
        Where the result goes, and what is returned. It may be one of `outputs`, which is then
        written in place: a running result takes in a new part without further memory. If it
        overlaps an input in another way, the answer is as if it did not.
    lse_out : ndarray or tensor, shape (..., Lq), optional
        Where the lse goes, and what is returned for it: float32, or float64 for float64. It may be
        one of `lses`, likewise.
    num_threads : int, optional
        Threads of this call; see `get_num_threads` for the default.
    dtype : "bfloat16", optional
        Take uint16 outputs as the bit patterns of bfloat16, and return the result as one.
    out_dtype : {"float32", "float16", "bfloat16"}, optional
        The result's type: that of the outputs by default. It may be float32 for outputs of 16 bits,
        and float16 or bfloat16 for float32 ones. `out` must have that type.

    Returns
    -------
    result : ndarray, shape (..., Lq, Dv)
        `out`, or a new array of the outputs' dtype, or of `out_dtype`, in native byte order; for
        bfloat16 tensors, and where only `out_dtype` says bfloat16, bit patterns in uint16. Zeros
        where all parts are empty.
    lse : ndarray, shape (..., Lq)
        `lse_out`, or a new array: the log-sum-exp over all keys, without the sink; float32, or
        float64 for float64.

    Raises
    ------
    TypeError
        Dtypes that differ or are none of the four, or an argument of the wrong kind.
    ValueError
        No parts, shapes and counts that don't fit, a read-only `out`, one that overlaps
        `lse_out`. Nothing is written then.

    Notes
    -----
    With :math:`m = \max_i \mathrm{lse}_i` and :math:`w_i = e^{\mathrm{lse}_i - m}`, the result is
    :math:`\sum_i w_i o_i / (\sum_i w_i + e^{\mathrm{sink} - m})` and its lse
    :math:`m + \log \sum_i w_i`: the merging of partial softmax states of Rabe and Staats,
    *Self-attention Does Not Need O(n²) Memory* (2021). Sums run in the order of the parts, in
    float32, in float64 for float64. A row's result depends neither on the number of threads nor on
    the other rows. A sink belongs to the whole: give it to the last merge alone, and to no part.

    A call that is interrupted (KeyboardInterrupt) leaves `out` and `lse_out` undefined.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 2, 6, 4))  # 2 heads, 6 queries and keys
    >>> sdpa = qkv_fast.scaled_dot_product_attention
    >>> parts = [sdpa(q, k[:, i], v[:, i], return_lse=True) for i in (slice(0, 4), slice(4, 6))]
    >>> merged, lse = qkv_fast.merge_attention(*zip(*parts))
    >>> bool(np.allclose(merged, sdpa(q, k, v)))
    True

    A running result of float32 that takes in one part after another, for inputs of float16:

    >>> q, k, v = (x.astype(np.float16) for x in (q, k, v))
    >>> total, lse = np.zeros((2, 6, 4), np.float32), np.full((2, 6), -np.inf, np.float32)
    >>> for i in (slice(0, 4), slice(4, 6)):
    ...     part = sdpa(q, k[:, i], v[:, i], return_lse=True, out_dtype="float32")
    ...     _ = qkv_fast.merge_attention(
    ...         [total, part[0]], [lse, part[1]], out=total, lse_out=lse
    ...     )
    >>> bool(np.allclose(total, sdpa(q, k, v), atol=1e-3))
    True
    """
    outputs, lses = _arrays("outputs", outputs), _arrays("lses", lses)
    uint16_is_bf16 = wants_bf16_bits(dtype)
    codes = _codes(outputs, lses, uint16_is_bf16)
    own = out_code = codes[0] & ~SWAPPED
    wanted = result_dtype(outputs[0].dtype)
    if out_dtype is not None:
        out_code = result_code(out_dtype, own, "outputs", OTHER_RESULTS.get(own, ()))
        if out_code != own:
            wanted = np.dtype(STORED[out_code])
    shape = outputs[0].shape
    real = np.dtype(np.float64 if own == FLOAT64 else np.float32)
    logits = None if sinks is None else _sinks(sinks, shape[:-1])
    threads = get_num_threads() if num_threads is None else checked(num_threads)
    notify_call_start()

    numbers = [_aligned(lse, real) for lse in lses]
    target = lse_target = None
    if out is not None:
        target = checked_out("out", out, shape, wanted, out_code, uint16_is_bf16)
    if lse_out is not None:
        lse_code = FLOAT64 if own == FLOAT64 else FLOAT32
        lse_target = checked_out("lse_out", lse_out, shape[:-1], real, lse_code, False)
        if target is not None and may_change(target, lse_target):
            raise ValueError("out and lse_out overlap: each must have memory of its own")
    inputs = [*outputs, *numbers]
    rows = _rows_to_write(target, inputs, shape, wanted)
    lse = _rows_to_write(lse_target, inputs, shape[:-1], real)
    _compute(own, outputs, codes, numbers, logits, rows, out_code, lse, threads)
    if target is not None and rows is not target:
        np.copyto(target, rows)
    if lse_target is not None and lse is not lse_target:
        np.copyto(lse_target, lse)
    return rows if out is None else out, lse if lse_out is None else lse_out


def _compute(own: int, *arguments: Any) -> None:
    """Merge, with the engine in force."""
    _dispatch.runner_of(FLOAT64 if own == FLOAT64 else FLOAT32).merge(*arguments)


def _aligned(lse: Array, real: np.dtype[Any]) -> Array:
    """Return log-sum-exps as aligned reals."""
    if lse.dtype == real and lse.flags.aligned:
        return lse
    with np.errstate(all="ignore"):
        return lse.astype(real)


def _rows_to_write(
    target: Array | None, inputs: list[Array], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Array:
    """Return what an engine writes to, row by row, while it reads the inputs.

    That is the caller's memory, or new memory if there is none or the engine can't write to it.
    """
    if target is None:
        return np.empty(shape, dtype)
    if target.flags.aligned and holds_a_result(target):
        changed = (x for x in inputs if x is not target and may_change(target, x))
        if all(same_memory(target, x) for x in changed):
            return target
    return np.empty(shape, target.dtype.newbyteorder("="))


def _sinks(given: Any, shape: tuple[int, ...]) -> Array:
    """Return as float64 the logits of all rows, `shape` of them."""
    sinks = real_array("sinks", given)
    if sinks.ndim > 1:
        return broadcast_to("sinks", sinks, shape, "the shape of an lse")
    heads = shape[-2] if len(shape) > 1 else 1
    if sinks.shape != (heads,):
        raise ValueError(
            f"sinks has shape {sinks.shape}: one logit for each of {heads} query heads is needed, "
            f"({heads},)"
        )
    return np.broadcast_to(sinks[:, np.newaxis] if len(shape) > 1 else sinks[0], shape)


def _arrays(name: str, given: Any) -> list[Array]:
    try:
        parts = list(given)
    except TypeError:
        raise TypeError(
            f"{name} is a {type(given).__name__}: it must be a sequence of arrays"
        ) from None
    return [
        part if type(part) is np.ndarray else as_array(f"{name}[{i}]", part)
        for i, part in enumerate(parts)
    ]


def _codes(outputs: list[Array], lses: list[Array], uint16_is_bf16: bool) -> list[int]:
    """Raise when the parts don't fit; return the codes of their element types."""
    if not outputs or len(outputs) != len(lses):
        raise ValueError(
            f"there are {len(outputs)} outputs and {len(lses)} lses: one lse for each output is "
            "needed, and at least one of them"
        )
    code = code_of(outputs[0].dtype, uint16_is_bf16)
    if code < 0:
        raise TypeError(
            f"outputs[0] has dtype {named(outputs[0].dtype)}: it must be float32, float64, float16 "
            f"or bfloat16{uint16_hint(outputs[0].dtype)}"
        )
    codes = [code_of(output.dtype, uint16_is_bf16) for output in outputs]
    for i, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        if codes[i] & ~SWAPPED != code & ~SWAPPED:
            raise TypeError(
                f"outputs[{i}] has dtype {named(output.dtype)}, but outputs[0] has "
                f"{named(outputs[0].dtype)}"
            )
        if lse.dtype.kind != "f":
            raise TypeError(
                f"lses[{i}] has dtype {named(lse.dtype)}: it must be float16, float32 or float64"
            )
        if output.ndim == 0:
            raise ValueError(
                f"outputs[{i}] has shape (): it must have at least one axis, (..., Lq, Dv)"
            )
        if output.shape != outputs[0].shape:
            raise ValueError(
                f"outputs[{i}] has shape {output.shape}, but outputs[0] has {outputs[0].shape}"
            )
        if lse.shape != output.shape[:-1]:
            raise ValueError(
                f"lses[{i}] has shape {lse.shape}: it must be that of outputs[{i}] without the "
                f"last axis, {output.shape[:-1]}"
            )
    return codes
