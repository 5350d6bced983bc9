"""The shapes that are measured, under names, and what their figures mean."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Shape(NamedTuple):
    """One attention call: batch, heads, lengths and head size."""

    batch: int
    num_heads: int
    q_len: int
    head_dim: int
    is_causal: bool = False
    kv_len: int = 0  # q_len when 0
    num_kv_heads: int = 0  # num_heads when 0

    @property
    def keys(self) -> int:
        """Return the number of keys."""
        return self.kv_len or self.q_len

    @property
    def gflop(self) -> float:
        """Billions of operations: 4 B H Lq Lk D, and half of that when causal."""
        scores = self.batch * self.num_heads * self.q_len * self.keys
        return 4e-9 * scores * self.head_dim / (2 if self.is_causal else 1)

    def tensors(self, seed: int = 0) -> tuple[npt.NDArray[np.float32], ...]:
        """Return query, key, value: standard normal, float32."""
        rng = np.random.default_rng(seed)
        kv_heads = self.num_kv_heads or self.num_heads
        q = rng.standard_normal((self.batch, self.num_heads, self.q_len, self.head_dim), "f4")
        k, v = rng.standard_normal((2, self.batch, kv_heads, self.keys, self.head_dim), "f4")
        return q, k, v


SHAPES = {
    # BERT-base, encoder: all tokens see all
    "bert-128": Shape(1, 12, 128, 64),
    "bert-512": Shape(1, 12, 512, 64),
    "bert-128-batch8": Shape(8, 12, 128, 64),
    # long sequences and other head sizes
    "16x2048x64": Shape(1, 16, 2048, 64),
    "8x4096x128": Shape(1, 8, 4096, 128),
    "2x16x1024x32": Shape(2, 16, 1024, 32),
    "16x1024x80": Shape(1, 16, 1024, 80),
    "4x4096x256": Shape(1, 4, 4096, 256),
    # decoders
    "causal-12x512x64": Shape(1, 12, 512, 64, is_causal=True),
    "gpt2-causal-1024": Shape(1, 12, 1024, 64, is_causal=True),
    "causal-16x2048x64": Shape(1, 16, 2048, 64, is_causal=True),
    "causal-8x4096x128": Shape(1, 8, 4096, 128, is_causal=True),
    # one new token against a cache
    "decode-32-8x4096x128": Shape(1, 32, 1, 128, kv_len=4096, num_kv_heads=8),
}
