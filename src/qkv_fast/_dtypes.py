"""Element types: their codes, bfloat16 as bit patterns, int8 rows with scales, the Array alias."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

Array = np.ndarray[tuple[Any, ...], np.dtype[Any]]  # npt.NDArray[Any], without its import of 1 ms

# Codes of the element types, as csrc numbers them. SWAPPED is added for the other byte order.
FLOAT32, FLOAT64, FLOAT16, BFLOAT16, BOOL, INT8, SWAPPED = 0, 1, 2, 3, 4, 5, 8
CODES = {"float32": FLOAT32, "float64": FLOAT64, "float16": FLOAT16, "bfloat16": BFLOAT16,
         "int8": INT8}  # fmt: skip
STORED = {FLOAT32: "f4", FLOAT64: "f8", FLOAT16: "f2", BFLOAT16: "u2", INT8: "i1"}
ACCEPTED = "float32, float64, float16 or bfloat16"  # for messages

# By NumPy's type number; `code_of` adds that of ml_dtypes.bfloat16 when it first meets it.
CODES_BY_NUM = {
    np.dtype(np.float32).num: FLOAT32,
    np.dtype(np.float64).num: FLOAT64,
    np.dtype(np.float16).num: FLOAT16,
}

UINT16 = np.dtype(np.uint16)
# Bit patterns that are known to be bfloat16 without dtype="bfloat16", since a tensor of that dtype
# held them. Equal to uint16 for NumPy; results never have it.
BFLOAT16_BITS = np.dtype(np.uint16, metadata={"qkv_fast": "bfloat16"})


def code_of(dtype: np.dtype[Any], uint16_is_bf16: bool = False) -> int:
    """Return the code of a floating element type, or -1.

    Plain uint16 is one only where `uint16_is_bf16` says that it holds bfloat16.
    """
    code = CODES_BY_NUM.get(dtype.num, -1)
    if code < 0 and dtype.num == UINT16.num:
        code = BFLOAT16 if uint16_is_bf16 or is_bits(dtype) else -1
    elif code < 0 and dtype.itemsize == 2 and dtype.name == "bfloat16":
        code = CODES_BY_NUM[dtype.num] = BFLOAT16
    return code if code < 0 or dtype.isnative else code + SWAPPED


def storage_code(dtype: np.dtype[Any], uint16_is_bf16: bool = True) -> int:
    """Return the code of an element type that keys and values may be stored in, or -1."""
    return INT8 if dtype == np.int8 else code_of(dtype, uint16_is_bf16)


def result_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of results: query's in native byte order, plain uint16 for bit patterns."""
    return UINT16 if dtype.num == UINT16.num else dtype.newbyteorder("=")


def is_bits(dtype: np.dtype[Any]) -> bool:
    """Return whether a dtype is `BFLOAT16_BITS`, perhaps rebuilt by NumPy."""
    return dtype.metadata is not None and "qkv_fast" in dtype.metadata


def holds_integers(array: Array) -> bool:
    """Return whether the elements are integers, which bit patterns of bfloat16 are not."""
    return array.dtype.kind in "iu" and not is_bits(array.dtype)


def named(dtype: np.dtype[Any]) -> str:
    """Return the name of a dtype for messages."""
    return "bfloat16" if is_bits(dtype) else str(dtype)


def uint16_hint(*dtypes: np.dtype[Any]) -> str:
    """Return the end of a message about dtypes: how uint16 is declared to be bfloat16."""
    if any(dtype.num == UINT16.num and not is_bits(dtype) for dtype in dtypes):
        return "; dtype='bfloat16' says that uint16 arrays hold that"
    return ""


def dtype_name(given: Any) -> str:
    """Return the name of a dtype of NumPy, ml_dtypes or torch, or given as a string; "" if none."""
    if isinstance(given, str):
        return given
    if isinstance(given, getattr(sys.modules.get("torch"), "dtype", ())):
        return str(given).removeprefix("torch.")
    if given is None:  # NumPy's float64
        return ""
    try:
        return str(np.dtype(given).name)
    except Exception:  # np.dtype has a protocol of its own for foreign objects
        return ""


def widened(bits: Array) -> Array:
    """Return bfloat16, as any dtype of its size, as float32: it is the upper half of one."""
    ints = bits.view(bits.dtype.str.replace("V", "u"))
    return (ints.astype(np.uint32) << 16).view(np.float32)


def reals(array: Array, code: int, real: npt.DTypeLike | None = None) -> Array:
    """Return the array as real numbers, of the dtype `real` if one is given."""
    if code & ~SWAPPED == BFLOAT16:
        array = widened(array)
    return array if real is None else array.astype(real, copy=False)


def bfloat16_bits(x: Array) -> Array:
    """Return float32 rounded to bfloat16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + (0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def quantize(rows: Array) -> tuple[Array, Array]:
    """Return finite float32 rows (..., D) as int8, and their scales (...) as float32.

    A scale is the largest magnitude of its row over 127, so an element is off by at most half a
    scale.
    """
    scales = np.abs(rows).max(axis=-1, initial=0) / np.float32(127)
    safe = np.where(scales == 0, 1, scales)[..., np.newaxis]
    return np.clip(np.rint(rows / safe), -127, 127).astype(np.int8), scales


def rounded(name: str, rows: Array, code: int) -> tuple[Array, Array | None]:
    """Round (..., D) to an element type of storage; for int8 also return the scales."""
    given = storage_code(rows.dtype)
    if given < 0 or given == INT8:
        raise TypeError(f"{name} has dtype {named(rows.dtype)}: it must be {ACCEPTED}")
    if given == code == BFLOAT16:
        return rows.view(np.uint16), None
    with np.errstate(over="ignore", under="ignore"):
        real = reals(rows, given)
        if code == BFLOAT16:
            return bfloat16_bits(real), None
        if code != INT8:
            return real.astype(STORED[code]), None
        real = real.astype(np.float32)
    if not np.isfinite(real).all():
        raise ValueError(f"{name} holds NaN or infinity, which int8 storage can't")
    return quantize(real)
