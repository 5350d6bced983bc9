"""Time a call with hardly any work, (1, 1, 1, 64) in float32, and the three steps in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

import qkv_fast
from qkv_fast.bench.peers import numpy_attention

X = np.ones((1, 1, 1, 64), np.float32)


@pytest.mark.benchmark(group="overhead")
def bench_numpy(benchmark):
    benchmark(numpy_attention, X, X, X, False)


@pytest.mark.benchmark(group="overhead")
@pytest.mark.parametrize("engine", sorted({x["backend"] for x in qkv_fast.available_backends()}))
def bench_call(benchmark, engine):
    with qkv_fast.backend(engine):
        benchmark(qkv_fast.scaled_dot_product_attention, X, X, X)
