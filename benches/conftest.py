"""Add to each benchmark its GFLOP/s and their share of the multiply-add peak of the same run."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import qkv_fast
from qkv_fast.bench.probes import limits
from qkv_fast.bench.shapes import Shape


@functools.cache
def peak(threads: int, dtype: str) -> float:
    """Return the GFLOP/s of multiply-adds in registers; 0 without the native engine."""
    return limits(dtype, threads)[0]


@pytest.fixture
def note(benchmark):
    """Return a function that writes a shape's figures into the finished benchmark."""

    def write(shape: Shape, choice: str, dtype: str) -> None:
        threads = qkv_fast.get_num_threads()
        benchmark.extra_info.update(
            threads=threads, choice=choice, dtype=dtype, numpy=np.__version__
        )
        if benchmark.disabled or benchmark.stats is None:
            return
        speed = shape.gflop / benchmark.stats["median"]
        benchmark.extra_info["gflops"] = round(speed, 1)
        if peak(threads, dtype):
            benchmark.extra_info["share_of_peak"] = round(speed / peak(threads, dtype), 3)

    return write
