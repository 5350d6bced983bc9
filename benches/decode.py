"""Time decoding: against the read bandwidth, latent, over numbers of queries, packed, and in pages.

``python benches/decode.py`` runs all variants in one process and prints medians over rounds:

- bandwidth: one new token of long sequences, as a share of the speed of a plain read of the same
  keys and values. The caches are emptied before each; a higher share is better.
- latent: one new token of a model with latent attention, values being the first 512 elements of
  their keys: the time, and the share of the speed of a plain read of the keys alone.
- queries: the largest rise in time for a query, from 1 to 64 queries. ``--plot FILE.svg`` draws
  the time, ``--json FILE`` writes it.
- packed: the time of packed sequences of very uneven lengths, relative to the same sequences one by
  one, and the busy time of the least busy thread, relative to that of the busiest.
- paged: the time with keys and values in pages, in order or scattered, relative to one piece.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import qkv_fast
from qkv_fast.bench.probes import bfloat16_bits, busy_seconds, quantize, read_once

KINDS = ("float32", "float16", "bfloat16", "int8")
# batch, query heads, key heads, keys of size 128
LONG = [(1, 32, 8, 32768), (8, 32, 8, 4096), (1, 32, 32, 32768)]
UNEVEN = [8192, *[16] * 255]
BEYOND_CACHES = 512 << 20
Run = Callable[[], Any]


def tensor(rng: np.random.Generator, kind: str, *shape: int) -> np.ndarray:
    """Return standard normal numbers; bfloat16 as bit patterns."""
    x = rng.standard_normal(shape, np.float32)
    return bfloat16_bits(x) if kind == "bfloat16" else x.astype(kind)


def in_turns(runs: dict[str, Run], rounds: int, before: Run | None = None) -> dict[str, float]:
    """Return the median seconds of each, taken one after the other in every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for i in range(rounds):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            if before is not None:
                before()
            begin = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(some) for name, some in times.items()}


def bandwidth(rounds: int) -> None:
    """Print each long shape's share of the speed of a plain read."""
    threads = qkv_fast.get_num_threads()
    other = np.zeros(BEYOND_CACHES, np.uint8)
    other.fill(1)
    title = "batch, heads, KV heads, keys"
    print(f"{title:<30}{'':<10}{'ms':>8}{'GB/s':>7}{'read':>7}{'share':>7}")
    rng = np.random.default_rng(0)
    for (batch, heads, kv_heads, keys), kind in itertools.product(LONG, KINDS):
        stored = "float32" if kind == "int8" else kind
        q = tensor(rng, stored, batch, heads, 1, 128)
        cache = qkv_fast.KVCache(batch, kv_heads, keys, 128, dtype=kind)
        cache.extend(keys)
        arrays = [(cache.key_pages, cache.key_scales), (cache.value_pages, cache.value_scales)]
        for rows, scales in arrays:
            x = tensor(rng, stored, batch, kv_heads, keys, 128)
            if scales is None:
                rows[...] = x
            else:
                rows[...], scales[...] = quantize(x)
        everything = [x for pair in arrays for x in pair if x is not None]
        seconds = in_turns(
            {
                "attend": lambda cache=cache, q=q: cache.attend(q),
                "read": lambda some=everything: read_once(some, threads),
            },
            rounds,
            lambda: read_once([other], threads),
        )
        size = sum(x.nbytes for x in everything) / 1e9
        shape = str((batch, heads, kv_heads, keys))
        print(
            f"{shape:<30}{kind:<10}{seconds['attend'] * 1e3:8.2f}{size / seconds['attend']:7.1f}"
            f"{size / seconds['read']:7.1f}{seconds['read'] / seconds['attend']:7.2f}",
            flush=True,
        )


def latent(rounds: int, keys: int = 32768) -> None:
    """Print the time of latent attention, its speed, and its share of that of a plain read."""
    threads = qkv_fast.get_num_threads()
    other = np.ones(BEYOND_CACHES, np.uint8)
    print(f"{'latent, heads':<20}{'':<10}{'ms':>8}{'GFLOP/s':>9}{'share':>7}")
    rng = np.random.default_rng(0)
    for kind, heads in itertools.product(("float32", "bfloat16", "float16"), (16, 32, 64, 128)):
        q, k = tensor(rng, kind, 1, heads, 1, 576), tensor(rng, kind, 1, 1, keys, 576)
        dtype = kind if kind == "bfloat16" else None
        seconds = in_turns(
            {
                "attend": lambda q=q, k=k, dtype=dtype: qkv_fast.scaled_dot_product_attention(
                    q, k, k[..., :512], enable_gqa=True, dtype=dtype
                ),
                "read": lambda k=k: read_once([k], threads),
            },
            rounds,
            lambda: read_once([other], threads),
        )
        speed = 2e-9 * heads * (576 + 512) * keys / seconds["attend"]
        print(
            f"{heads:<20}{kind:<10}{seconds['attend'] * 1e3:8.2f}{speed:9.0f}"
            f"{seconds['read'] / seconds['attend']:7.2f}",
            flush=True,
        )


