"""Loads the native engine, once and on first use, and says why it is not there."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from ._threads import cgroup_quota

NATIVE = "qkv_fast._native"

_native: ModuleType | None = None
_native_error = ""
_notify: Callable[[], None] | None = None  # set while the engine is loaded


def load_native() -> ModuleType | None:
    """Import the native engine; return None if it is not there."""
    global _native, _native_error, _notify
    if _native is None and not _native_error:
        try:
            with _short_spin():
                native = importlib.import_module(NATIVE)
        except ImportError as error:
            _native_error = build_facts().get("reason") or str(error)
        else:
            quota = cgroup_quota()
            if quota is not None:
                native.limit_cpus(int(quota))
            _notify = native.notify_call_start
            _native = native  # last: other threads may now use it
    return _native


def loaded_native() -> ModuleType | None:
    """Return the native engine if some call has loaded it."""
    return _native


def native_module() -> ModuleType:
    """Return the native engine; the caller knows that it is there."""
    native = load_native()
    assert native is not None
    return native


def why_not_native() -> str:
    """Return why the native engine is not there, or an empty string."""
    return _native_error if load_native() is None else ""


def notify_call_start() -> None:
    """Tell the native engine that a call begins: its threads stay awake while it is checked."""
    if _notify is not None:
        _notify()


def build_facts() -> dict[str, Any]:
    """Return what setup.py noted when it built the package."""
    import json  # it takes 2 ms, and `import qkv_fast` does not need it

    path = os.path.join(os.path.dirname(__file__), "_build_info.json")
    try:
        with open(path, encoding="utf-8") as file:
            facts: dict[str, Any] = json.load(file)
    except (OSError, ValueError):
        return {}
    return facts


@contextlib.contextmanager
def _short_spin() -> Iterator[None]:
    """Bound the time that libgomp's idle threads spin, should this be an OpenMP build.

    libgomp reads its environment once, when it is loaded. By default its threads spin for
    milliseconds on the CPUs that NumPy's BLAS wants next.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = "1000"
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)  # another thread may have been here too
