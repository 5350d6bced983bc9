"""Attention on Dask: its time beside the op, workers' memory, equal bits; figures of more nodes.

    python benches/bench_dask.py time       2 processes of 1 thread against the op with 2 threads
    python benches/bench_dask.py bits       1, 2 and 3 workers, threads, the synchronous scheduler
    python benches/bench_dask.py predict    16 and 256 nodes, from parts measured here

131,072 keys, 4,096 queries, 8 heads of size 64, float32; --keys and --queries set others. It needs
dask and distributed, and Linux for the memory.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import qkv_fast

HEADS, SIZE = 8, 64
ROUNDS = 5
NODES, LINKS = (16, 256), (10, 100)  # Gbit/s


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[Any]:
    """Yield a client of so many worker processes of one thread."""
    import dask
    from distributed import Client, LocalCluster

    with (
        dask.config.set({"distributed.scheduler.work-stealing": False}),  # keys stay where they are
        LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address=None, memory_limit=0
        ) as local,
        Client(local) as client,
    ):
        yield client


def draw(seed: int, keys: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((HEADS, keys, SIZE), np.float32)


def arrays(keys: int, queries: int, chunk: int, client: Any = None) -> tuple[np.ndarray, Any, Any]:
    """Return queries in memory, keys and values in chunks, as many on each worker of a client."""
    import dask.array as da
    from dask._task_spec import Task

    count = keys // chunk
    workers = list(client.scheduler_info(n_workers=-1)["workers"]) if client else []

    def chunks(seed: int) -> Any:
        name = f"keys-{seed}-{keys}-{chunk}"
        tasks: dict[Any, Any] = {}
        for i in range(count):
            key = (name, 0, i, 0)
            if client:
                worker = workers[i * len(workers) // count]
                tasks[key] = client.submit(draw, seed + i, chunk, key=str(key), workers=[worker])
            else:
                tasks[key] = Task(key, draw, seed + i, chunk)
        return da.Array(tasks, name, ((HEADS,), (chunk,) * count, (SIZE,)), dtype=np.float32)

    key, value = chunks(0), chunks(count)
    if client:
        from distributed import futures_of, wait

        wait(futures_of([key, value]))
    return draw(2 * count, queries), key, value


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def reset_peak() -> int:
    """Begin to measure the largest memory of this process; return what it has now, in bytes."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines[field].split()[0]) * 1024


def measure(options: argparse.Namespace) -> None:
    import dask

    from qkv_fast.integrations.dask import scaled_dot_product_attention

    with cluster(2) as client:
        query, key, value = arrays(options.keys, options.queries, options.chunk, client)
        k, v = dask.compute(key, value)
        result = scaled_dot_product_attention(query, key, value)
        answers: dict[str, Any] = {}

        def op() -> None:
            answers["op"] = qkv_fast.scaled_dot_product_attention(query, k, v, num_threads=2)

        def on_dask() -> None:
            answers["dask"] = result.compute(optimize_graph=False)

        on_dask()
        op()
        held = client.run(reset_peak)
        times: dict[str, list[float]] = {"op": [], "dask": []}
        for _ in range(options.rounds):
            times["op"].append(seconds(op))
            times["dask"].append(seconds(on_dask))
        beyond = [client.run(peak)[name] - held[name] for name in held]
        medians = {name: statistics.median(t) for name, t in times.items()}
        for name, t in times.items():
            shown = " ".join(f"{x:.2f}" for x in sorted(t))
            print(f"{name:5} {medians[name]:7.2f} s   ({shown})")
        print(f"ratio {medians['dask'] / medians['op']:7.3f}")
        print("memory beyond the chunks:", ", ".join(f"{x / 2**20:.0f} MiB" for x in beyond))
        print(f"largest difference: {np.abs(answers['op'] - answers['dask']).max():.1e}")


def compare(options: argparse.Namespace) -> None:
    from qkv_fast.integrations.dask import scaled_dot_product_attention

    query, key, value = arrays(options.keys, options.queries, options.chunk)
    result = scaled_dot_product_attention(query, key, value, is_causal=True,
                                          query_offset=options.keys - options.queries)  # fmt: skip
    answers = {name: result.compute(scheduler=name) for name in ("synchronous", "threads")}
    for workers in (1, 2, 3):
        with cluster(workers):
            answers[f"{workers} workers"] = result.compute()
    first = answers["synchronous"].tobytes()
    for name, answer in answers.items():
        print(f"{name:12} {'the same bits' if answer.tobytes() == first else 'OTHER BITS'}")


class Parts(NamedTuple):
    """What a call over nodes is made of, measured on one machine; seconds, and bytes for each."""

    prefill: float  # a multiply-add of q·k or of weights·v, with all threads of a node
    decode: float  # a byte of keys and values that a query reads
    merge: float  # a byte of out and lse that is merged
    task: float  # a task of Dask: scheduled, started, its result known
    call: float  # a call of a chunk of a DistributedKVCache, when many are under way


