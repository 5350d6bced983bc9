"""The one choice of which engine computes a call, with which tiles and which ISA."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ._dtypes import BFLOAT16, CODES, FLOAT32, code_of
from ._loader import load_native, why_not_native

if TYPE_CHECKING:
    import numpy.typing as npt

ENGINES = ("auto", "native", "python")
TILES = ("auto", "simd", "blas")
# Weakest first, those of a CPU.
ISAS = ("auto", "scalar", "neon", "neonbf16", "avx2", "avx512", "avx512bf16", "amx")
_BFLOAT16_ONLY = ("neonbf16", "avx512bf16", "amx")  # those of "neon" or "avx512" for other dtypes
VARIABLES = ("QKV_FAST_BACKEND", "QKV_FAST_TILES", "QKV_FAST_ISA")

# A KV group's rows are its query heads times its queries. The decode kernels take time for each
# row, tiles for each vector of rows. So decode computes a group whose rows fill at most a share of
# a vector's lanes: the share at which both take about the same time. docs/ has the measurements,
# of 8 heads with 1024 to 65536 keys of size 128.
#
#     where                                       share    rows of 16 lanes
#     tiles read the keys in place                0.625    10
#     the same, bfloat16 multiplied in pairs      0.3       4
#     tiles convert the keys (float16, int8)      0.875    14
DECODE_OCCUPANCY = 0.625
DECODE_OCCUPANCY_PAIRS = 0.3
DECODE_OCCUPANCY_CONVERTED = 0.875


class Choice(NamedTuple):
    """An engine, and for the native one its tiles and ISA."""

    engine: str
    tiles: str = ""
    isa: str = ""


Request = tuple[str, str, str]  # an engine, tiles and an ISA, any of them "auto"

# What `backend` asks for here.
requested: contextvars.ContextVar[Request | None] = contextvars.ContextVar("backend", default=None)
_environment: Request | None = None


@contextlib.contextmanager
def backend(backend: str = "auto", *, tiles: str = "auto", isa: str = "auto") -> Iterator[None]:
    """Choose the engine of calls within a ``with`` block, in this Python thread or task alone.

    Parameters
    ----------
    backend : {"auto", "native", "python"}
        The engine. "auto" leaves it to ``QKV_FAST_BACKEND``, else takes the native engine where
        it was built.
    tiles : {"auto", "simd", "blas"}
        What computes the native engine's products. "auto" leaves it to ``QKV_FAST_TILES``, else
        takes the SIMD kernels. With those a row's result does not depend on its place among the
        queries. With SciPy's BLAS the last bits of a row may depend on it; neither depends on
        threads or batch.
    isa : {"auto", "scalar", "neon", "neonbf16", "avx2", "avx512", "avx512bf16", "amx"}
        The instruction set. "auto" leaves it to ``QKV_FAST_ISA``, else takes the fastest for the
        dtype. "neonbf16" differs from "neon" for bfloat16 only, as the last two from "avx512".

    Raises
    ------
    ValueError
        A choice that is none of these.
    RuntimeError
        The choice is not there: it was not built, or this CPU can't execute it.

    See Also
    --------
    available_backends : What there is to choose from.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> x = np.ones((1, 2, 3, 4), np.float32)
    >>> with qkv_fast.backend("python"):
    ...     qkv_fast.scaled_dot_product_attention(x, x, x).sum()
    np.float32(24.0)
    """
    request = (
        _checked("backend", backend, ENGINES),
        _checked("tiles", tiles, TILES),
        _checked("isa", isa, ISAS),
    )
    resolve(request, FLOAT32)
    token = requested.set(request)
    try:
        yield
    finally:
        requested.reset(token)


def available_backends(dtype: str = "float32") -> list[dict[str, str]]:
    """Return the different backends that this machine can compute with.

    Parameters
    ----------
    dtype : {"float32", "float64", "float16", "bfloat16"}
        The element type. The instruction sets "neonbf16", "avx512bf16" and "amx" are listed for
        bfloat16 only, since other types are computed as with "neon" or "avx512".

    Returns
    -------
    list of dict
        The arguments of `backend` for each: the Python engine first, then the native engine's
        instruction sets from the weakest to the strongest, then BLAS tiles. The list is of the
        machine: the environment does not shorten it.

    Raises
    ------
    ValueError
        Another dtype.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> qkv_fast.available_backends()[0]
    {'backend': 'python'}
    >>> x = np.ones((1, 2, 3, 4), np.float32)
    >>> for choice in qkv_fast.available_backends():
    ...     with qkv_fast.backend(**choice):
    ...         assert qkv_fast.scaled_dot_product_attention(x, x, x).sum() == 24
    """
    _checked("dtype", dtype, tuple(name for name in CODES if name != "int8"))
    return [
        {"backend": engine, "tiles": tiles, "isa": isa} if tiles else {"backend": engine}
        for engine, tiles, isa in available(dtype)
    ]


def available(dtype: str = "float32") -> list[Choice]:
    """Return the choices that differ for a dtype and that this machine can execute."""
    choices = [Choice("python")]
    native = load_native()
    if native is not None:
        isas = [isa for isa in native.isas() if dtype == "bfloat16" or isa not in _BFLOAT16_ONLY]
        choices += [Choice("native", "simd", isa) for isa in isas]
        choices.append(Choice("native", "blas", native.best_isa(FLOAT32)))
    return choices


def current(dtype: npt.DTypeLike = "float32") -> Choice:
    """Return what a call with this dtype would use in this context."""
    if isinstance(dtype, str) and dtype == "bfloat16":  # a name that NumPy alone does not know
        return resolve(requested.get(), BFLOAT16)
    return resolve(requested.get(), code_of(np.dtype(dtype)))


def resolve(request: Request | None, code: int) -> Choice:
    """Turn a request and the environment's into the choice for an element type, or raise."""
    engine, tiles, isa = (
        default if choice == "auto" else choice
        for choice, default in zip(
            request or ("auto", "auto", "auto"), from_environment(), strict=True
        )
    )
    if engine == "python":
        return Choice("python")
    native = load_native()
    if native is None:
        if engine == "native" or (engine == "auto" and (tiles != "auto" or isa != "auto")):
            raise RuntimeError(
                f"the native engine was asked for, but it is not available: {why_not_native()}"
            )
        return Choice("python")
    executable = native.isas()
    if isa != "auto" and isa not in executable:
        raise RuntimeError(
            f"isa {isa!r} was asked for, but this build and CPU have {', '.join(executable)}"
        )
    if tiles == "auto":
        # Some BLAS kernels (OpenBLAS's Haswell and Zen) round a row differently at another place in
        # the tile. So BLAS is never the default, even where it is faster than the scalar kernels.
        tiles = "simd"
    if isa == "auto":
        isa = native.best_isa(code if tiles == "simd" else FLOAT32)
    return Choice("native", tiles, isa)


def decode_occupancy(choice: Choice, code: int) -> tuple[float, float]:
    """Return the share of a vector's lanes up to which the decode kernels compute a group's rows.

    The first share is for keys that tiles read in place, the second for keys that tiles convert.
    """
    if choice.tiles == "blas":  # who asks for BLAS, which is never the default, gets only BLAS
        return 0.0, 0.0
    pairs = code == BFLOAT16 and choice.isa in _BFLOAT16_ONLY
    return DECODE_OCCUPANCY_PAIRS if pairs else DECODE_OCCUPANCY, DECODE_OCCUPANCY_CONVERTED


def from_environment() -> Request:
    """Return what the environment asks for; it is read once."""
    global _environment
    if _environment is None:
        engine, tiles, isa = (
            _checked(name, os.environ.get(name) or "auto", choices)
            for name, choices in zip(VARIABLES, (ENGINES, TILES, ISAS), strict=True)
        )
        _environment = (engine, tiles, isa)
    return _environment


def _checked(name: str, given: str, choices: tuple[str, ...]) -> str:
    if given not in choices:
        raise ValueError(f"{name} is {given!r}: it must be one of {', '.join(choices)}")
    return given
