"""The weights themselves, beside NumPy's three lines and PyTorch's explicit softmax."""

from __future__ import annotations

import numpy as np
import pytest

from qkv_fast import attention_weights, scaled_dot_product_attention

Q, K = np.random.default_rng(0).standard_normal((2, 1, 12, 512, 64), np.float32)


def numpy_weights() -> np.ndarray:
    scores = Q @ K.swapaxes(-1, -2) * np.float32(0.125)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.benchmark(group="weights")
@pytest.mark.parametrize("stage", ["softmax", "masked", "scaled"])
@pytest.mark.parametrize("causal", [False, True])
def bench_stage(benchmark, stage, causal):
    benchmark(attention_weights, Q, K, is_causal=causal, stage=stage)


@pytest.mark.benchmark(group="weights")
@pytest.mark.parametrize("peer", ["op", "numpy", "torch"])
def bench_peer(benchmark, peer):
    if peer == "op":
        benchmark(scaled_dot_product_attention, Q, K, K)
    elif peer == "numpy":
        benchmark(numpy_weights)
    else:
        torch = pytest.importorskip("torch")
        q, k = torch.from_numpy(Q), torch.from_numpy(K)
        benchmark(lambda: torch.softmax(q @ k.transpose(-1, -2) * 0.125, -1))