def message_bytes(queries: int) -> int:
    """Return the bytes of (out, lse) of a part: float32."""
    return 4 * HEADS * queries * (SIZE + 1)


def predict_prefill(parts: Parts, nodes: int, gbits: float, keys: int, queries: int) -> float:
    """Return the seconds of `queries` over `keys`, a chunk of keys on each node, causality aside.

    The query reaches all nodes in rounds that double who has it. Then each round of the tree brings
    one part to each second node that is left.
    """
    byte = 8 / (gbits * 1e9)
    sent = 4 * HEADS * queries * SIZE
    scatter = _rounds(nodes, 2) * sent * byte
    compute = 2 * HEADS * queries * (keys / nodes) * SIZE * parts.prefill
    rounds = _rounds(nodes, 2)
    merge = rounds * message_bytes(queries) * (byte + 2 * parts.merge)
    return scatter + compute + merge + (2 * nodes + rounds) * parts.task


def predict_decode(parts: Parts, nodes: int, gbits: float, keys: int) -> float:
    """Return the seconds of one query over a cache of `keys`: its client calls all nodes."""
    byte = 8 / (gbits * 1e9)
    sent = 4 * HEADS * SIZE
    read = 2 * HEADS * SIZE * 4 * keys / nodes * parts.decode
    return read + nodes * (parts.call + (sent + message_bytes(1)) * byte
                           + message_bytes(1) * parts.merge)  # fmt: skip


def _rounds(nodes: int, fan: int) -> int:
    rounds = 0
    while nodes > 1:
        nodes, rounds = -(-nodes // fan), rounds + 1
    return rounds


def measured_parts() -> Parts:
    from qkv_fast.integrations import _dask_parts
    from qkv_fast.integrations.dask import DistributedKVCache

    rng = np.random.default_rng(0)

    def median(function: Callable[[], Any], repeats: int = 5) -> float:
        function()
        return statistics.median(seconds(function) for _ in range(repeats))

    q, k, v = (rng.standard_normal((HEADS, n, SIZE), np.float32) for n in (2048, 8192, 8192))
    prefill = median(lambda: qkv_fast.scaled_dot_product_attention(q, k, v))
    prefill /= 2 * HEADS * 2048 * 8192 * SIZE
    k, v = (rng.standard_normal((HEADS, 65536, SIZE), np.float32) for _ in "kv")
    one = np.ascontiguousarray(q[:, :1])
    decode = median(lambda: qkv_fast.scaled_dot_product_attention(one, k, v)) / (2 * k.nbytes)
    part = qkv_fast.scaled_dot_product_attention(q, k[:, :64], v[:, :64], return_lse=True)
    merge = median(lambda: _dask_parts.merge_parts([part] * 2)) / (2 * message_bytes(2048))
    with cluster(2) as client:
        tasks = 200
        task = median(lambda: client.gather(client.map(abs, range(tasks), pure=False))) / tasks
        with DistributedKVCache(client, 1, HEADS, chunk_size=16, head_dim=SIZE) as cache:
            chunks = 32
            cache.append(k[None, :, : 16 * chunks], v[None, :, : 16 * chunks])
            call = median(lambda: cache.attend(one[None])) / chunks
    return Parts(prefill, decode, merge, task, call)


def predict(options: argparse.Namespace) -> None:
    parts = measured_parts()
    print("measured here:")
    print(f"  prefill  {4e-9 / 2 / parts.prefill:.0f} GFLOP/s a node")
    print(f"  decode   {1e-9 / parts.decode:.0f} GB/s a node")
    print(f"  merge    {1e-9 / parts.merge:.1f} GB/s")
    print(f"  task     {1e3 * parts.task:.2f} ms")
    print(f"  call     {1e3 * parts.call:.2f} ms")
    keys, queries = 8 * options.keys, options.queries  # 1 Mi keys by default
    print(f"{queries} queries over {keys} keys, {HEADS} heads of {SIZE}; a part is "
          f"{message_bytes(queries) / 1e6:.1f} MB, of one query {message_bytes(1)} bytes")  # fmt: skip  # noqa: E501
    print("| nodes | Gbit/s | prefill, s | of it computing | decode of a token, ms |")
    print("|---|---|---|---|---|")
    for nodes in (1, *NODES):
        for gbits in LINKS:
            whole = predict_prefill(parts, nodes, gbits, keys, queries)
            computing = 2 * HEADS * queries * keys / nodes * SIZE * parts.prefill / whole
            token = 1e3 * predict_decode(parts, nodes, gbits, keys)
            print(f"| {nodes} | {gbits} | {whole:.2f} | {computing:.0%} | {token:.2f} |")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("what", choices=["time", "bits", "predict"])
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--chunk", type=int, default=16384, help="keys of a chunk")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(arguments)
    {"time": measure, "bits": compare, "predict": predict}[options.what](options)


if __name__ == "__main__":
    main()
