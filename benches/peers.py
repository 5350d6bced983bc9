"""Every library on the same tensors, each in a process of its own, taking turns.

    pip install ".[bench]" && pip install torch==2.13.0     # the CPU build
    python benches/peers.py [--shapes bert-128 ...] [--peers torch ...] [--rounds 7] [--json FILE]

Thread pools that spin slow each other tenfold in one process; here the others sleep while one
runs. In each round every peer has one turn of at least --turn seconds; the figure is the
median over rounds of a turn's median. Each answer is first held against float64. The peak of FMA
instructions is measured again beside every row, since a machine's speed drifts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from shapes import SHAPES, Shape

Run = Callable[[], Any]
PEERS = ["qkv_fast", "torch", "onnxruntime", "openvino", "numpy"]


def prepare_qkv_fast(shape: Shape, q: Any, k: Any, v: Any, threads: int) -> Run:
    import qkv_fast

    out = np.empty_like(q)
    return lambda: qkv_fast.scaled_dot_product_attention(
        q, k, v, is_causal=shape.is_causal, enable_gqa=True, out=out, num_threads=threads
    )


def prepare_numpy(shape: Shape, q: Any, k: Any, v: Any, threads: int) -> Run:
    from bench_attention import numpy_attention

    return lambda: numpy_attention(q, k, v, shape.is_causal)


def prepare_torch(shape: Shape, q: Any, k: Any, v: Any, threads: int) -> Run:
    import torch

    torch.set_num_threads(threads)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def run() -> Any:
        with torch.inference_mode():
            return sdpa(
                *tensors,
                is_causal=shape.is_causal,
                enable_gqa=q.shape[1] != k.shape[1],
            )

    return run


def prepare_onnxruntime(shape: Shape, q: Any, k: Any, v: Any, threads: int) -> Run:
    import onnxruntime as ort
    from onnx import TensorProto, helper

    if q.shape[1] != k.shape[1]:
        raise NotImplementedError("MultiHeadAttention has no grouped heads")
    # MultiHeadAttention takes queries as (B, L, H D), keys and values as (B, H, L, D).
    hidden = shape.num_heads * shape.head_dim
    flat = np.ascontiguousarray(q.swapaxes(1, 2)).reshape(shape.batch, shape.q_len, hidden)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape)
        for name, x in (("q", flat), ("k", k), ("v", v))
    ]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, flat.shape)
    node = helper.make_node(
        "MultiHeadAttention",
        ["q", "k", "v"],
        ["out"],
        domain="com.microsoft",
        num_heads=shape.num_heads,
        unidirectional=int(shape.is_causal),
    )
    graph = helper.make_graph([node], "attention", inputs, [output])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    for name, x in (("q", flat), ("k", k), ("v", v)):
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(x))
    binding.bind_output("out")

    def run() -> Any:
        session.run_with_iobinding(binding)
        return binding

    def answer() -> Any:
        out = run().copy_outputs_to_cpu()[0]
        return out.reshape(shape.batch, shape.q_len, shape.num_heads, -1).swapaxes(1, 2)

    run.answer = answer  # type: ignore[attr-defined]
    return run


def prepare_openvino(shape: Shape, q: Any, k: Any, v: Any, threads: int) -> Run:
    import openvino as ov
    from openvino import opset13 as ops

    if q.shape[1] != k.shape[1]:
        raise NotImplementedError("no grouped heads")
    parameters = [ops.parameter(list(x.shape), np.float32) for x in (q, k, v)]
    node = ops.scaled_dot_product_attention(*parameters, causal=shape.is_causal)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.Core().compile_model(ov.Model([node], parameters), "CPU", settings)
    request = compiled.create_infer_request()
    for i, x in enumerate((q, k, v)):
        request.set_input_tensor(i, ov.Tensor(x, shared_memory=True))

    def run() -> Any:
        request.infer()
        return request

    run.answer = lambda: np.array(run().get_output_tensor().data)  # type: ignore[attr-defined]
    return run


def exact(shape: Shape, q: Any, k: Any, v: Any) -> Any:
    """The last 64 queries of the last head of the first batch entry, in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q[0, -1, -64:].astype(float), k[0, -1].astype(float), v[0, -1].astype(float)
    assert group >= 1
    s = q @ k.T / np.sqrt(q.shape[-1])
    if shape.is_causal:
        position = np.arange(shape.q_len)[-64:, None]
        s[np.arange(shape.keys) > position] = -np.inf
    w = np.exp(s - s.max(axis=-1, keepdims=True))
    return w / w.sum(axis=-1, keepdims=True) @ v


