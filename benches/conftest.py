"""Figures beside each benchmark: GFLOP/s, and its share of the FMA peak of the same run."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import qkv_fast
from qkv_fast import _backend
from qkv_fast.bench.shapes import Shape


@functools.cache
def fma_peak(threads: int) -> float:
    """GFLOP/s of float32 multiply-adds in registers; 0 without the native engine."""
    if _backend.why_not_native():
        return 0.0
    peak: float = _backend._native_module().fma_peak(threads)
    return peak


@pytest.fixture
def note(benchmark, request):
    """Return a function that notes a shape's figures once the benchmark has run."""

    def write(shape: Shape, isa: str) -> None:
        threads = qkv_fast.get_num_threads()
        benchmark.extra_info.update(threads=threads, isa=isa, numpy=np.__version__)
        if benchmark.disabled or benchmark.stats is None:
            return
        speed = shape.gflop / benchmark.stats["median"]
        benchmark.extra_info["gflops"] = round(speed, 1)
        if fma_peak(threads):
            benchmark.extra_info["share_of_fma_peak"] = round(speed / fma_peak(threads), 3)

    return write
