"""merge_attention: the result over all keys from the results over parts of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ._dtypes import (
    BFLOAT16,
    FLOAT64,
    SWAPPED,
    Array,
    bfloat16_bits,
    code_of,
    named,
    reals,
    result_dtype,
    uint16_hint,
)
from ._problem.arguments import as_array, wants_bf16_bits


def merge_attention(
    outputs: Sequence[Any], lses: Sequence[Any], *, dtype: Any = None
) -> tuple[Array, Array]:
    r"""Combine attention over disjoint sets of keys, as if it had been computed over all of them.

    Parameters
    ----------
    outputs : sequence of arrays, each of shape (..., Lq, Dv)
        Results of `scaled_dot_product_attention` for the same queries over different keys; float32,
        float64, float16 or bfloat16, all of one dtype and shape; CPU tensors of torch too.
    lses : sequence of arrays, each of shape (..., Lq)
        What it returned with ``return_lse=True``. -inf is an empty part: its output has no
        influence.
    dtype : "bfloat16", optional
        Take uint16 outputs as the bit patterns of bfloat16, and return the result as one.

    Returns
    -------
    result : ndarray, shape (..., Lq, Dv)
        Of the outputs' dtype, in native byte order; for bfloat16 tensors, bit patterns in uint16.
        Zeros where all parts are empty.
    lse : ndarray, shape (..., Lq)
        The log-sum-exp over all keys; float32, or float64 for float64.

    Raises
    ------
    TypeError
        Dtypes that differ or are none of the four.
    ValueError
        No parts, or shapes and counts that don't fit.

    Notes
    -----
    With :math:`m = \max_i \mathrm{lse}_i` and :math:`w_i = e^{\mathrm{lse}_i - m}`, the result is
    :math:`\sum_i w_i o_i / \sum_i w_i` and its lse :math:`m + \log \sum_i w_i`: the merging of
    partial softmax states of Rabe and Staats, *Self-attention Does Not Need O(n²) Memory* (2021).
    Sums run in the order of the parts, in float32, in float64 for float64. A sink belongs to the
    whole, so give it to none of the parts.

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
    """
    outputs, lses = _arrays("outputs", outputs), _arrays("lses", lses)
    uint16_is_bf16 = wants_bf16_bits(dtype)
    code = _check(outputs, lses, uint16_is_bf16)
    real = np.float64 if code == FLOAT64 else np.float32
    with np.errstate(all="ignore"):
        top: Array = np.full(lses[0].shape, -np.inf, real)
        for lse in lses:
            np.maximum(top, lse, out=top)
        base: Array = np.where(top == -np.inf, 0, top).astype(real)
        total: Array = np.zeros(top.shape, real)
        acc: Array = np.zeros(outputs[0].shape, real)
        for output, lse in zip(outputs, lses, strict=True):
            weight = np.exp(lse.astype(real) - base)
            total += weight
            part = reals(output, code_of(output.dtype, uint16_is_bf16), real)
            acc += np.where(weight[..., np.newaxis] == 0, 0, weight[..., np.newaxis] * part)
        result = np.where(total[..., np.newaxis] == 0, 0, acc / total[..., np.newaxis])
        lse = (base + np.log(total)).astype(real)
    dtype_out = result_dtype(outputs[0].dtype)
    if code == BFLOAT16:
        return bfloat16_bits(result).view(dtype_out), lse
    return result.astype(dtype_out), lse


def _arrays(name: str, given: Any) -> list[Array]:
    try:
        parts = list(given)
    except TypeError:
        raise TypeError(
            f"{name} is a {type(given).__name__}: it must be a sequence of arrays"
        ) from None
    return [as_array(f"{name}[{i}]", part) for i, part in enumerate(parts)]


def _check(outputs: list[Array], lses: list[Array], uint16_is_bf16: bool) -> int:
    """Raise when the parts don't fit; return the code of their element type."""
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
    for i, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        if code_of(output.dtype, uint16_is_bf16) & ~SWAPPED != code & ~SWAPPED:
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
    return code & ~SWAPPED
