"""Sums of the weights, beside the op on the same tokens and beside the weights summed in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from qkv_fast import analysis, attention_weights, scaled_dot_product_attention

Q, K, V = np.random.default_rng(0).standard_normal((3, 1, 8, 2048, 64), np.float32)


def summed_weights(is_causal: bool) -> np.ndarray:
    return attention_weights(Q, K, is_causal=is_causal).sum(axis=-2)


@pytest.mark.benchmark(group="analysis")
@pytest.mark.parametrize("what", ["received", "received, lse", "statistics", "op", "summed"])
@pytest.mark.parametrize("causal", [False, True])
def bench_analysis(benchmark, what, causal):
    lse = scaled_dot_product_attention(Q, K, V, is_causal=causal, return_lse=True)[1]
    calls = {
        "received": lambda: analysis.attention_received(Q, K, is_causal=causal),
        "received, lse": lambda: analysis.attention_received(Q, K, is_causal=causal, lse=lse),
        "statistics": lambda: analysis.attention_statistics(Q, K, is_causal=causal),
        "op": lambda: scaled_dot_product_attention(Q, K, V, is_causal=causal),
        "summed": lambda: summed_weights(causal),
    }
    benchmark(calls[what])


@pytest.mark.benchmark(group="analysis-window")
@pytest.mark.parametrize("what", ["last 32 rows", "op"])
def bench_last_rows(benchmark, what):
    if what == "op":
        benchmark(scaled_dot_product_attention, Q, K, V, is_causal=True)
    else:
        benchmark(analysis.attention_received, Q, K, is_causal=True, rows=slice(-32, None))
