"""Time rotary embedding: one token, and prompts in blocks of several sizes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qkv_fast import rotary
from qkv_fast.rotary import Rotary

HEAD_DIM = 64
PAIRINGS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


@pytest.mark.benchmark(group="one token of 9 heads")
@PAIRINGS
@pytest.mark.parametrize("position", ["seen", "new"])
def bench_token(benchmark, interleaved, position):
    x = np.ones((1, 9, 1, HEAD_DIM), np.float32)
    turn = Rotary(HEAD_DIM, interleaved=interleaved)
    positions = itertools.count() if position == "new" else itertools.repeat(1000)
    benchmark(lambda: turn(x, next(positions)))


@pytest.mark.benchmark(group="2048 tokens of 32 heads")
@PAIRINGS
@pytest.mark.parametrize("layout", ["heads first", "fused"])
@pytest.mark.parametrize("log2_block", [16, 18, 19, 20, 21, 22, 26])
def bench_prompt(benchmark, interleaved, layout, log2_block, monkeypatch):
    """In place; "fused" are the queries in a product of (batch, length, 3, heads, head_dim).

    The block is a compromise between the calls of NumPy and temporaries beyond the L2 cache.
    """
    x = np.zeros((1, 32, 2048, HEAD_DIM), np.float32)
    if layout == "fused":
        x = np.zeros((1, 2048, 3, 32, HEAD_DIM), np.float32)[:, :, 0].transpose(0, 2, 1, 3)
    monkeypatch.setattr(rotary, "BLOCK", 1 << log2_block)
    turn = Rotary(HEAD_DIM, interleaved=interleaved)
    benchmark(lambda: turn(x, out=x))
