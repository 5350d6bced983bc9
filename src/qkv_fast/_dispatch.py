"""solve(): a Problem to the engine in force, and its answer back to the caller."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from ._dtypes import Array
from ._loader import native_module, notify_call_start, why_not_native
from ._problem.problem import Problem
from ._select import Request, decode_occupancy, from_environment, requested, resolve

__all__ = ["notify_call_start", "solve"]

_Runner = Callable[[Problem], None]
_runners: dict[tuple[Request | None, int], _Runner] = {}
_warned = False


def solve(p: Problem) -> Array | tuple[Array, Array]:
    """Compute a problem with the engine in force; return what the caller gets."""
    key = (requested.get(), p.code)
    runner = _runners.get(key)
    if runner is None:
        runner = _runners[key] = _runner(*key)
    runner(p)
    if p.target is not None:
        assert p.temporary is not None
        np.copyto(p.target, p.temporary)
    result: Array = p.result
    return result if p.lse_result is None else (result, p.lse_result)


def _runner(request: Request | None, code: int) -> _Runner:
    """Return what computes problems of an element type for a request."""
    choice = resolve(request, code)
    if choice.engine == "python":
        from ._python_engine import run

        _warn_without_native(request)
        return run
    native, tiles, isa = native_module(), choice.tiles, choice.isa
    if tiles == "blas":
        native.load_blas()
    native_run, occupancies = native.run, decode_occupancy(choice, code)
    return lambda p: native_run(p, tiles, isa, *occupancies)


def _warn_without_native(request: Request | None) -> None:
    """Warn once if the Python engine computes though nobody asked for it."""
    global _warned
    asked = (request or ("auto",))[0] == "python" or from_environment()[0] == "python"
    if not asked and not _warned:
        _warned = True
        warnings.warn(
            f"qkv_fast: the compiled engine is not available ({why_not_native()}); "
            "using the pure-Python engine",
            RuntimeWarning,
            stacklevel=5,  # the line that called the public function
        )
