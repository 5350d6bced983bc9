"""Time calls beside other load: excess threads, other processes, other libraries' threads.

``python benches/bench_company.py [SCENE ...]`` prints a table for each scene:

threads
    Milliseconds of a call with 1 to 256 threads, and the ratio to one thread for each CPU.
busy
    The same while another process keeps one CPU busy. A fair scheduler then gives n threads on n
    CPUs n * n / (n + 1) times the speed of one thread.
processes
    Calls a second of 1, 2 and 4 processes together, and the ratio to one process; the same for
    torch and ONNX Runtime.
after
    Microseconds of a call right after other work of the same thread, and the ratio to a call after
    another call. "sweep" reads 32 MB on the calling thread alone, so its ratio shows the cost of
    emptied caches.
small
    Microseconds of calls with little work, and of torch's on the same tensors.

A figure is a median over rounds; each round runs all variants of a row one after another. Lower is
better, except in "processes". Libraries that are not installed are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

import qkv_fast
from qkv_fast.bench.peers import PREPARE, tensors_of, version
from qkv_fast.bench.shapes import Shape

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
Run = Callable[[], Any]
sdpa = qkv_fast.scaled_dot_product_attention
PREFILL = Shape(8, 12, 128, 64)
BERT = Shape(1, 12, 512, 64)


def decode(heads: int, kv_heads: int, keys: int, size: int) -> Shape:
    """Return the shape of a new token."""
    return Shape(1, heads, 1, size, kv_len=keys, num_kv_heads=kv_heads)


def call(shape: Shape, **options: Any) -> Run:
    """Return a call in float32 into the same `out` each time."""
    q, k, v = shape.tensors()
    out = np.empty_like(q)
    return lambda: sdpa(q, k, v, enable_gqa=True, out=out, **options)


def in_turns(runs: dict[str, Run], rounds: int, each: int) -> dict[str, float]:
    """Return the median seconds of each: in every round, `each` calls of one after the other."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in list(runs)[:: 1 if i % 2 else -1]:
            for _ in range(each):
                begin = time.perf_counter()
                runs[name]()
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(some) for name, some in times.items()}


def print_row(label: str, cells: dict[str, str]) -> None:
    """Print a row of name and figure pairs."""
    print(f"{label:<24}" + "".join(f"{f'{k} {v}':>26}" for k, v in cells.items()), flush=True)


# --- More threads than CPUs -----------------------------------------------------------------------


def threads(rounds: int) -> None:
    """A call over its number of threads."""
    for label, shape in (
        ("8x12x128x64", PREFILL),
        ("1 token, 8192 keys", decode(32, 8, 8192, 128)),
    ):
        counts = [1, CPUS, *(n for n in (4, 16, 64, 256) if n > CPUS)]
        runs = {str(n): call(shape, num_threads=n) for n in counts}
        seconds = in_turns(runs, rounds, 8)
        base = seconds[str(CPUS)]
        print_row(label, {n: f"{s * 1e3:.2f} ms {s / base:4.2f}" for n, s in seconds.items()})


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Keep a CPU busy in another process."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def busy(rounds: int) -> None:
    """The same beside a process that keeps a CPU busy."""
    with busy_process():
        threads(3 * rounds)
    print(
        f"a fair share of {CPUS} CPUs gives {CPUS * CPUS / (CPUS + 1):.2f} x the speed of 1 thread"
    )


# --- Several processes ----------------------------------------------------------------------------


def count_calls(peer: str, seconds: float, pipe: Connection) -> None:
    """Be one of the processes: send how many calls it made."""
    run, _ = PREPARE[peer](PREFILL, tensors_of(PREFILL, "float32"), "float32", CPUS)
    for _ in range(5):
        run()
    pipe.send("ready")
    pipe.recv()
    calls, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        run()
        calls += 1
    pipe.send(calls / seconds)


def together(peer: str, count: int, seconds: float) -> float:
    """Return the calls a second of so many processes."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    for _ in range(count):
        ours, theirs = context.Pipe()
        context.Process(target=count_calls, args=(peer, seconds, theirs), daemon=True).start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send("go")
    return float(sum(pipe.recv() for pipe in pipes))


def processes(rounds: int) -> None:
    """Calls a second of 1, 2 and 4 processes, with a thread for each CPU in each."""
    for peer in (name for name in ("qkv_fast", "torch", "onnxruntime") if version(name)):
        counts: dict[int, list[float]] = {1: [], 2: [], 4: []}
        for _ in range(rounds):
            for count, speeds in counts.items():
                speeds.append(together(peer, count, 1.0))
        medians = {n: statistics.median(speeds) for n, speeds in counts.items()}
        print_row(peer, {str(n): f"{m:.0f}/s {m / medians[1]:4.2f}" for n, m in medians.items()})


# --- After other work -----------------------------------------------------------------------------


def other_work() -> dict[str, Run | None]:
    """Return what may run before a call in the same thread."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 256, 256), np.float32)
    c, large = np.empty_like(a), np.zeros(8 << 20, np.float32)
    work: dict[str, Run | None] = {"itself": None, "sweep": large.sum}
    work["256² product"] = lambda: np.matmul(a, b, out=c)
    if version("torch"):
        import torch

        torch.set_num_threads(CPUS)
        x, rows, weight = torch.randn(4_000_000), torch.randn(64, 512), torch.randn(512, 512)
        work["torch.exp"] = lambda: torch.exp(x)
        work["linear"] = lambda: torch.nn.functional.linear(rows, weight)
    return work


