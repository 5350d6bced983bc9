"""What the benchmarks ask of the inside of the library: inputs, the machine's limits, threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from qkv_fast._dtypes import BFLOAT16, CODES, Array, bfloat16_bits, quantize, reals
from qkv_fast._loader import native_module, why_not_native
from qkv_fast._problem.output import output
from qkv_fast._problem.problem import Problem
from qkv_fast._problem.scoring import scoring
from qkv_fast._problem.tensors import packed
from qkv_fast._select import ISAS, current, decode_occupancy

__all__ = ["bfloat16_bits", "bfloat16_reals", "busy_seconds", "limits", "quantize", "read_once"]


def bfloat16_reals(bits: Array) -> Array:
    """Return bit patterns of bfloat16 as float32."""
    return reals(bits, BFLOAT16)


def limits(dtype: str, threads: int) -> tuple[float, float]:
    """Return the multiply-add peak in GFLOP/s and the read bandwidth in GB/s; 0 without engine.

    The peak is that of the instruction set that ``QKV_FAST_ISA`` names, else of the best; for int8
    it is that of float32, in which decoding computes.
    """
    if why_not_native():
        return 0.0, 0.0
    engine = native_module()
    isa = os.environ.get("QKV_FAST_ISA")
    what = CODES["float32" if dtype == "int8" else dtype], isa if isa in ISAS[1:] else None
    engine.fma_peak(threads, 0.02, *what)
    peak: float = engine.fma_peak(threads, 0.08, *what)
    return peak, engine.read_bandwidth(threads, 0.08)


def read_once(arrays: Sequence[Array], threads: int) -> float:
    """Read all bytes of contiguous arrays; return the seconds that it took."""
    seconds: float = native_module().read_once(arrays, threads)
    return seconds


def busy_seconds(
    query: Array, key: Array, value: Array, cu_seqlens: Any, threads: int
) -> tuple[Array, Array]:
    """Return causal attention of packed sequences, and the seconds that each thread computed."""
    p = Problem()
    packed(p, query, key, value, cu_seqlens, None, True, None)
    scoring(p, is_causal=True)
    output(p, None, False, threads)
    choice, busy = current(), np.zeros(threads)
    occupancies = decode_occupancy(choice, p.code)
    native_module().Runner(p.code, choice.tiles, choice.isa, *occupancies)(p, busy)
    return p.result, busy
