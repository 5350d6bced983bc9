"""Checks of single arguments: integers, flags, real numbers, arrays of any library, tensors.

Every error names the argument. torch is looked up among the loaded modules, never imported: a
caller who passes a tensor has loaded it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from .._dtypes import (
    BFLOAT16,
    BFLOAT16_BITS,
    SWAPPED,
    Array,
    code_of,
    dtype_name,
    holds_integers,
    named,
    widened,
)

_INT64 = np.iinfo(np.int64)


def integer(
    name: str,
    given: Any,
    least: int = 1,
    most: int | None = None,
    *,
    what: str = "an int",
    rule: str = "",
    bools: bool = False,
) -> int:
    """Return an integer from `least` to `most`.

    `what` is wanted, by the message of a TypeError; `rule` ends that of a ValueError. True and
    False are integers only with `bools`.
    """
    try:
        if isinstance(given, bool) and not bools:
            raise TypeError
        number = operator.index(given)
    except TypeError:
        raise TypeError(f"{name} is {shown(given)}: it must be {what}") from None
    if number < least:
        raise ValueError(f"{name} is {shown(number)}: {rule or f'it must be at least {least}'}")
    if most is not None and number > most:
        raise ValueError(f"{name} is {shown(number)}: {rule or f'it must be at most {most}'}")
    return number


def flag(name: str, given: Any) -> bool:
    """Return a bool."""
    if not isinstance(given, bool | np.bool_):
        raise TypeError(f"{name} must be a bool, not {type(given).__name__}")
    return bool(given)


def real(name: str, given: Any) -> float:
    """Return a real number as a float."""
    try:
        if isinstance(given, str | bytes | bytearray):
            raise TypeError
        return float(given)
    except OverflowError:
        raise ValueError(
            f"{name} is {shown(given)}: it must not exceed the largest float64, 1.8e308"
        ) from None
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a real number, not {type(given).__name__}") from None


def as_array(name: str, given: Any, *, in_place: bool = False) -> Array:
    """View what was given as an ndarray, without a copy.

    in_place: refuse a tensor that only a copy can show, since the view will be written to.
    """
    if isinstance(given, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a MaskedArray, whose mask would be lost: pass its data and an attn_mask"
        )
    if isinstance(given, np.ndarray):
        return given.view(np.ndarray)
    if is_tensor(given):
        return _view_tensor(name, given, in_place)
    if hasattr(given, "__array_interface__") or hasattr(given, "__buffer__"):
        view: Callable[[Any], Array] = np.asarray
    elif hasattr(given, "__dlpack__"):
        view = np.from_dlpack
    else:
        try:
            given = memoryview(given)
        except TypeError:
            raise TypeError(
                f"{name} is a {type(given).__name__}: pass a NumPy array, or an object that NumPy "
                "can view through the buffer protocol, __array_interface__ or DLPack"
            ) from None
        view = np.asarray
    try:
        return view(given)
    except Exception as error:  # whatever a foreign library raises
        raise _not_viewable(name, given, error) from error


def plain(name: str, given: Any) -> Array:
    """Return an array of what was given, as an array, a number or in lists."""
    if isinstance(given, np.ma.MaskedArray):
        raise TypeError(f"{name} is a MaskedArray, whose mask would be lost: pass its data")
    if is_tensor(given):
        return as_array(name, given)
    try:
        return np.asarray(given)
    except ValueError:
        raise ValueError(f"{name} is {shown(given)}: its rows differ in length") from None
    except Exception as error:
        raise _not_viewable(name, given, error) from error


def integers(name: str, given: Any, what: str, least: int, most: int, rule: str) -> Array:
    """Return as int64 the integers that were given, each from `least` to `most`.

    `what` is wanted, by a TypeError's message; `rule` ends that of a ValueError. Nothing here can
    wrap: NumPy makes uint64, float64 or objects of ints beyond int64.
    """
    array = plain(name, given)
    if array.size == 0:
        return np.zeros(array.shape, np.int64)
    if not holds_integers(array):
        if isinstance(given, int | list | tuple):
            for item in np.asarray(given, object).flat:
                if isinstance(item, int) and not _INT64.min <= item <= _INT64.max:
                    raise ValueError(f"{name} holds {shown(item)}: {rule}")
        kind = f"a {type(given).__name__}"
        if array.ndim:
            kind = f"an array of {named(array.dtype)} of shape {array.shape}"
        raise TypeError(f"{name} must be {what}, not {kind}")
    low, high = int(array.min()), int(array.max())
    if low < least or high > most:
        raise ValueError(f"{name} holds {low if low < least else high}: {rule}")
    return array.astype(np.int64)


def per_batch(name: str, given: Any, batch: tuple[int, ...], least: int, most: int) -> Array:
    """Return as int64 of shape `batch` the integers that were given, each in a range."""
    what, rule = "an int, or ints for each batch entry", f"it must be between {least} and {most}"
    array = integers(name, given, what, least, most, rule)
    return broadcast_to(name, array, batch, "the batch axes")


def per_sequence(name: str, given: Any, sequences: Array, most: int, rule: str) -> Array:
    """Return int64 from 0 to `most`, one for each of the sequences; `rule` is for messages."""
    array = integers(name, given, "an int, or ints for each sequence", 0, most, rule)
    try:
        return np.broadcast_to(array, sequences.shape)
    except ValueError:
        raise ValueError(
            f"{name} has shape {array.shape}: one for each of {len(sequences)} sequences is needed"
        ) from None


def indices_of(name: str, given: Any, batch: int, *, repeats: bool = False) -> Array:
    """Return int64 numbers of sequences, along one axis; none comes twice unless `repeats`."""
    rule = f"each must be from 0 to {batch - 1}"
    index = integers(name, given, "ints", 0, batch - 1, rule)
    if index.ndim == 0:
        index = index[np.newaxis]
    if index.ndim != 1:
        raise TypeError(f"{name} must be ints along one axis, not of shape {index.shape}")
    if not repeats and len(np.unique(index)) < len(index):
        raise ValueError(f"{name} holds {shown(index.tolist())}: none may come twice")
    return index


def cumulative(name: str, given: Any, tensor: str, total: int) -> Array:
    """Return cumulative lengths as int64: from 0 to `total`, never falling."""
    what = "ints of shape (sequences + 1,)"
    rule = f"it must rise from 0 to the length of {tensor} on axis 0, {total}"
    starts = integers(name, given, what, 0, total, rule)
    if starts.ndim != 1 or not len(starts):
        raise TypeError(f"{name} must be {what}, not of shape {starts.shape}")
    falls = np.flatnonzero(starts[1:] < starts[:-1])  # differences might wrap
    if starts[0] != 0 or starts[-1] != total or falls.size:
        way = f", but falls from {starts[falls[0]]} to {starts[falls[0] + 1]}" if falls.size else ""
        raise ValueError(f"{name} goes from {starts[0]} to {starts[-1]}{way}: {rule}")
    return starts


def real_array(name: str, given: Any) -> Array:
    """Return as float64 the real numbers that were given, as an array or in lists."""
    array = plain(name, given)
    if code_of(array.dtype) & ~SWAPPED == BFLOAT16:
        array = widened(array)
    elif array.dtype.kind not in "fiu":
        raise TypeError(f"{name} has dtype {array.dtype}: real numbers are needed")
    return array.astype(np.float64, order="C")


def broadcast_to(
    name: str, array: Array, shape: tuple[int, ...], meaning: str, cure: str = ""
) -> Array:
    """Return a view of the shape, which is that of `meaning`; `cure` ends the error's message."""
    if array.shape == shape:
        return array
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(
            f"{name} has shape {array.shape}: it must broadcast to {meaning} = {shape}{cure}"
        ) from None