def after(rounds: int) -> None:
    """A call after other work of the same thread, against after itself."""
    work = other_work()
    shapes = {
        "12x512x512x64": BERT,
        "1 token, 4096 keys": decode(32, 8, 4096, 128),
        "1 token, 32768 keys": decode(32, 8, 32768, 128),
        "9/3 heads, 512 keys": decode(9, 3, 512, 64),
    }
    for label, shape in shapes.items():
        run = call(shape)
        times: dict[str, list[float]] = {name: [] for name in work}
        for i in range(rounds):
            for name in list(work)[:: 1 if i % 2 else -1]:
                time.sleep(0.05)  # until the threads of the work before sleep
                before, begin = work[name], time.perf_counter()
                some: list[float] = []
                while time.perf_counter() - begin < 0.4:
                    if before is not None:
                        before()
                    start = time.perf_counter()
                    run()
                    some.append(time.perf_counter() - start)
                times[name].append(statistics.median(some))
        seconds = {name: statistics.median(some) for name, some in times.items()}
        base = seconds["itself"]
        print_row(label, {n: f"{s * 1e6:.0f} us {s / base:4.2f}" for n, s in seconds.items()})


# --- Small calls ----------------------------------------------------------------------------------


def small(rounds: int) -> None:
    """Calls of microseconds, alone and after a linear layer."""
    shapes = {
        "1,1,1,64": Shape(1, 1, 1, 64),
        "9/3 heads, 32 keys": decode(9, 3, 32, 64),
        "9/3 heads, 512 keys": decode(9, 3, 512, 64),
    }
    for label, shape in shapes.items():
        q, k, v = shape.tensors()
        mask = np.ones((1, 1, 1, k.shape[-2]), bool)
        gqa = q.shape[1] != k.shape[1]
        runs: dict[str, Run] = {
            "qkv_fast": lambda q=q, k=k, v=v, gqa=gqa: sdpa(q, k, v, enable_gqa=gqa),
            "with a mask": lambda q=q, k=k, v=v, gqa=gqa, m=mask: sdpa(q, k, v, m, enable_gqa=gqa),
        }
        if version("torch"):
            import torch

            torch.set_num_threads(CPUS)
            tensors = [torch.from_numpy(x) for x in (q, k, v)]
            theirs = torch.nn.functional.scaled_dot_product_attention
            runs["torch"] = lambda f=theirs, t=tensors, gqa=gqa: f(*t, enable_gqa=gqa)
            runs["qkv_fast, tensors"] = lambda t=tensors, gqa=gqa: sdpa(*t, enable_gqa=gqa)
            x, weight = torch.randn(1, 576), torch.randn(576, 576)

            def layer(attend: Run, x: Any = x, weight: Any = weight) -> None:
                torch.nn.functional.linear(x, weight)
                attend()

            runs["linear, qkv_fast"] = lambda a=runs["qkv_fast"]: layer(a)
            runs["linear, torch"] = lambda a=runs["torch"]: layer(a)
        with torch.inference_mode() if version("torch") else contextlib.nullcontext():
            seconds = in_turns(runs, 3 * rounds, 300)
        print(label)
        for name, median in seconds.items():
            print(f"    {name:<20}{median * 1e6:8.1f} us")


# --- A decoder in torch ---------------------------------------------------------------------------


def decoder(rounds: int, layers: int = 30, keys: int = 512) -> None:
    """A new token through layers as SmolLM2's, in torch, with torch's attention and with this."""
    if not version("torch"):
        print("torch is not installed")
        return
    import torch

    torch.set_num_threads(CPUS)
    sizes = {"qkv": (960, 576), "o": (576, 576), "up": (3072, 576), "down": (576, 1536)}
    weights = [{n: torch.randn(s) * 0.02 for n, s in sizes.items()} for _ in range(layers)]
    caches = [torch.randn(2, 1, 3, keys, 64) for _ in range(layers)]
    linear, theirs = torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention

    def token(attend: Callable[..., Any]) -> None:
        x = torch.ones(1, 576)
        for weight, (k, v) in zip(weights, caches, strict=True):
            q = linear(x, weight["qkv"])[:, :576].view(1, 9, 1, 64)
            x = x + linear(attend(q, k, v).reshape(1, 576), weight["o"])
            gate, up = linear(x, weight["up"]).chunk(2, dim=-1)
            x = x + linear(torch.nn.functional.silu(gate) * up, weight["down"])

    attends: dict[str, Callable[..., Any]] = {
        "no attention": lambda q, k, v: q,
        "torch": lambda q, k, v: theirs(q, k, v, enable_gqa=True),
        "qkv_fast": lambda q, k, v: torch.from_numpy(sdpa(q, k, v, enable_gqa=True)),
    }
    with torch.inference_mode():
        runs: dict[str, Run] = {n: lambda a=attend: token(a) for n, attend in attends.items()}
        seconds = in_turns(runs, 2 * rounds, 10)
    for name, median in seconds.items():
        print(f"    {name:<14}{median * 1e3:7.2f} ms a token, attention "
              f"{(median - seconds['no attention']) / layers * 1e6:6.1f} us a layer")  # fmt: skip


SCENES = {f.__name__: f for f in (threads, busy, processes, after, small, decoder)}


def main() -> None:
    """Run the scenes that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("scenes", nargs="*", choices=[[], *SCENES], metavar="SCENE")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for name in options.scenes or SCENES:
        print(f"\n{name}: {(SCENES[name].__doc__ or '').splitlines()[0]}")
        SCENES[name](options.rounds)


if __name__ == "__main__":
    main()
