"""Time each shape with NumPy and on every engine, tile kind and ISA: ``pytest benches``."""

from __future__ import annotations

import numpy as np
import pytest

import qkv_fast
from qkv_fast.bench.peers import numpy_attention
from qkv_fast.bench.probes import bfloat16_bits
from qkv_fast.bench.shapes import SHAPES

FLOAT32 = qkv_fast.available_backends("float32")
BFLOAT16 = [c for c in qkv_fast.available_backends("bfloat16") if c.get("tiles") == "simd"]


def identify(choice: dict[str, str]) -> str:
    """Return a choice's name."""
    return "-".join(choice.values())


@pytest.mark.parametrize("name", SHAPES)
def bench_numpy(benchmark, note, name):
    benchmark.group = name
    benchmark(numpy_attention, *SHAPES[name].tensors(), SHAPES[name].is_causal)
    note(SHAPES[name], "numpy", "float32")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("choice", FLOAT32, ids=identify)
def bench_float32(benchmark, note, name, choice):
    run(benchmark, note, name, choice, "float32", SHAPES[name].tensors(), None)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("choice", BFLOAT16, ids=identify)
def bench_bfloat16(benchmark, note, name, choice):
    tensors = [bfloat16_bits(x) for x in SHAPES[name].tensors()]
    run(benchmark, note, name, choice, "bfloat16", tensors, "bfloat16")


def run(benchmark, note, name, choice, kind, tensors, dtype):
    """Measure one choice on one shape."""
    benchmark.group = name
    options = {"is_causal": SHAPES[name].is_causal, "enable_gqa": True, "dtype": dtype}
    options["out"] = np.empty_like(tensors[0])
    with qkv_fast.backend(**choice):
        benchmark(qkv_fast.scaled_dot_product_attention, *tensors, **options)
    note(SHAPES[name], identify(choice), kind)
