"""show_config: what is installed and in force, to paste into a bug report."""

from __future__ import annotations

import platform
import sys
from typing import Any, Literal, overload

import numpy as np

from . import _loader, _select, _threads


@overload
def show_config(mode: Literal["stdout"] = ...) -> None: ...


@overload
def show_config(mode: Literal["dicts"]) -> dict[str, str]: ...


def show_config(mode: Literal["stdout", "dicts"] = "stdout") -> dict[str, str] | None:
    """Show the version, the engine in force and what it stands on.

    Parameters
    ----------
    mode : {"stdout", "dicts"}
        Print the facts, or return them as a dict.

    Returns
    -------
    dict of str or None
        The facts, with mode "dicts".

    Raises
    ------
    ValueError
        Another mode.

    Examples
    --------
    >>> import qkv_fast
    >>> "version" in qkv_fast.show_config("dicts")
    True
    """
    if mode not in ("stdout", "dicts"):
        raise ValueError(f"mode is {mode!r}: it must be one of stdout, dicts")
    facts = _facts()
    if mode == "dicts":
        return facts
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")
    return None


def _facts() -> dict[str, str]:
    import scipy

    from . import __version__

    choice = _select.current()
    build = _loader.build_facts()
    facts = {"version": __version__, "engine": choice.engine}
    if choice.engine == "native":
        facts["tiles"] = choice.tiles
        facts["isa"] = choice.isa
    reason = _loader.why_not_native()
    if reason:
        facts["native engine"] = f"not available: {reason}"
    else:
        native = _loader.native_module()
        info = native.info()
        facts["isas available"] = ", ".join(native.isas())
        facts["threading"] = info["threading"]
        facts["compiler"] = info["compiler"]
    if build.get("compiler"):
        facts["built with"] = str(build["compiler"])
    facts["threads"] = f"{_threads.get_num_threads()} ({_threads.source()})"
    facts["blas"] = _blas_facts(scipy)
    facts["numpy"] = np.__version__
    facts["scipy"] = scipy.__version__
    facts["python"] = f"{platform.python_implementation()} {platform.python_version()}"
    facts["platform"] = f"{sys.platform} {platform.machine()}"
    return facts


def _blas_facts(scipy: Any) -> str:
    """Return name, version and threading of the BLAS that scipy was built with."""
    config = scipy.show_config(mode="dicts") or {}
    blas = config.get("Build Dependencies", {}).get("blas", {})
    settings = str(blas.get("openblas configuration", ""))
    threading = "pthreads" if "USE_OPENMP=" not in settings else "OpenMP"
    if not settings:
        threading = "threading not stated"
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')} ({threading})"