def work(peer: str, threads: int, pipe: Connection) -> None:
    """A peer's process: prepare a shape when told, run it for a turn when told, else sleep."""
    run: Run | None = None
    while (message := pipe.recv()) is not None:
        try:
            if message[0] == "prepare":
                shape = SHAPES[message[1]]
                q, k, v = shape.tensors()
                run = globals()[f"prepare_{peer}"](shape, q, k, v, threads)
                answer = np.asarray(getattr(run, "answer", run)())
                error = float(np.abs(answer[0, -1, -64:] - exact(shape, q, k, v)).max())
                pipe.send(("ready", error))
            else:
                assert run is not None
                times = []
                run()
                end = time.perf_counter() + message[1]
                while not times or time.perf_counter() < end:
                    begin = time.perf_counter()
                    run()
                    times.append(time.perf_counter() - begin)
                pipe.send(("time", statistics.median(times)))
        except Exception as error:  # a peer that can't do a shape is a row's gap, not the end
            pipe.send(("error", f"{type(error).__name__}: {error}"))


class Peer:
    """A peer's process, seen from the one that times."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(name, threads, theirs), daemon=True)
        self.process.start()

    def ask(self, *message: Any) -> tuple[str, Any]:
        """Send a message and wait for the answer."""
        self.pipe.send(message)
        kind, value = self.pipe.recv()
        return kind, value

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join(5)


def measure(name: str, peers: list[Peer], rounds: int, turn: float, threads: int) -> dict[str, Any]:
    """Return a row: GFLOP/s of every peer, their errors, and the FMA peak meanwhile."""
    from qkv_fast import _engine

    row: dict[str, Any] = {"shape": name, "gflops": {}, "error": {}, "failed": {}}
    ready = []
    for peer in peers:
        kind, value = peer.ask("prepare", name)
        if kind == "ready" and value < 1e-4:
            row["error"][peer.name] = value
            ready.append(peer)
        else:
            row["failed"][peer.name] = value if kind == "error" else f"wrong by {value}"
    times: dict[str, list[float]] = {peer.name: [] for peer in ready}
    peaks = []
    for i in range(rounds):
        print(f"\r{name}: round {i + 1} of {rounds}", end="", file=sys.stderr, flush=True)
        for peer in ready if i % 2 == 0 else ready[::-1]:
            time.sleep(0.06)  # the last one's threads go to sleep
            times[peer.name].append(peer.ask("run", turn)[1])
        time.sleep(0.06)
        _engine.fma_peak(threads, 0.02)
        peaks.append(_engine.fma_peak(threads, 0.1))
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    row["peak"] = statistics.median(peaks)
    for peer_name, seconds in times.items():
        row["gflops"][peer_name] = SHAPES[name].gflop / statistics.median(seconds)
    return row


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=float, default=0.15, help="seconds of a turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", help="file to write the rows to")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    peers = [Peer(name, options.threads) for name in options.peers]
    print(f"float32, {options.threads} threads, GFLOP/s (share of the FMA peak)")
    print(f"{'':<22}" + "".join(f"{p.name:>15}" for p in peers) + f"{'peak':>8}{'best ratio':>12}")
    rows = []
    for name in options.shapes:
        row = measure(name, peers, options.rounds, options.turn, options.threads)
        rows.append(row)
        cells = ""
        for peer in peers:
            speed = row["gflops"].get(peer.name)
            cells += f"{'-':>15}" if speed is None else f"{speed:>8.0f} ({speed / row['peak']:.2f})"
        others = [s for p, s in row["gflops"].items() if p != "qkv_fast"]
        ratio = row["gflops"].get("qkv_fast", 0) / max(others, default=1)
        print(f"{name:<22}{cells}{row['peak']:>8.0f}{ratio:>12.2f}", flush=True)
        for peer_name, why in row["failed"].items():
            print(f"    {peer_name}: {why}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    for peer in peers:
        peer.close()


if __name__ == "__main__":
    main()
