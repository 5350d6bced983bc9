"""The one decision of which engine computes a call, with which tiles and which ISA."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ._dtypes import BFLOAT16, FLOAT32, code_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from ._problem.problem import Problem

ENGINES = ("auto", "native", "python")
TILES = ("auto", "simd", "blas")
ISAS = ("auto", "scalar", "avx2", "avx512", "avx512bf16", "amx")  # weakest first
_BFLOAT16_ONLY = ("avx512bf16", "amx")  # the kernels of "avx512" for all other dtypes

# Where the two kinds of kernels take about the same time: 8 heads, 1024 to 65536 keys of size 128
# (docs/architecture.md). With 16 lanes of float32 that is at 10 rows, with 8 at 6, and more rows
# than a vector has lanes are always faster in tiles. bfloat16 in pairs is faster from 6 to 10 rows
# on. Tiles that convert keys first (float16, int8) are only so from 16 on, and again from 24.
FEW_SHARE = 0.625
FEW_SHARE_PAIRS = 0.3
FEW_SHARE_CONVERTED = 0.875

_VARIABLES = ("QKV_FAST_BACKEND", "QKV_FAST_TILES", "QKV_FAST_ISA")


class Choice(NamedTuple):
    """An engine, and for the native one its tiles and ISA."""

    engine: str
    tiles: str = ""
    isa: str = ""


_Wish = tuple[str, str, str]
_Runner = Callable[["Problem"], None]

_wish: contextvars.ContextVar[_Wish | None] = contextvars.ContextVar("backend", default=None)
_environment: _Wish | None = None
_runners: dict[tuple[_Wish | None, int], _Runner] = {}
_native: ModuleType | None = None
_native_error = ""
_warned = False


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
        takes the SIMD kernels, whose results do not depend on a row's place among the queries.
        Those of SciPy's BLAS may, in their last bits; they depend on neither threads nor batch.
    isa : {"auto", "scalar", "avx2", "avx512", "avx512bf16", "amx"}
        The instruction set. "auto" leaves it to ``QKV_FAST_ISA``, else takes the fastest for the
        dtype. The last two differ from "avx512" for bfloat16 only.

    Raises
    ------
    ValueError
        A word that is none of these.
    RuntimeError
        What is asked for is not there: not built, or not executable by this CPU.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast
    >>> x = np.ones((1, 2, 3, 4), np.float32)
    >>> with qkv_fast.backend("python"):
    ...     qkv_fast.scaled_dot_product_attention(x, x, x).sum()
    np.float32(24.0)
    """
    wish = (
        _checked("backend", backend, ENGINES),
        _checked("tiles", tiles, TILES),
        _checked("isa", isa, ISAS),
    )
    resolve(wish, FLOAT32)
    token = _wish.set(wish)
    try:
        yield
    finally:
        _wish.reset(token)


def announce() -> None:
    """Say that a call begins: while it is checked, threads that are still awake stay so."""
    if _native is not None:
        _native.announce()


def dispatch(problem: Problem) -> None:
    """Compute `problem` with the engine in force."""
    key = (_wish.get(), problem.code)
    runner = _runners.get(key)
    if runner is None:
        runner = _runners[key] = _runner(*key)
    runner(problem)


def current(dtype: npt.DTypeLike = "float32") -> Choice:
    """Return what a call with this dtype would use here and now."""
    if isinstance(dtype, str) and dtype == "bfloat16":  # a name that NumPy alone does not know
        return resolve(_wish.get(), BFLOAT16)
    return resolve(_wish.get(), code_of(np.dtype(dtype)))


def available(dtype: str = "float32") -> list[Choice]:
    """Return what differs for a dtype and this machine can execute, the Python engine first."""
    choices = [Choice("python")]
    native = _load_native()
    if native is not None:
        isas = [isa for isa in native.isas() if dtype == "bfloat16" or isa not in _BFLOAT16_ONLY]
        choices += [Choice("native", "simd", isa) for isa in isas]
        choices.append(Choice("native", "blas", native.best_isa(FLOAT32)))
    return choices


def why_not_native() -> str:
    """Return why the native engine is not there, or an empty string."""
    return _native_error if _load_native() is None else ""


