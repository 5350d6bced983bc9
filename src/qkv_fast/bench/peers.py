"""The libraries that are compared: how each is prepared, and the process that runs it.

A ``prepare_*`` function takes a shape, float32 tensors, an element type and a number of threads. It
returns a function that computes once, and one that turns what that returned into an array of shape
(B, H, Lq, D).
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from qkv_fast._dtypes import Array

from .probes import bfloat16_bits, bfloat16_reals
from .shapes import Shape

Run = Callable[[], Any]
Prepared = tuple[Run, Callable[[Any], Array]]
DTYPES = ("float32", "bfloat16")
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2}


def numpy_attention(q: Array, k: Array, v: Array, is_causal: bool) -> Array:
    """Attention as one writes it by hand."""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat(q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores: Array = q @ k.swapaxes(-1, -2) * np.float32(q.shape[-1] ** -0.5)
    if is_causal:
        scores[..., np.triu(np.ones(scores.shape[-2:], bool), 1)] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    result: Array = scores @ v
    return result


def prepare_qkv_fast(shape: Shape, tensors: list[Array], dtype: str, threads: int) -> Prepared:
    """Prepare this library."""
    import qkv_fast

    is_bf16 = dtype == "bfloat16"
    q, k, v = (bfloat16_bits(x) for x in tensors) if is_bf16 else tensors
    out = np.empty_like(q)
    options: dict[str, Any] = {"is_causal": shape.is_causal, "enable_gqa": True, "out": out}
    options |= {"num_threads": threads, "dtype": dtype if is_bf16 else None}

    def run() -> Any:
        return qkv_fast.scaled_dot_product_attention(q, k, v, **options)

    return run, bfloat16_reals if is_bf16 else np.asarray


def prepare_numpy(shape: Shape, tensors: list[Array], dtype: str, threads: int) -> Prepared:
    """Prepare three lines of NumPy."""
    if dtype != "float32":
        raise NotImplementedError("NumPy has no bfloat16")
    q, k, v = tensors
    return lambda: numpy_attention(q, k, v, shape.is_causal), np.asarray


def prepare_torch(shape: Shape, tensors: list[Array], dtype: str, threads: int) -> Prepared:
    """Prepare PyTorch's scaled_dot_product_attention."""
    import torch

    torch.set_num_threads(threads)
    q, k, v = (torch.from_numpy(x).to(getattr(torch, dtype)) for x in tensors)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    gqa = q.shape[1] != k.shape[1]

    def run() -> Any:
        with torch.inference_mode():
            return sdpa(q, k, v, is_causal=shape.is_causal, enable_gqa=gqa)

    return run, lambda result: result.float().numpy()


def prepare_onnxruntime(shape: Shape, tensors: list[Array], dtype: str, threads: int) -> Prepared:
    """Prepare ONNX Runtime's com.microsoft MultiHeadAttention."""
    import onnxruntime as ort
    from onnx import TensorProto, helper

    q, k, v = tensors
    if dtype != "float32":
        raise NotImplementedError("MultiHeadAttention on CPU has no bfloat16")
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

    def answer(_: None) -> Any:
        out = binding.copy_outputs_to_cpu()[0]
        return out.reshape(shape.batch, shape.q_len, shape.num_heads, -1).swapaxes(1, 2)

    return run, answer


def prepare_openvino(shape: Shape, tensors: list[Array], dtype: str, threads: int) -> Prepared:
    """Prepare OpenVINO's scaled_dot_product_attention, in this dtype from input to output."""
    import openvino as ov
    from openvino import opset13 as ops

    if tensors[0].shape[1] != tensors[1].shape[1]:
        raise NotImplementedError("no grouped heads")
    is_bf16 = dtype == "bfloat16"
    kind = ov.Type.bf16 if is_bf16 else ov.Type.f32
    parameters = [ops.parameter(list(x.shape), kind) for x in tensors]
    node = ops.scaled_dot_product_attention(*parameters, causal=shape.is_causal)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "bf16" if is_bf16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.Core().compile_model(ov.Model([node], parameters), "CPU", settings)
    request = compiled.create_infer_request()
    for i, x in enumerate(tensors):
        tensor = ov.Tensor(x, shared_memory=True)
        if is_bf16:
            tensor = ov.Tensor(kind, list(x.shape))
            tensor.data.view(np.uint16)[...] = bfloat16_bits(x)
        request.set_input_tensor(i, tensor)

    def run() -> Any:
        request.infer()

    def answer(_: None) -> Any:
        data = np.array(request.get_output_tensor().data)
        return bfloat16_reals(data.view(np.uint16)) if data.itemsize == 2 else data

    return run, answer


PREPARE: dict[str, Callable[[Shape, list[Array], str, int], Prepared]] = {
    "qkv_fast": prepare_qkv_fast,
    "torch": prepare_torch,
    "onnxruntime": prepare_onnxruntime,
    "openvino": prepare_openvino,
    "numpy": prepare_numpy,
}


def version(name: str) -> str | None:
    """Return the version of a peer that is installed here, else None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def exact(shape: Shape, q: Array, k: Array, v: Array) -> Array:
    """Return the last 64 queries of the last head of the first batch entry, in float64."""
    q, k, v = (x.astype(float) for x in (q[0, -1, -64:], k[0, -1], v[0, -1]))
    s = q @ k.T / np.sqrt(q.shape[-1])
    if shape.is_causal:
        position = np.arange(shape.q_len)[-64:, None]
        s[np.arange(shape.keys) > position] = -np.inf
    w = np.exp(s - s.max(axis=-1, keepdims=True))
    result: Array = w / w.sum(axis=-1, keepdims=True) @ v
    return result


def tensors_of(shape: Shape, dtype: str) -> list[Array]:
    """Return the shape's tensors in float32, rounded to what the dtype can hold."""
    if dtype == "float32":
        return list(shape.tensors())
    return [bfloat16_reals(bfloat16_bits(x)) for x in shape.tensors()]


def work(peer: str, threads: int, pipe: Connection) -> None:
    """Be a peer's process: prepare a shape when told, run a turn when told, else sleep."""
    run: Run | None = None
    while (message := pipe.recv()) is not None:
        try:
            if message[0] == "prepare":
                _, shape, dtype = message
                run = None
                tensors = tensors_of(shape, dtype)
                run, answer = PREPARE[peer](shape, tensors, dtype, threads)
                result = answer(run())
                error = float(np.abs(result[0, -1, -64:] - exact(shape, *tensors)).max())
                pipe.send(("ready", error))
            else:
                assert run is not None
                times: list[float] = []
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
        theirs.close()

    def ask(self, *message: Any) -> tuple[str, Any]:
        """Send a message and wait for the answer; a process that died is an error too."""
        try:
            self.pipe.send(message)
            answer: tuple[str, Any] = self.pipe.recv()
            return answer
        except (EOFError, OSError):
            return "error", "the process ended"

    def close(self) -> None:
        """End the process."""
        try:
            self.pipe.send(None)
        except OSError:
            return
        self.process.join(5)
