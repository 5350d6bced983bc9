"""What callers hand over, read as ndarrays: arrays of other libraries, tensors, lists, numbers.

Every error names the argument. torch is looked up among the loaded modules, never imported: who
passes a tensor has it loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ._dtypes import BFLOAT16_BITS, Array, holds_integers, named

_INT64 = np.iinfo(np.int64)


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


def shown(given: Any) -> str:
    """Return what was given in few characters, for messages."""
    if isinstance(given, np.ndarray):
        return f"an array of {named(given.dtype)} of shape {given.shape}"
    try:
        text = " ".join(repr(given).split())
    except ValueError:  # an int of more digits than Python prints
        return "an int too large to print"
    return text if len(text) <= 100 else f"{text[:97]}..."


def is_tensor(given: Any) -> bool:
    """Whether this is a tensor of torch."""
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
