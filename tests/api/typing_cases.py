"""Calls with the types that a type checker must infer. mypy reads this file: test_typing.py."""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
import numpy.typing as npt

import qkv_fast

Array = npt.NDArray[Any]
Both = tuple[Array, Array]

x: npt.NDArray[np.float32] = np.ones((1, 2, 3, 4), np.float32)
sdpa = qkv_fast.scaled_dot_product_attention
cache = qkv_fast.KVCache(1, 2, 8, 4)

assert_type(sdpa(x, x, x), Array)
assert_type(sdpa(x, x, x, None, 0.0, True, 0.5, True, softcap=20.0, out=x), Array)
assert_type(sdpa(x, x, x, is_causal=True, window=(5, None), return_lse=False), Array)
assert_type(sdpa(x, x, x, key_lengths=[2], return_lse=True), Both)
assert_type(sdpa(x, x, x, attn_bias=x, key_ranges=([0, 1, 1], None)), Array)

assert_type(qkv_fast.varlen_attention(x[0], x[0], x[0], [0, 2]), Array)
assert_type(qkv_fast.varlen_attention(x[0], x[0], x[0], [0, 2], None, True, softcap=2.0), Array)
assert_type(
    qkv_fast.varlen_attention(x[0], x[0], x[0], [0, 2], query_offset=None, return_lse=True), Both
)

assert_type(qkv_fast.paged_attention(x, x, x, [[0]], 2, None, True, dtype="bfloat16"), Array)
assert_type(qkv_fast.paged_attention(x, x, x, [[0]], 2, key_scales=x, return_lse=True), Both)

assert_type(cache.attend(x), Array)
assert_type(cache.attend(x, None, True, sequences=[0], num_threads=1), Array)
assert_type(cache.attend(x, return_lse=True), Both)

assert_type(sdpa(x, x, x, out_dtype="float32"), Array)
assert_type(cache.attend(x, out_dtype="float32", return_lse=True), Both)
assert_type(qkv_fast.merge_attention([x], [x], sinks=[0.0], out=x, lse_out=x), Both)

either = bool(x.any())  # known only at run time
assert_type(sdpa(x, x, x, return_lse=either), Array | Both)
assert_type(cache.attend(x, return_lse=either), Array | Both)

sdpa(x, x, x, softcap="20")  # type: ignore[call-overload]
sdpa(x, x, x, soft_cap=20.0)  # type: ignore[call-overload]
sdpa(x, x, x, key_ranges=3)  # type: ignore[call-overload]
qkv_fast.merge_attention([x], [x], num_threads="2")  # type: ignore[arg-type]
cache.attend(x, query_offset=1)  # type: ignore[call-overload]