def shown(given: Any) -> str:
    """Return what was given in few characters, for messages."""
    if isinstance(given, np.ndarray):
        return f"an array of {named(given.dtype)} of shape {given.shape}"
    try:
        text = " ".join(repr(given).split())
    except ValueError:  # an int of more digits than Python prints
        return "an int too large to print"
    return text if len(text) <= 100 else f"{text[:97]}..."


def wants_bf16_bits(dtype: Any) -> bool:
    """Return whether an argument `dtype` says that uint16 arrays hold bfloat16."""
    if dtype is None:
        return False
    if dtype_name(dtype) != "bfloat16":
        raise ValueError(
            f"dtype is {shown(dtype)}: it must be 'bfloat16', where uint16 arrays hold that, or "
            "None"
        )
    return True


def is_tensor(given: Any) -> bool:
    """Return whether this is a tensor of torch."""
    return isinstance(given, getattr(sys.modules.get("torch"), "Tensor", ()))


def _view_tensor(name: str, tensor: Any, in_place: bool) -> Array:
    torch: Any = sys.modules["torch"]
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name} is a tensor that requires grad, but no gradient can be computed: call within "
            f"torch.no_grad(), or pass {name}.detach()"
        )
    for wrong, what, cure in (
        (tensor.device.type != "cpu", f"on device {tensor.device}", "cpu"),
        (tensor.layout != torch.strided, f"of layout {tensor.layout}", "to_dense"),
        (tensor.is_quantized, "of quantized numbers", "dequantize"),
    ):
        if wrong:
            raise TypeError(
                f"{name} is a tensor {what}: a dense one on the CPU is needed, as "
                f"{name}.{cure}() gives"
            )
    if in_place and (tensor.is_neg() or tensor.is_conj()):
        raise TypeError(
            f"{name} is a tensor that shows the memory of another one negated (is_neg or is_conj): "
            "it can't be written in place"
        )
    try:
        tensor = tensor.detach().resolve_conj().resolve_neg()
        if tensor.dtype == torch.bfloat16:  # for which torch refuses both NumPy and DLPack
            bits: Array = tensor.view(torch.int16).numpy().view(BFLOAT16_BITS)
            return bits
        array: Array = tensor.numpy()
        return array
    except Exception as error:
        raise _not_viewable(name, tensor, error) from error


def _not_viewable(name: str, given: Any, error: Exception) -> TypeError:
    return TypeError(
        f"{name} is a {type(given).__name__} that NumPy can't view: {type(error).__name__}: {error}"
    )
