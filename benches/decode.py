"""Decoding: how much of the memory's speed it reaches, and that nothing beside it is slow.

``python benches/decode.py`` prints, in turns within one process and medians of rounds:

- the share of the read bandwidth, measured between the rounds, that a new token of long sequences reaches;
- the time over 1 to 64 queries (``--plot FILE.svg`` draws it, ``--json FILE`` keeps it);
- packed sequences of very uneven lengths against the same ones one by one, and the threads' busy times;
- pages against one piece.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import qkv_fast
from qkv_fast import _backend, _problem
from qkv_fast._reference import bfloat16_bits
from qkv_fast.bench.compare import limits
from qkv_fast.cache import quantize

KINDS = ("float32", "float16", "bfloat16", "int8")
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
# batch, query heads, key heads, keys of size 128
LONG = [(1, 32, 8, 32768), (8, 32, 8, 4096), (1, 32, 32, 32768)]
UNEVEN = [8192, *[16] * 255]
Run = Callable[[], Any]


def tensor(rng: np.random.Generator, kind: str, *shape: int) -> np.ndarray:
    """Return standard normal numbers; bfloat16 as bit patterns."""
    x = rng.standard_normal(shape, np.float32)
    return bfloat16_bits(x) if kind == "bfloat16" else x.astype(kind)


def in_turns(runs: dict[str, Run], rounds: int, between: Run | None = None) -> dict[str, float]:
    """Return the median seconds of each, taken one after the other in every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for i in range(rounds):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            begin = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - begin)
        if between is not None:
            between()
    return {name: statistics.median(some) for name, some in times.items()}


def token(kind: str, batch: int, heads: int, kv_heads: int, keys: int) -> Run:
    """Return a call with one new token for each sequence, by KVCache for int8."""
    rng = np.random.default_rng(0)
    stored = "float32" if kind == "int8" else kind
    q = tensor(rng, stored, batch, heads, 1, 128)
    k, v = (tensor(rng, stored, batch, kv_heads, keys, 128) for _ in range(2))
    if kind == "int8":
        (k, ks), (v, vs) = quantize(k), quantize(v)
        cache = qkv_fast.KVCache.from_arrays(k, v, keys, key_scales=ks, value_scales=vs)
        return lambda: cache.attend(q)
    dtype = "bfloat16" if kind == "bfloat16" else None
    sdpa = qkv_fast.scaled_dot_product_attention
    return lambda: sdpa(q, k, v, enable_gqa=True, dtype=dtype)


def bandwidth(rounds: int) -> None:
    """Print each long shape's share of the read bandwidth."""
    threads = qkv_fast.get_num_threads()
    print(
        f"{'batch, heads, KV heads, keys':<30}{'':<10}{'ms':>8}{'GB/s':>7}{'read':>7}{'share':>7}"
    )
    for shape in LONG:
        for kind in KINDS:
            read: list[float] = []
            seconds = in_turns(
                {kind: token(kind, *shape)}, rounds, lambda: read.append(limits("float32", threads)[1])
            )[kind]  # fmt: skip
            size = 2 * shape[0] * shape[2] * shape[3] * (128 * BYTES[kind] + 4 * (kind == "int8"))
            speed, limit = size / seconds / 1e9, statistics.median(read)
            print(f"{shape!s:<30}{kind:<10}{seconds * 1e3:8.2f}{speed:7.1f}{limit:7.1f}"
                  f"{speed / limit:7.2f}", flush=True)  # fmt: skip


def over_queries(rounds: int, keys: int = 4096) -> dict[str, list[float]]:
    """Print the largest step in time for a query, and return the seconds of 1 to 64 queries."""
    rng = np.random.default_rng(0)
    curves: dict[str, list[float]] = {}
    for kind in ("float32", "bfloat16"):
        k, v = (tensor(rng, kind, 1, 8, keys, 128) for _ in range(2))
        queries = {str(n): tensor(rng, kind, 1, 32, n, 128) for n in range(1, 65)}
        dtype = kind if kind == "bfloat16" else None
        seconds = in_turns(
            {n: lambda q=q, k=k, v=v, dtype=dtype: qkv_fast.scaled_dot_product_attention(
                q, k, v, enable_gqa=True, dtype=dtype) for n, q in queries.items()}, rounds
        )  # fmt: skip
        curves[kind] = list(seconds.values())
        each = [t / (n + 1) for n, t in enumerate(curves[kind])]
        step, at = max((after / before, n) for n, (before, after) in
                       enumerate(zip(each, each[1:], strict=False), 1))  # fmt: skip
        print(f"{kind}: 1 to 64 queries, {keys} keys: a query's cost rises at most {step:.2f}-fold, "
              f"from {at} to {at + 1} queries")  # fmt: skip
    return curves


