"""The shapes that are measured, under names, and what their figures mean."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, NamedTuple

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

    def read_gigabytes(self, dtype: str) -> float:
        """Billions of bytes of keys and values, each read once; without the factors of int8."""
        kv_heads = self.num_kv_heads or self.num_heads
        elements = 2 * self.batch * kv_heads * self.keys * self.head_dim
        return 1e-9 * elements * {"float32": 4, "int8": 1}.get(dtype, 2)

    def tensors(self, seed: int = 0) -> tuple[npt.NDArray[Any], ...]:
        """Return query, key, value: standard normal, float32."""
        rng = np.random.default_rng(seed)
        kv_heads = self.num_kv_heads or self.num_heads
        q = rng.standard_normal((self.batch, self.num_heads, self.q_len, self.head_dim), "f4")
        k, v = rng.standard_normal((2, self.batch, kv_heads, self.keys, self.head_dim), "f4")
        return q, k, v


SHAPES = {
    # BERT-base, encoder: all tokens see all
    "bert-128": Shape(1, 12, 128, 64),
    "bert-256": Shape(1, 12, 256, 64),
    "bert-512": Shape(1, 12, 512, 64),
    "bert-128-batch8": Shape(8, 12, 128, 64),
    # many short sequences, and lengths that are no multiple of a tile
    "64x12x16x64": Shape(64, 12, 16, 64),
    "64x12x64x64": Shape(64, 12, 64, 64),
    "8x12x100x64": Shape(8, 12, 100, 64),
    "vit-197": Shape(8, 12, 197, 64),
    # long sequences and other head sizes
    "16x1024x64": Shape(1, 16, 1024, 64),
    "16x2048x64": Shape(1, 16, 2048, 64),
    "16x4096x64": Shape(1, 16, 4096, 64),
    "2x16x1024x32": Shape(2, 16, 1024, 32),
    "16x1024x80": Shape(1, 16, 1024, 80),
    "8x512x128": Shape(1, 8, 512, 128),
    "8x1024x128": Shape(1, 8, 1024, 128),
    "8x2048x128": Shape(1, 8, 2048, 128),
    "8x4096x128": Shape(1, 8, 4096, 128),
    "4x4096x256": Shape(1, 4, 4096, 256),
    # decoders
    "causal-12x512x64": Shape(1, 12, 512, 64, is_causal=True),
    "gpt2-causal-1024": Shape(1, 12, 1024, 64, is_causal=True),
    "causal-16x2048x64": Shape(1, 16, 2048, 64, is_causal=True),
    "causal-16x4096x64": Shape(1, 16, 4096, 64, is_causal=True),
    "causal-8x4096x128": Shape(1, 8, 4096, 128, is_causal=True),
}


# 1 to 16 new tokens against a cache, with 32 query heads over 8 key heads of size 128, and over 32.
# Batches are limited by memory: most peers hold the keys and values at once.
DECODE = {
    f"decode-{batch}x{kv_len}-q{q_len}": Shape(batch, 32, q_len, 128, False, kv_len, 8)
    for batch in (1, 8, 64)
    for kv_len in (128, 512, 2048, 8192, 32768)
    if batch * kv_len <= 1 << 17
    for q_len in (1, 2, 4, 8, 16)
} | {f"decode-mha-1x{n}-q1": Shape(1, 32, 1, 128, False, n, 32) for n in (512, 2048, 8192, 32768)}
TOKENS = {name: shape for name, shape in DECODE.items() if shape.q_len == 1}
GROUPS = {"prefill": SHAPES, "decode": DECODE, "tokens": TOKENS}
FORM = "batch,heads,length,head_dim[,causal]"


def named(texts: list[str]) -> dict[str, Shape]:
    """Return the shapes of groups, names and numbers, by their names."""
    shapes: dict[str, Shape] = {}
    for text in texts:
        shapes |= GROUPS.get(text) or {text: parse(text)}
    return shapes


def listing() -> str:
    """Return a table of all names with their sizes, group by group."""
    width = max(len(name) for group in GROUPS.values() for name in group)
    columns = ("batch", "num_heads", "num_kv_heads", "q_len", "kv_len", "head_dim")
    blocks = []
    for group, shapes in GROUPS.items():
        lines = [f"{group:<{width}}" + "".join(f"  {column}" for column in columns)]
        for name, shape in shapes.items():
            kv_heads = shape.num_kv_heads or shape.num_heads
            sizes = (shape.batch, shape.num_heads, kv_heads, shape.q_len, shape.keys)
            cells = zip(columns, (*sizes, shape.head_dim), strict=True)
            line = f"{name:<{width}}" + "".join(f"  {n:>{len(column)}}" for column, n in cells)
            lines.append(line + ("  causal" if shape.is_causal else ""))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def parse(text: str) -> Shape:
    """Return the shape of a name, or of ``batch,heads,length,head_dim[,causal]``.

    >>> parse("1,12,512,64,causal")
    Shape(batch=1, num_heads=12, q_len=512, head_dim=64, is_causal=True, kv_len=0, num_kv_heads=0)
    """
    for group in GROUPS.values():
        if text in group:
            return group[text]
    parts = text.split(",")
    causal = parts[-1] == "causal"
    try:
        batch, num_heads, length, head_dim = map(int, parts[: len(parts) - causal])
    except ValueError:
        near = get_close_matches(text.lower(), [*GROUPS, *SHAPES, *DECODE], cutoff=0.5)
        raise ValueError(
            f"shape is {text!r}: it must be {FORM}, a group ({', '.join(GROUPS)}) or a name"
            + (f" (nearest: {', '.join(near)})" if near else "")
            + "; python -m qkv_fast bench --list prints all names"
        ) from None
    if min(batch, num_heads, length, head_dim) < 1:
        raise ValueError(f"shape is {text!r}: every size must be at least 1")
    return Shape(batch, num_heads, length, head_dim, causal)
