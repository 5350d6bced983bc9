"""Inputs for the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np

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


def assert_same(first: Any, second: Any) -> None:
    """Check that two answers agree in bits, element type, layout, flags and number."""
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


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter, with nothing of ours in the environment but what is given."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("QKV_", "OMP_", "GOMP_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
