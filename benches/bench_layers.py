"""The layer beside PyTorch's and ONNX Runtime's, each in a process of its own, in turns.

``python benches/bench_layers.py [--shapes BATCH,LENGTH,EMBED,HEADS ...]`` prints milliseconds of a
self-attention layer from token vectors to token vectors, in float32: medians over rounds, and for
each library the ratio of its time to qkv_fast's (above 1: qkv_fast is faster).

qkv_fast          MultiHeadAttention
qkv_fast-blas     the same with BLAS tiles: its products are SciPy's, on OpenBLAS's threads
torch             torch.nn.MultiheadAttention in eval and inference mode, which takes its fast path
onnxruntime       com.microsoft Attention, which has the input projections, then MatMul and Add
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

import qkv_fast
from qkv_fast.bench.peers import version

SHAPES = ("8,512,768,12", "1,128,384,12", "1,512,768,12", "32,32,384,12", "1,2048,1024,16")
Layer = tuple[int, int, int, int]  # batch, length, embed_dim, heads
Answer = Callable[[], np.ndarray]


def inputs(shape: Layer) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return token vectors, and weights under torch's names."""
    batch, length, embed_dim, _ = shape
    rng = np.random.default_rng(0)

    def normal(*sizes: int) -> np.ndarray:
        return (rng.standard_normal(sizes) / embed_dim**0.5).astype(np.float32)

    state = {
        "in_proj_weight": normal(3 * embed_dim, embed_dim),
        "in_proj_bias": normal(3 * embed_dim),
        "out_proj.weight": normal(embed_dim, embed_dim),
        "out_proj.bias": normal(embed_dim),
    }
    return rng.standard_normal((batch, length, embed_dim)).astype(np.float32), state


def prepare_qkv_fast(shape: Layer, threads: int, tiles: str = "auto") -> Answer:
    """Prepare this library's layer."""
    x, state = inputs(shape)
    qkv_fast.set_num_threads(threads)
    layer = qkv_fast.MultiHeadAttention.from_state_dict(state, shape[3])
    out = np.empty_like(x)

    def run() -> Any:
        with qkv_fast.backend(tiles=tiles):
            return layer(x, out=out)

    return run


def prepare_torch(shape: Layer, threads: int) -> Answer:
    """Prepare PyTorch's layer."""
    import torch

    torch.set_num_threads(threads)
    x, state = inputs(shape)
    layer = torch.nn.MultiheadAttention(shape[2], shape[3], batch_first=True).eval()
    layer.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    tensor = torch.from_numpy(x)

    def run() -> np.ndarray:
        with torch.inference_mode():
            return layer(tensor, tensor, tensor, need_weights=False)[0].numpy()

    return run


def prepare_onnxruntime(shape: Layer, threads: int) -> Answer:
    """Prepare ONNX Runtime's Attention and an output projection."""
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    x, state = inputs(shape)
    weights = {
        "w": state["in_proj_weight"].T, "b": state["in_proj_bias"],
        "wo": state["out_proj.weight"].T, "bo": state["out_proj.bias"],
    }  # fmt: skip
    nodes = [
        helper.make_node("Attention", ["x", "w", "b"], ["a"], domain="com.microsoft",
                         num_heads=shape[3]),
        helper.make_node("MatMul", ["a", "wo"], ["m"]),
        helper.make_node("Add", ["m", "bo"], ["y"]),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape)],
        [numpy_helper.from_array(np.ascontiguousarray(w), name) for name, w in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: session.run(None, {"x": x})[0]


PREPARE: dict[str, Callable[[Layer, int], Answer]] = {
    "qkv_fast": prepare_qkv_fast,
    "qkv_fast-blas": lambda shape, threads: prepare_qkv_fast(shape, threads, "blas"),
    "torch": prepare_torch,
    "onnxruntime": prepare_onnxruntime,
}


def work(peer: str, shape: Layer, threads: int, pipe: Connection) -> None:
    """Be a peer's process: send the answer's first row, then the times of each turn asked for."""
    run = PREPARE[peer](shape, threads)
    pipe.send(run()[0, 0])
    while (seconds := pipe.recv()) is not None:
        times: list[float] = []
        run()
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        pipe.send(statistics.median(times))


def compare(shape: Layer, threads: int, rounds: int, turn: float) -> dict[str, float]:
    """Return each peer's median milliseconds."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for peer in PREPARE:
        name = peer.split("-")[0]
        if name != "qkv_fast" and version(name) is None:
            continue
        pipes[peer], theirs = context.Pipe()
        context.Process(target=work, args=(peer, shape, threads, theirs), daemon=True).start()
    answers = {peer: pipe.recv() for peer, pipe in pipes.items()}
    for peer, answer in answers.items():
        np.testing.assert_allclose(answer, answers["qkv_fast"], atol=1e-4, err_msg=peer)
    times: dict[str, list[float]] = {peer: [] for peer in pipes}
    for i in range(rounds):
        for peer in list(pipes)[:: 1 if i % 2 else -1]:
            pipes[peer].send(turn)
            times[peer].append(pipes[peer].recv())
    for pipe in pipes.values():
        pipe.send(None)
    return {peer: statistics.median(some) * 1e3 for peer, some in times.items()}


def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="batch,length,embed_dim,heads")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn", type=float, default=0.4, help="seconds of a peer's turn")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args()
    for given in options.shapes:
        batch, length, embed_dim, heads = (int(number) for number in given.split(","))
        shape = (batch, length, embed_dim, heads)
        row = compare(shape, options.threads, options.rounds, options.turn)
        cells = [f"{peer} {ms:.3f} ms {ms / row['qkv_fast']:.2f}" for peer, ms in row.items()]
        print(f"{given:<18}" + "".join(f"{cell:>32}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
