"""Time integrations.torch: a call with hardly any work, and torch's encoder with patch().

The encoder has 2 layers of the size of BERT base: 12 heads of 64. "fast path" is torch's own way
for layers in eval mode, which calls no scaled_dot_product_attention; the others switch it off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest

import qkv_fast

torch = pytest.importorskip("torch", reason="torch is not installed")

from qkv_fast.integrations.torch import patch, scaled_dot_product_attention  # noqa: E402

ARRAY = np.ones((1, 1, 1, 64), np.float32)
TENSOR = torch.from_numpy(ARRAY)
CALLS = {
    "op, arrays": (qkv_fast.scaled_dot_product_attention, ARRAY),
    "op, tensors": (qkv_fast.scaled_dot_product_attention, TENSOR),
    "integrations.torch": (scaled_dot_product_attention, TENSOR),
    "integrations.torch, bfloat16": (scaled_dot_product_attention, TENSOR.bfloat16()),
    "operator": (torch.ops.qkv_fast.scaled_dot_product_attention, TENSOR),
    "torch": (torch.nn.functional.scaled_dot_product_attention, TENSOR),
}


@pytest.mark.benchmark(group="torch overhead")
@pytest.mark.parametrize("call", CALLS)
def bench_call(benchmark, call):
    function, x = CALLS[call]
    benchmark(function, x, x, x)


@contextlib.contextmanager
def way_of(way: str) -> Iterator[None]:
    """Let torch's layers go the way of this name."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(way == "fast path")
    try:
        with patch() if way == "patch" else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.benchmark(group="torch encoder", min_rounds=5, max_time=1)
@pytest.mark.parametrize(("batch", "length"), [(8, 128), (1, 512)])
@pytest.mark.parametrize("way", ["fast path", "slow path", "patch"])
def bench_encoder(benchmark, way, batch, length):
    layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(batch, length, 768)
    with torch.inference_mode(), way_of(way):
        benchmark(model, x)
