"""Time calls with masks and score modifiers, to compare with a plain call of the same shape."""

from __future__ import annotations

import numpy as np
import pytest

from qkv_fast import scaled_dot_product_attention

BATCH, HEADS, LENGTH, HEAD_DIM = 2, 8, 1024, 64
RNG = np.random.default_rng(0)
FULL = (BATCH, HEADS, LENGTH, LENGTH)
SEEN = LENGTH // 2 + 40
FEATURES = {
    "none": lambda: {},
    "boolean mask": lambda: {"attn_mask": RNG.random(FULL) > 0.3},
    "additive mask": lambda: {"attn_mask": RNG.standard_normal(FULL, np.float32)},
    "additive mask, all heads": lambda: {"attn_mask": RNG.standard_normal(FULL[2:], np.float32)},
    "padding mask": lambda: {"attn_mask": np.arange(LENGTH)[None, None, None] < SEEN},
    "key_lengths": lambda: {"key_lengths": SEEN},
    "causal": lambda: {"is_causal": True},
    "window": lambda: {"window": (255, 0)},
    "block mask": lambda: {"attn_mask": np.kron(np.eye(8, dtype=bool), np.ones((128, 128), bool))},
    "softcap": lambda: {"softcap": 30.0},
    "alibi": lambda: {"alibi_slopes": np.full(HEADS, 0.1)},
}


@pytest.mark.benchmark(group="features")
@pytest.mark.parametrize("name", FEATURES)
def bench_feature(benchmark, name):
    q, k, v = RNG.standard_normal((3, BATCH, HEADS, LENGTH, HEAD_DIM), np.float32)
    out, options = np.empty_like(q), FEATURES[name]()
    benchmark(scaled_dot_product_attention, q, k, v, out=out, **options)
