"""Each shape on NumPy and on every engine, tile kind and ISA: ``pytest benches/``."""

from __future__ import annotations

import numpy as np
import pytest

import qkv_fast
from qkv_fast import _backend
from qkv_fast.bench.peers import numpy_attention
from qkv_fast.bench.shapes import SHAPES


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "choice", ["numpy", *_backend.available()], ids=lambda c: c if c == "numpy" else "-".join(c)
)
def bench_attention(benchmark, note, name, choice):
    shape = SHAPES[name]
    q, k, v = shape.tensors()
    benchmark.group = name
    if choice == "numpy":
        benchmark(numpy_attention, q, k, v, shape.is_causal)
        note(shape, "numpy")
        return
    options = {"is_causal": shape.is_causal, "enable_gqa": True, "out": np.empty_like(q)}
    with qkv_fast.backend(choice.engine, tiles=choice.tiles or "auto", isa=choice.isa or "auto"):
        benchmark(qkv_fast.scaled_dot_product_attention, q, k, v, **options)
    note(shape, "-".join(filter(None, choice)))
