"""What several test files use: inputs, comparisons, child processes, switches of the shortcut."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import qkv_fast
from qkv_fast import _dispatch, _loader

sdpa_shapes = {
    "one": (1, 1, 1, 1, 1, 1, 1),  # B, Hq, Hkv, Lq, Lk, D, Dv
    "small": (2, 3, 3, 5, 7, 4, 6),
    "odd": (1, 2, 2, 67, 131, 33, 17),
    "grouped": (2, 6, 2, 35, 70, 16, 24),
    "long": (1, 2, 2, 130, 300, 64, 64),
    "wide": (1, 1, 1, 20, 70, 1030, 40),
}


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def make(
    rng: np.random.Generator, shape: tuple[int, ...] | str, dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    b, hq, hkv, lq, lk, d, dv = sdpa_shapes[shape] if isinstance(shape, str) else shape
    return (
        normal(rng, (b, hq, lq, d), dtype),
        normal(rng, (b, hkv, lk, d), dtype),
        normal(rng, (b, hkv, lk, dv), dtype),
    )


def layouts(x: np.ndarray) -> dict[str, np.ndarray]:
    """Return arrays equal to x in other layouts."""
    wide = np.zeros((*x.shape[:-1], x.shape[-1] * 2), x.dtype)
    wide[..., ::2] = x
    raw = np.zeros(x.nbytes + 1, np.uint8)
    raw[1:] = np.frombuffer(x.tobytes(), np.uint8)
    rows = np.zeros((*x.shape[:-2], x.shape[-2] * 3, x.shape[-1]), x.dtype)
    rows[..., 1::3, :] = x
    return {
        "negative": x[..., ::-1, ::-1].copy()[..., ::-1, ::-1],
        "negative rows": x[:, ::-1, ::-1].copy()[:, ::-1, ::-1],
        "strided": wide[..., ::2],
        "strided rows": rows[..., 1::3, :],
        "unaligned": raw[1:].view(x.dtype).reshape(x.shape),
        "fortran": np.asfortranarray(x),
        "heads last": x.swapaxes(1, 2).copy().swapaxes(1, 2),
        "swapped bytes": x.astype(x.dtype.newbyteorder()),
    }


def load_example(name: str) -> ModuleType:
    """Return a script of examples/ as a module."""
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    if not path.parent.exists():  # a wheel is tested without them
        pytest.skip("needs examples/", allow_module_level=True)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_same(first: Any, second: Any) -> None:
    """Check that two results agree in bits, dtype, strides and flags, and are as many arrays."""
    assert type(first) is type(second)
    if isinstance(first, tuple):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same(a, b)
        return
    assert type(first) is np.ndarray
    assert first.dtype == second.dtype
    assert first.dtype.isnative
    assert first.shape == second.shape
    assert first.strides == second.strides
    assert str(first.flags) == str(second.flags)
    assert first.tobytes() == second.tobytes()


def count_of(variable: str, default: int) -> int:
    """Return how often a test repeats something: what the environment says, or a small number."""
    return int(os.environ.get(variable) or default)


PATIENCE = count_of("QKV_TEST_PATIENCE", 1)  # multiplies time limits: for emulators, sanitizers


def run_python(
    code: str, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, with no QKV_*, OMP_* or GOMP_* variables but those given.

    Raises subprocess.TimeoutExpired after `timeout` seconds, times ``QKV_TEST_PATIENCE``.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("QKV_", "OMP_", "GOMP_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=timeout * PATIENCE,
        check=False,
    )


@contextlib.contextmanager
def connected(runners: Any, thread_count: Any = _dispatch.get_num_threads) -> Iterator[None]:
    """Give the shortcut these runners; without runners it leaves all calls to the stages."""
    if not _loader.why_not_native():
        one = np.ones((1, 1, 1), np.float32)
        qkv_fast.scaled_dot_product_attention(one, one, one)  # the first call connects the shortcut
        native = _loader.native_module()
        native.connect(_dispatch.requested, runners, thread_count)
    try:
        yield
    finally:
        if not _loader.why_not_native():
            native.connect(_dispatch.requested, _dispatch._runners, _dispatch.get_num_threads)


def without_shortcut() -> contextlib.AbstractContextManager[None]:
    """Send all calls through the stages."""
    return connected({})


@contextlib.contextmanager
def counted() -> Iterator[list[bool]]:
    """Yield a list that gets an entry for each call: whether the shortcut computed it."""
    with connected(_dispatch._runners):
        pass
    taken: list[bool] = []
    shortcuts = _dispatch.shortcuts

    def counting(name: str) -> Any:
        def count(*arguments: Any) -> Any:
            answer = getattr(shortcuts, name)(*arguments)
            taken.append(answer is not None)
            return answer

        return count

    names = ("attend", "attend_pages", "attend_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "shortcuts", SimpleNamespace(**{n: counting(n) for n in names}))
        yield taken