def over_queries(rounds: int, keys: int = 4096) -> dict[str, list[float]]:
    """Print the largest step in time for a query, and return the seconds of 1 to 64 queries."""
    rng = np.random.default_rng(0)
    curves: dict[str, list[float]] = {}
    sdpa = qkv_fast.scaled_dot_product_attention
    for kind in ("float32", "bfloat16"):
        k, v = (tensor(rng, kind, 1, 8, keys, 128) for _ in range(2))
        dtype = kind if kind == "bfloat16" else None
        runs: dict[str, Run] = {}
        for n in range(1, 65):
            q = tensor(rng, kind, 1, 32, n, 128)
            runs[str(n)] = lambda q=q, k=k, v=v, dtype=dtype: sdpa(
                q, k, v, enable_gqa=True, dtype=dtype
            )
        curves[kind] = list(in_turns(runs, rounds).values())
        each = [t / n for n, t in enumerate(curves[kind], 1)]
        steps = [after / before for before, after in itertools.pairwise(each)]
        n = int(np.argmax(steps)) + 1
        print(
            f"{kind}: 1 to 64 queries, {keys} keys: a query's cost rises at most "
            f"{max(steps):.2f}-fold, from {n} to {n + 1} queries"
        )
    return curves


def packed(rounds: int) -> None:
    """Print packed uneven sequences against each alone, and how evenly the threads work."""
    rng = np.random.default_rng(0)
    starts = np.concatenate([[0], np.cumsum(UNEVEN)])
    q, k, v = (tensor(rng, "float32", starts[-1], 8, 64) for _ in range(3))
    parts = [tuple(x[a:b].swapaxes(0, 1) for x in (q, k, v)) for a, b in itertools.pairwise(starts)]
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
    threads = qkv_fast.get_num_threads()
    shares = []
    for _ in range(rounds):
        _, busy = busy_seconds(q, k, v, starts, threads)
        shares.append(busy.min() / busy.max())
    print(f"least busy thread: {statistics.median(shares):.3f} of the busiest one's time")


def paged(rounds: int) -> None:
    """Print the time in pages against that in one piece."""
    rng = np.random.default_rng(0)
    batch, keys, sizes = 8, 4096, (16, 32, 64, 128, 256)
    for kind, order in itertools.product(("float32", "bfloat16"), ("in order", "scattered")):
        q = tensor(rng, kind, batch, 32, 1, 128)
        k, v = (tensor(rng, kind, batch, 8, keys, 128) for _ in range(2))
        runs: dict[str, Run] = {}
        for size in (keys, *sizes):
            count = batch * keys // size
            table = rng.permutation(count) if order == "scattered" else np.arange(count)
            table = table.reshape(batch, -1)
            pages = [np.empty((table.size, 8, size, 128), x.dtype) for x in (k, v)]
            for page, x in zip(pages, (k, v), strict=True):
                page[table] = x.reshape(batch, 8, -1, size, 128).swapaxes(1, 2)
            runs[str(size)] = lambda q=q, p=pages, t=table: qkv_fast.paged_attention(
                q, *p, t, keys, dtype="bfloat16"
            )
        if order == "in order":
            rows = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v)]
            runs["rows"] = lambda q=q, rows=rows: qkv_fast.paged_attention(
                q, *rows, np.arange(batch)[:, None], keys, dtype="bfloat16"
            )
        seconds = in_turns(runs, rounds)
        ratios = ", ".join(f"{size}: {seconds[size] / seconds[str(keys)]:.2f}"
                           for size in map(str, sizes))  # fmt: skip
        print(f"{kind}, pages {order}, of {ratios} of the time in one piece")
        if order == "in order":
            print(f"{kind}, (batch, keys, heads, size): {seconds['rows'] / seconds[str(keys)]:.2f}")


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
    parts = ("bandwidth", "latent", "queries", "packed", "paged")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plot", metavar="FILE", help="SVG of the time over the queries")
    parser.add_argument("--json", metavar="FILE", help="the same as numbers")
    options = parser.parse_args(arguments)
    if "bandwidth" in options.only:
        bandwidth(options.rounds)
    if "latent" in options.only:
        latent(options.rounds)
    if "queries" in options.only:
        curves = over_queries(options.rounds)
        if options.plot:
            draw(curves, options.plot)
        if options.json:
            Path(options.json).write_text(json.dumps(curves), encoding="utf-8")
    if "packed" in options.only:
        packed(options.rounds)
    if "paged" in options.only:
        paged(options.rounds)


if __name__ == "__main__":
    main()