def build_facts() -> dict[str, Any]:
    """Return what setup.py noted when it built the package."""
    try:
        facts: dict[str, Any] = json.loads(
            Path(__file__).with_name("_build_info.json").read_text(encoding="utf-8")
        )
    except (OSError, ValueError):
        return {}
    return facts


def resolve(wish: _Wish | None, code: int) -> Choice:
    """Turn what was wished for, here and in the environment, into what is used, or raise.

    `code` is the element type of the problem, as `_problem.py` numbers them.
    """
    wish = wish or ("auto", "auto", "auto")
    engine, tiles, isa = (
        default if word == "auto" else word
        for word, default in zip(wish, _from_environment(), strict=True)
    )
    if engine == "python":
        return Choice("python")
    native = _load_native()
    if native is None:
        if engine == "native" or (engine == "auto" and (tiles != "auto" or isa != "auto")):
            raise RuntimeError(
                f"the native engine was asked for, but it is not available: {_native_error}"
            )
        return Choice("python")
    executable = native.isas()
    if isa != "auto" and isa not in executable:
        raise RuntimeError(
            f"isa {isa!r} was asked for, but this build and CPU have {', '.join(executable)}"
        )
    if tiles == "auto":
        # A BLAS kernel may round a row otherwise in another place of its tile (OpenBLAS's Haswell
        # and Zen do), so BLAS is never the default, even where it is faster than the scalar table.
        tiles = "simd"
    if isa == "auto":
        isa = native.best_isa(code if tiles == "simd" else FLOAT32)
    return Choice("native", tiles, isa)


def few_shares(choice: Choice, code: int) -> tuple[float, float]:
    """Return the share of a tile's lanes up to which rows are few, for the native engine.

    First that where tiles take the keys as they are, for no more rows than a vector has lanes; then
    that where they convert them.

    A KV group's rows are its query heads times its queries. Kernels for few rows (csrc/few_rows.h)
    take time for each row, tiles for each vector of rows.
    """
    if choice.tiles == "blas":  # only ever asked for: then it computes everything
        return 0.0, 0.0
    paired = code == BFLOAT16 and choice.isa in _BFLOAT16_ONLY
    return FEW_SHARE_PAIRS if paired else FEW_SHARE, FEW_SHARE_CONVERTED


def _runner(wish: _Wish | None, code: int) -> _Runner:
    global _warned
    choice = resolve(wish, code)
    if choice.engine == "python":
        from ._reference import run

        asked = (wish or ("auto",))[0] == "python" or _from_environment()[0] == "python"
        if not asked and not _warned:
            _warned = True
            warnings.warn(
                f"qkv_fast: the compiled engine is not available ({_native_error}); "
                "using the pure-Python engine",
                RuntimeWarning,
                stacklevel=4,
            )
        return run
    native_run, tiles, isa = _native_module().run, choice.tiles, choice.isa
    if tiles == "blas":
        _native_module().load_blas()
    shares = few_shares(choice, code)
    return lambda problem: native_run(problem, tiles, isa, *shares)


def _native_module() -> ModuleType:
    native = _load_native()
    assert native is not None
    return native


def _load_native() -> ModuleType | None:
    """Import the extension, once."""
    global _native, _native_error
    if _native is None and not _native_error:
        try:
            with _short_spin():
                _native = importlib.import_module("qkv_fast._native")
        except ImportError as error:
            _native_error = build_facts().get("reason") or str(error)
    return _native


@contextlib.contextmanager
def _short_spin() -> Iterator[None]:
    """Bound the time that libgomp's idle threads spin, should this be an OpenMP build.

    It reads its environment once, when it is loaded. By default its threads spin for
    milliseconds on the CPUs that NumPy's BLAS wants next.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = "1000"
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]


def _checked(name: str, word: str, words: tuple[str, ...]) -> str:
    if word not in words:
        raise ValueError(f"{name} is {word!r}: it must be one of {', '.join(words)}")
    return word


def _from_environment() -> _Wish:
    global _environment
    if _environment is None:
        engine, tiles, isa = (
            _checked(name, os.environ.get(name) or "auto", words)
            for name, words in zip(_VARIABLES, (ENGINES, TILES, ISAS), strict=True)
        )
        _environment = (engine, tiles, isa)
    return _environment
