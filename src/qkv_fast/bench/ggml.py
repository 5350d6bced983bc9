"""ggml's flash attention, by ctypes, from the shared libraries that llama_cpp_python brings.

Only what a graph of one node needs is declared. Tensors are float32 queries of shape
(B, H, Lq, D) and keys and values of shape (B, Hkv, Lk, D), all contiguous: ggml lists the same
sizes from the last to the first. Keys and values are float32, float16, bfloat16 or q8_0, which
holds 32 numbers in 8 bits each with a common float16 factor.
"""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qkv_fast._dtypes import Array, bfloat16_bits

TYPES = {"float32": 0, "float16": 1, "int8": 8, "bfloat16": 30}
POINTER, INT, SIZE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
LONG, REAL = ctypes.c_int64, ctypes.c_float


class InitParams(ctypes.Structure):
    """The argument of ggml_init."""

    _fields_ = (("mem_size", SIZE), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool))


# By library: what each function returns and takes.
FUNCTIONS: dict[str, dict[str, tuple[Any, list[Any]]]] = {
    "libggml-base.so": {
        "ggml_init": (POINTER, [InitParams]),
        "ggml_free": (None, [POINTER]),
        "ggml_tensor_overhead": (SIZE, []),
        "ggml_graph_overhead": (SIZE, []),
        "ggml_new_tensor_4d": (POINTER, [POINTER, INT, LONG, LONG, LONG, LONG]),
        "ggml_nbytes": (SIZE, [POINTER]),
        "ggml_flash_attn_ext": (POINTER, [POINTER] * 5 + [REAL] * 3),
        "ggml_new_graph": (POINTER, [POINTER]),
        "ggml_build_forward_expand": (None, [POINTER, POINTER]),
        "ggml_quantize_chunk": (SIZE, [INT, POINTER, POINTER, LONG, LONG, LONG, POINTER]),
        "ggml_backend_alloc_ctx_tensors": (POINTER, [POINTER, POINTER]),
        "ggml_backend_tensor_set": (None, [POINTER, POINTER, SIZE, SIZE]),
        "ggml_backend_tensor_get": (None, [POINTER, POINTER, SIZE, SIZE]),
        "ggml_backend_graph_compute": (INT, [POINTER, POINTER]),
        "ggml_backend_buffer_free": (None, [POINTER]),
        "ggml_backend_free": (None, [POINTER]),
    },
    "libggml-cpu.so": {
        "ggml_backend_cpu_init": (POINTER, []),
        "ggml_backend_cpu_set_n_threads": (None, [POINTER, INT]),
        "ggml_cpu_has_avx512": (INT, []),
    },
}


class Library:
    """The declared functions, as attributes without ``ggml_``."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("llama_cpp_python is not installed")
        folder = Path(spec.origin).parent / "lib"
        self.functions: dict[str, Any] = {}
        for file, functions in FUNCTIONS.items():
            library = ctypes.CDLL(str(folder / file), mode=ctypes.RTLD_GLOBAL)
            for name, (result, arguments) in functions.items():
                function = library[name]
                function.restype, function.argtypes = result, arguments
                self.functions[name.removeprefix("ggml_")] = function

    def __getattr__(self, name: str) -> Any:
        """Return a function."""
        try:
            return self.functions[name]
        except KeyError:
            raise AttributeError(name) from None


def stored(library: Library, x: Array, dtype: str) -> Array:
    """Return float32 numbers as ggml holds them in a dtype."""
    if dtype == "bfloat16":
        return bfloat16_bits(x)
    if dtype != "int8":
        return x.astype(dtype)
    rows, size = x.size // x.shape[-1], x.shape[-1]
    if size % 32:
        raise NotImplementedError("q8_0 holds multiples of 32 numbers")
    result = np.empty((rows, size // 32 * 34), np.uint8)
    arguments = (x.ctypes.data, result.ctypes.data, 0, rows, size, None)
    library.quantize_chunk(TYPES["int8"], *arguments)
    return result


def flash_attention(
    q: Array, k: Array, v: Array, is_causal: bool, dtype: str, threads: int, *, only_avx2: bool
) -> tuple[Callable[[], None], Callable[[Any], Array]]:
    """Return a function that computes attention once, and one that returns its result.

    Parameters
    ----------
    q, k, v : float32 arrays, shapes (B, H, Lq, D), (B, Hkv, Lk, D) and (B, Hkv, Lk, Dv)
    is_causal : bool
        Query i sees keys 0 to i, by a float16 mask, as in llama.cpp.
    dtype : "float32", "float16", "bfloat16" or "int8"
        How keys and values are held; "int8" is q8_0.
    threads : int
    only_avx2 : bool
        Refuse a library that was built for AVX-512: what it uses is chosen when it is built.

    Returns
    -------
    run, answer : callables
        answer takes what run returned, and gives an array of shape (B, H, Lq, Dv).
    """
    library = Library()
    if only_avx2 and library.cpu_has_avx512():
        raise NotImplementedError("this libggml was built for AVX-512")
    size = 8 * library.tensor_overhead() + library.graph_overhead()
    context = library.init(InitParams(size, None, True))

    def tensor(code: int, *shape: int) -> int:
        address: int = library.new_tensor_4d(context, code, *shape[::-1])
        return address

    query = tensor(TYPES["float32"], *q.shape)
    key, value = (tensor(TYPES[dtype], *x.shape) for x in (k, v))
    filled = [(query, q), (key, stored(library, k, dtype)), (value, stored(library, v, dtype))]
    mask = None
    if is_causal:
        unseen = np.triu(np.full((q.shape[2], k.shape[2]), -np.inf, np.float16), 1)
        mask = tensor(TYPES["float16"], 1, 1, *unseen.shape)
        filled.append((mask, unseen))
    scale = q.shape[-1] ** -0.5
    node = library.flash_attn_ext(context, query, key, value, mask, scale, 0.0, 0.0)
    graph = library.new_graph(context)
    library.build_forward_expand(graph, node)
    backend = library.backend_cpu_init()
    library.backend_cpu_set_n_threads(backend, threads)
    buffer = library.backend_alloc_ctx_tensors(context, backend)
    for address, x in filled:
        if x.nbytes != library.nbytes(address):
            raise RuntimeError(f"ggml expects {library.nbytes(address)} bytes, not {x.nbytes}")
        library.backend_tensor_set(address, x.ctypes.data, 0, x.nbytes)

    def run() -> None:
        if status := library.backend_graph_compute(backend, graph):
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def answer(_: Any) -> Array:
        out = np.empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), np.float32)
        library.backend_tensor_get(node, out.ctypes.data, 0, out.nbytes)
        return out.swapaxes(1, 2)

    def free() -> None:
        library.backend_buffer_free(buffer)
        library.backend_free(backend)
        library.free(context)

    weakref.finalize(run, free)
    return run, answer
