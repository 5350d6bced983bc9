"""Time calls with masks and score modifiers, to compare with a plain call of the same shape.

`python benches/bench_features.py` prints tables instead: the time of calls with key_ranges, beside
the share of the scores that they leave, and of calls with a bias, each over that of a plain call;
and the time of merge_attention beside that of NumPy. It counts the CPU time of one thread, so that
other load on the machine matters little.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qkv_fast import merge_attention, scaled_dot_product_attention

BATCH, HEADS, LENGTH, HEAD_DIM = 2, 8, 1024, 64
RNG = np.random.default_rng(0)
FULL = (BATCH, HEADS, LENGTH, LENGTH)
SEEN = LENGTH // 2 + 40
PADDING = np.arange(LENGTH) < np.array([LENGTH, SEEN])[:, None, None, None]


def ranges(length: int) -> dict[str, tuple[Any, np.ndarray]]:
    """Return key_ranges: a prefix LM, documents in a row, chunks."""
    token = np.arange(length)
    lengths = np.array([5, 14, 1, 12]) * length // 32
    end = np.cumsum(lengths)
    begin, end = (np.repeat(x, lengths) for x in (end - lengths, end))
    chunk = token // (length // 8) * (length // 8)
    return {
        "prefix LM": (None, np.maximum(token + 1, length // 4)),
        "documents": (begin, end),
        "causal documents": (begin, token + 1),
        "causal chunks": (chunk, token + 1),
    }


FEATURES = {
    "none": lambda: {},
    "boolean mask": lambda: {"attn_mask": RNG.random(FULL) > 0.3},
    "additive mask": lambda: {"attn_mask": RNG.standard_normal(FULL, np.float32)},
    "additive mask, all heads": lambda: {"attn_mask": RNG.standard_normal(FULL[2:], np.float32)},
    "padding mask": lambda: {"attn_mask": np.arange(LENGTH)[None, None, None] < SEEN},
    "bias": lambda: {"attn_bias": RNG.standard_normal(FULL[1:], np.float32)},
    "bias, padding mask": lambda: {
        "attn_bias": RNG.standard_normal(FULL[1:], np.float32),
        "attn_mask": PADDING,
    },
    "key_lengths": lambda: {"key_lengths": SEEN},
    "causal": lambda: {"is_causal": True},
    "window": lambda: {"window": (255, 0)},
    "prefix LM": lambda: {"key_ranges": ranges(LENGTH)["prefix LM"]},
    "documents": lambda: {"key_ranges": ranges(LENGTH)["documents"]},
    "causal chunks": lambda: {"key_ranges": ranges(LENGTH)["causal chunks"]},
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


# --- Merging --------------------------------------------------------------------------------------

MERGED = {
    "1,32,1,128": (1, 32, 1, 128),  # a token
    "1,12,128,64": (1, 12, 128, 64),
    "1,12,4096,64": (1, 12, 4096, 64),
    "1,32,4096,128": (1, 32, 4096, 128),
}


def in_numpy(outputs: list[np.ndarray], lses: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Merge as merge_attention does, by the formula."""
    m = np.maximum.reduce(lses)
    weights = [np.exp(lse - m) for lse in lses]
    total = sum(weights)
    acc = sum(w[..., np.newaxis] * x for w, x in zip(weights, outputs, strict=True))
    return acc / total[..., np.newaxis], m + np.log(total)


def parts(shape: tuple[int, ...], count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    outputs = RNG.standard_normal((count, *shape), np.float32)
    return list(outputs), list(RNG.standard_normal((count, *shape[:-1]), np.float32))


@pytest.mark.benchmark(group="merging")
@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("how", ["numpy", "native", "in place"])
def bench_merge(benchmark, name, how):
    outputs, lses = parts(MERGED[name], 2)
    if how == "numpy":
        benchmark(in_numpy, outputs, lses)
    elif how == "native":
        benchmark(merge_attention, outputs, lses)
    else:
        benchmark(merge_attention, outputs, lses, out=outputs[0], lse_out=lses[0])


# --- Ratios ---------------------------------------------------------------------------------------


def cpu_seconds(call: Callable[[], Any]) -> float:
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


def ratio(call: Callable[[], Any], plain: Callable[[], Any], rounds: int = 15) -> float:
    """Return the median over rounds of the time of a call over that of a plain one."""
    call(), plain()
    return statistics.median(cpu_seconds(call) / cpu_seconds(plain) for _ in range(rounds))


def main() -> None:
    """Print the table."""

    def attend(shape: tuple[int, ...], **options: Any) -> Callable[[], Any]:
        q, k, v = RNG.standard_normal((3, *shape), np.float32)
        out = np.empty_like(q)
        return lambda: scaled_dot_product_attention(q, k, v, out=out, num_threads=1, **options)

    shape = 1, 12, 2048, 64
    print("| 12x2048x64 | share of the scores | time over that of all |\n|---|---|---|")
    for name, (begin, end) in {"causal": (None, np.arange(2048) + 1), **ranges(2048)}.items():
        options = {"is_causal": True} if name == "causal" else {"key_ranges": (begin, end)}
        share = float((end - (0 if begin is None else begin)).mean()) / 2048
        print(f"| {name} | {share:.3f} | {ratio(attend(shape, **options), attend(shape)):.3f} |")
    shape = 2, 12, 512, 64
    bias = RNG.standard_normal((1, 12, 512, 512), np.float32)
    padding = np.ones((2, 1, 1, 512), bool)
    padding[:, :, :, 100] = False  # not at the end, which would shorten the sequences
    print("\n| 2x12x512x64 | time over that without |\n|---|---|")
    for name, options in {
        "bias (1, 12, 512, 512)": {"attn_bias": bias},
        "the same and a boolean mask (2, 1, 1, 512)": {"attn_bias": bias, "attn_mask": padding},
        "the boolean mask alone": {"attn_mask": padding},
        "the bias as a floating mask": {"attn_mask": bias},
    }.items():
        print(f"| {name} | {ratio(attend(shape, **options), attend(shape)):.3f} |")
    print_merging()


def print_merging() -> None:
    """Print the times of merge_attention on one thread, and NumPy's over them."""
    print("\n| merging, float32 | parts | us | GB/s | NumPy over it | over it in place |")
    print("|---|---|---|---|---|---|")
    for name, shape in MERGED.items():
        for count in (2, 8):
            outputs, lses = parts(shape, count)
            out, lse = np.empty_like(outputs[0]), np.empty_like(lses[0])

            def new(outputs=outputs, lses=lses, out=out, lse=lse):
                merge_attention(outputs, lses, out=out, lse_out=lse, num_threads=1)

            def in_place(outputs=outputs, lses=lses):
                lse = lses[0]
                merge_attention(outputs, lses, out=outputs[0], lse_out=lse, num_threads=1)

            def plain(outputs=outputs, lses=lses):
                in_numpy(outputs, lses)

            seconds = statistics.median(cpu_seconds(new) for _ in range(15))
            rate = (count + 1) * outputs[0].nbytes / seconds / 1e9
            ratios = f"{ratio(plain, new):.1f} | {ratio(plain, in_place):.1f}"
            print(f"| {name} | {count} | {1e6 * seconds:.0f} | {rate:.1f} | {ratios} |")


if __name__ == "__main__":
    main()
