"""solve(): a Problem to the engine in force, and its answer back to the caller."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import numpy as np

from ._dtypes import Array
from ._loader import native_module, notify_call_start, why_not_native
from ._problem.problem import Problem
from ._select import Request, decode_occupancy, from_environment, requested, resolve
from ._threads import get_num_threads

__all__ = ["notify_call_start", "solve"]


class _Runner(Protocol):
    """Computes a Problem: attention or, by `weights`, what the Problem's `stage` names.

    `linear` computes a layer's product (see _linear.py), `merge` one result from those over parts
    of the keys (see _merge.py).
    """

    def __call__(self, problem: Problem) -> None: ...

    def weights(self, problem: Problem) -> None: ...

    def linear(
        self, x: Array, weight: Array, code: int, bias: Array | None, out: Array, num_threads: int
    ) -> None: ...

    def merge(
        self,
        outputs: list[Array],
        codes: list[int],
        lses: list[Array],
        sinks: Array | None,
        out: Array,
        out_code: int,
        lse: Array,
        num_threads: int,
    ) -> None: ...


class _PythonRunner:
    """Run the Python engine, which is imported when the first one is made."""

    def __init__(self) -> None:
        from . import _linear, _python_engine, _python_merge, _python_weights

        self.run = _python_engine.run
        self.weights = _python_weights.run
        self.linear = _linear.python_linear
        self.merge = _python_merge.run

    def __call__(self, problem: Problem) -> None:
        self.run(problem)


_runners: dict[tuple[Request | None, int], _Runner] = {}
_warned = False


class _NoShortcuts:
    """Recognise no call, while no native engine is loaded."""

    @staticmethod
    def attend(*arguments: Any) -> None:
        pass

    attend_pages = attend_cache = attend_tensors = attend


shortcuts: Any = _NoShortcuts  # see _native/shortcut.pyx
_unconnected = [True]  # whoever takes the entry connects the shortcuts, before any call uses them


def solve(p: Problem) -> Array | tuple[Array, Array]:
    """Compute a problem with the engine in force; return what the caller gets."""
    runner = runner_of(p.code)
    if p.stage:
        runner.weights(p)
    else:
        runner(p)
    if p.target is not None:
        assert p.temporary is not None
        np.copyto(p.target, p.temporary)
    result: Array = p.result
    return result if p.lse_result is None else (result, p.lse_result)


def runner_of(code: int) -> _Runner:
    """Return what computes with an element type, by the engine in force."""
    key = (requested.get(), code)
    runner = _runners.get(key)
    if runner is None:
        runner = _runners.setdefault(key, _runner(*key))  # no thread's is replaced
    return runner


def _runner(request: Request | None, code: int) -> _Runner:
    """Return what computes problems of an element type for a request."""
    global shortcuts
    choice = resolve(request, code)
    if choice.engine == "python":
        _warn_without_native(request)
        return _PythonRunner()
    native = native_module()
    if shortcuts is _NoShortcuts and _may_connect():
        native.connect(requested, _runners, get_num_threads)
        shortcuts = native
    occupancies = decode_occupancy(choice, code)
    runner: _Runner = native.Runner(code, choice.tiles, choice.isa, *occupancies)
    return runner


def _may_connect() -> bool:
    """Return True once: of several threads' first calls, one connects the shortcuts."""
    try:
        return _unconnected.pop()
    except IndexError:
        return False


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
            stacklevel=6,  # the line that called the public function
        )