def packed(rounds: int) -> None:
    """Print packed uneven sequences against each alone, and how evenly the threads work."""
    rng = np.random.default_rng(0)
    starts = np.concatenate([[0], np.cumsum(UNEVEN)])
    q, k, v = (tensor(rng, "float32", starts[-1], 8, 64) for _ in range(3))
    parts = [tuple(x[a:b].swapaxes(0, 1) for x in (q, k, v))
             for a, b in zip(starts, starts[1:], strict=False)]  # fmt: skip
    sdpa = qkv_fast.scaled_dot_product_attention
    seconds = in_turns(
        {
            "packed": lambda: qkv_fast.varlen_attention(q, k, v, starts, is_causal=True),
            "alone": lambda: [sdpa(*part, is_causal=True) for part in parts],
        },
        rounds,
    )
    ratio = seconds["packed"] / seconds["alone"]
    print(f"packed, 1 x 8192 with 255 x 16: {ratio:.3f} of the time one by one")
    native, choice = _backend._native_module(), _backend.current()
    threads = qkv_fast.get_num_threads()
    shares = []
    for _ in range(rounds):
        busy = np.zeros(threads)
        problem = _problem.normalize_varlen(
            q, k, v, starts, None, True, None, True, None, None, None, None, None, None, None, False,
            threads, None,
        )  # fmt: skip
        native.run(problem, choice.tiles, choice.isa, _backend.few_share(None, choice, 0), busy)
        shares.append(busy.min() / busy.max())
    print(f"least busy thread: {statistics.median(shares):.3f} of the busiest one's time")


def paged(rounds: int) -> None:
    """Print the time in pages against that in one piece."""
    rng = np.random.default_rng(0)
    batch, keys = 8, 4096
    for kind in ("float32", "bfloat16"):
        q = tensor(rng, kind, batch, 32, 1, 128)
        k, v = (tensor(rng, kind, batch, 8, keys, 128) for _ in range(2))
        runs: dict[str, Run] = {}
        for size in (keys, 16, 32, 64, 128, 256):
            table = rng.permutation(batch * keys // size).reshape(batch, -1)
            pages = [np.empty((table.size, 8, size, 128), x.dtype) for x in (k, v)]
            for page, x in zip(pages, (k, v), strict=True):
                page[table] = x.reshape(batch, 8, -1, size, 128).swapaxes(1, 2)
            runs[str(size)] = lambda q=q, p=pages, t=table: qkv_fast.paged_attention(
                q, *p, t, keys, dtype="bfloat16"
            )
        seconds = in_turns(runs, rounds)
        print(f"{kind}, pages of " + ", ".join(
            f"{size}: {t / seconds[str(keys)]:.2f}" for size, t in seconds.items() if size != str(keys)
        ) + " of the time in one piece")  # fmt: skip


def draw(curves: dict[str, list[float]], file: str) -> None:
    """Draw the time over the number of queries."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "qkv_fast"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    for kind, seconds in curves.items():
        axes.plot(range(1, 65), [1e3 * t for t in seconds], "o-", label=kind, markersize=3)
    axes.set_xlabel("queries (32 query heads over 8 key heads of size 128, 4096 keys)")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=["bandwidth", "queries", "packed", "paged"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plot", metavar="FILE", help="SVG of the time over the queries")
    parser.add_argument("--json", metavar="FILE", help="the same as numbers")
    options = parser.parse_args(arguments)
    only = options.only or ["bandwidth", "queries", "packed", "paged"]
    if "bandwidth" in only:
        bandwidth(options.rounds)
    if "queries" in only:
        curves = over_queries(options.rounds)
        if options.plot:
            draw(curves, options.plot)
        if options.json:
            Path(options.json).write_text(json.dumps(curves), encoding="utf-8")
    if "packed" in only:
        packed(options.rounds)
    if "paged" in only:
        paged(options.rounds)


if __name__ == "__main__":
    main()
