"""Each shape on NumPy and on every engine, tile kind and ISA: ``pytest benches/``."""

from __future__ import annotations

import numpy as np
import pytest
from shapes import SHAPES

import qkv_fast
from qkv_fast import _backend


def numpy_attention(q, k, v, is_causal):
    """Attention as one writes it by hand."""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat(q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5)
    if is_causal:
        scores[..., ~np.tri(*scores.shape[-2:], dtype=bool)] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores @ v


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
