"""Time attention and a NumPy product alone and alternating, as in the layers of a transformer.

Threads that spin after their work occupy CPUs that the next library's threads need. The time of
the pair should be close to the sum of both times alone.
"""

from __future__ import annotations

import numpy as np
import pytest

from qkv_fast import scaled_dot_product_attention

RNG = np.random.default_rng(0)
Q, K, V = RNG.standard_normal((3, 1, 12, 128, 64), np.float32)
A, B = RNG.standard_normal((2, 256, 256), np.float32)
OUT, C = np.empty_like(Q), np.empty_like(A)


def attend():
    scaled_dot_product_attention(Q, K, V, out=OUT)


def multiply():
    np.matmul(A, B, out=C)


def both():
    multiply()
    attend()


@pytest.mark.benchmark(group="interplay")
@pytest.mark.parametrize("run", [attend, multiply, both], ids=lambda f: f.__name__)
def bench_interplay(benchmark, run):
    benchmark(run)
