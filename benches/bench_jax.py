"""Time integrations.jax: a call with hardly any work, and shapes beside jax.nn.

``python benches/bench_jax.py`` prints the second: milliseconds of a call, jitted, float32 and
bfloat16, and the ratio of jax.nn's time to ours, of which higher is better. Each library runs in a
process of its own, and in each round one after the other; a figure is the median over rounds of the
median within a round.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

import qkv_fast

SHAPES: dict[str, tuple[tuple[int, ...], bool]] = {  # (B, T, S, N, K, H), causal
    "8x12x128x64": ((8, 128, 128, 12, 12, 64), False),
    "1x12x512x64": ((1, 512, 512, 12, 12, 64), False),
    "1x12x2048x64 causal": ((1, 2048, 2048, 12, 12, 64), True),
    "1x32x1024x128 of 8, causal": ((1, 1024, 1024, 32, 8, 128), True),
    "1 token, 32 heads of 8, 4096 keys": ((1, 1, 4096, 32, 8, 128), False),
}
PEERS = ("jax.nn", "qkv_fast")


def call_of(peer: str, name: str, dtype: str) -> Callable[[], Any]:
    """Return a jitted call that ends when its result is there."""
    import jax

    from qkv_fast.integrations.jax import dot_product_attention

    (b, t, s, n, k, h), causal = SHAPES[name]
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = (b, t, n, h), (b, s, k, h), (b, s, k, h)
    arrays = [jax.random.normal(x, size, dtype) for x, size in zip(keys, sizes, strict=True)]
    attend = dot_product_attention if peer == "qkv_fast" else jax.nn.dot_product_attention
    jitted = jax.jit(lambda q, k, v: attend(q, k, v, is_causal=causal))
    return lambda: jitted(*arrays).block_until_ready()


def serve(peer: str, pipe: Connection) -> None:
    """Be the process of a library: time what the pipe names, until it names nothing."""
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    while (given := pipe.recv()) is not None:
        *what, seconds = given
        key = tuple(what)
        if key not in calls:
            calls.clear()
            calls[key] = call_of(peer, *key)
            calls[key]()
        times = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            begin = time.perf_counter()
            calls[key]()
            times.append(time.perf_counter() - begin)
        pipe.send(statistics.median(times))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=float, default=0.15, help="seconds of a library in a round")
    options = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    pipes = {}
    for peer in PEERS:
        pipes[peer], theirs = context.Pipe()
        context.Process(target=serve, args=(peer, theirs), daemon=True).start()
    print(f"{'shape':<36}{'dtype':<10}" + "".join(f"{peer:>12}" for peer in PEERS) + "     ratio")
    for dtype in ("float32", "bfloat16"):
        for name in SHAPES:
            medians: dict[str, list[float]] = {peer: [] for peer in PEERS}
            for i in range(options.rounds):
                for peer in PEERS[:: 1 if i % 2 else -1]:
                    pipes[peer].send((name, dtype, options.turn))
                    medians[peer].append(pipes[peer].recv())
            theirs, ours = (statistics.median(medians[peer]) for peer in PEERS)
            print(f"{name:<36}{dtype:<10}{theirs * 1e3:>12.2f}{ours * 1e3:>12.2f}"
                  f"{theirs / ours:>10.2f}", flush=True)  # fmt: skip
    for pipe in pipes.values():
        pipe.send(None)


# --- A call with hardly any work ----------------------------------------------------------------

CALLS = ["jax.nn, jit", "jit", "jit, pure_callback", "eager", "op, arrays"]


@pytest.mark.benchmark(group="jax overhead")
@pytest.mark.parametrize("call", CALLS)
def bench_call(benchmark, call, monkeypatch):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    from qkv_fast.integrations import jax as adapter

    x = jax.numpy.ones((1, 1, 1, 64))
    if call.endswith("pure_callback"):
        monkeypatch.setattr(adapter, "_chosen", adapter._by_callback)
    ours: Callable[..., Any] = adapter.scaled_dot_product_attention
    function = {
        "jax.nn, jit": jax.jit(jax.nn.dot_product_attention),
        "eager": ours,
        "op, arrays": qkv_fast.scaled_dot_product_attention,
    }.get(call) or jax.jit(lambda q, k, v: ours(q, k, v))
    if call == "op, arrays":
        x = np.asarray(x)
        benchmark(function, x, x, x)
    else:
        benchmark(lambda: function(x, x, x).block_until_ready())


if __name__ == "__main__":
    main()
