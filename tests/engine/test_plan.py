"""Plans of the native engine: block sizes, tasks, scratch. These tests compute no attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run_python

from qkv_fast._problem.problem import Problem

native = pytest.importorskip("qkv_fast._native", reason="no native engine")

KIB = 1 << 10
PATHS = [str(folder) for folder in Path(__file__).parents[:2]]  # of this file and of helpers.py
CODES = {np.float32: 0, np.float64: 1, np.float16: 2, np.uint16: 3, np.bool_: 4, np.int8: 5}


def problem(query: tuple[int, ...], key: np.ndarray, **fields: Any) -> Problem:
    """Return a Problem as the stages fill it; its value is its key."""
    p = Problem()
    p.query = np.zeros(query, np.float32)
    p.key, p.value, p.out = key, key, p.query.copy()
    p.query_code = p.out_code = p.code = CODES[np.float32]
    p.key_code = p.value_code = CODES[key.dtype.type]
    p.kv_len, p.scale, p.num_threads = key.shape[-2], 1.0, 2
    for name, value in fields.items():
        setattr(p, name, value)
    return p


def describe(p: Problem, occupancy: float = 0.625, isa: str = "scalar") -> dict[str, Any]:
    return native.Runner(p.code, "simd", isa, occupancy, occupancy).describe(p)


def dense(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize("kv_len", [1, 100, 5000])
@pytest.mark.parametrize("size", [1, 40, 64, 130, 1100])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_scratch_arrays_do_not_overlap(kv_len: int, size: int, dtype: type) -> None:
    plans = describe(problem((2, 8, 3, size), dense(2, 8, kv_len, size, dtype=dtype)), 1.0)
    for name in ("prefill", "decode"):
        plan = plans[name]
        layout, block_k = plan["layout"], plan["block_k"]
        rows = plan["tile_q"] if name == "prefill" else plan["lanes"]
        assert all(offset % 64 == 0 for offset in layout.values())
        needed = {
            "scores": block_k * rows * 4,
            "gathered": max(block_k, rows) * max(size, block_k) * 4,
            "keys": block_k * size * 4,
            "values": block_k * size * 4,
            "key_scales": block_k * 4,
            "value_scales": block_k * 4,
            "tiles": plan["tiles_per_task"] * plan["heads_per_task"] * layout["tile_bytes"],
        }
        ends = [*sorted(set(layout[n] for n in needed)), layout["bytes"]]
        for array, size_needed in needed.items():
            end = min(e for e in ends if e > layout[array])
            assert layout[array] + size_needed <= end, (name, array)
        assert layout["query"] + size * rows * 4 <= layout["acc"]
        assert layout["acc"] + size * rows * 4 <= layout["total"]
        if name == "prefill" and kv_len > 2048:  # prefill folds the sums of long rows
            assert layout["total"] + size * rows * 4 <= layout["error"]
            assert layout["error"] + size * rows * 4 <= layout["tile_bytes"]
        assert layout["bytes"] <= plans["scratch_bytes"]


def test_block_sizes_of_decode() -> None:
    def block_k(size: int, dtype: type) -> int:
        plans = describe(problem((1, 2, 3, size), dense(1, 2, 9, size, dtype=dtype)))
        return int(plans["decode"]["block_k"])

    assert block_k(64, np.float32) == 64
    assert block_k(64, np.int8) == 64
    assert block_k(1024, np.float16) == 128
    assert block_k(1025, np.float32) == 16


BLOCKS = f"""
import sys; sys.path[:0] = {PATHS!r}
from test_plan import dense, describe, problem
for size in (64, 256, 512, 1024, 2048, 1 << 14):
    plans = describe(problem((1, 2, 3, size), dense(1, 2, 9, size)), isa=ISA)
    print(plans["prefill"]["block_k"])
"""


@pytest.mark.parametrize(
    ("l2", "isa", "blocks"),
    [
        (512, "scalar", [128, 128, 64, 32, 16, 16]),
        (256, "scalar", [128, 64, 32, 16, 16, 16]),
        (2048, "scalar", [128, 128, 64, 32, 16, 16]),  # tiles of few rows: at most 256 KiB
        (2048, "avx512", [128, 128, 128, 128, 64, 16]),
    ],
)
def test_blocks_of_prefill_fill_half_of_the_l2(l2: int, isa: str, blocks: list[int]) -> None:
    if isa not in native.isas():
        pytest.skip(f"this CPU lacks {isa}")
    code = BLOCKS.replace("ISA", repr(isa))
    done = run_python(code, QKV_FAST_L2_BYTES=str(l2 * KIB))
    assert [int(line) for line in done.stdout.split()] == blocks


def test_tiles_share_a_task_where_keys_must_be_converted() -> None:
    def tiles(heads: int, dtype: type, **fields: Any) -> int:
        p = problem((1, heads, 1024, 16), dense(1, heads, 64, 16, dtype=dtype), **fields)
        plan = describe(p)["prefill"]
        assert plan["tiles_per_task"] * plan["tile_q"] <= 256
        return plan["tiles_per_task"]

    assert tiles(32, np.float32) == 1
    assert tiles(32, np.float16) > 1
    assert tiles(32, np.float16, num_threads=10_000) == 1  # enough tasks for all threads
    mask = np.ones((1, 32, 1024, 64), bool)
    assert tiles(32, np.float32, attn_mask=mask, mask_code=CODES[np.bool_]) > 1


def test_decode_splits_the_keys() -> None:
    def counts(q_len: int, kv_len: int, **fields: Any) -> tuple[int, int]:
        plans = describe(problem((3, 4, q_len, 8), dense(3, 2, kv_len, 8), **fields), 1.0)
        return plans["tasks of one"], plans["partials"]

    assert counts(1, 2048) == (3 * 2, 0)
    assert counts(1, 2049) == (3 * 2 * 2, 3 * 2 * 2)
    assert counts(1, 5000, key_lengths=np.array([5000, 2048, 0])) == (2 * (3 + 1 + 1), 2 * 3)
    offset = np.array([4999] * 3)
    assert counts(1, 5000, left=10, right=0, query_offset=offset) == (3 * 2, 0)
    rows = 64 * 10  # prefill
    assert counts(rows, 5000)[1] == 0


def test_tiles_of_few_rows_split_the_keys() -> None:
    def counts(heads: int, kv_len: int, **fields: Any) -> tuple[int, int]:
        plans = describe(problem((3, heads, 1, 8), dense(3, 1, kv_len, 8), **fields), 0.0)
        assert plans["partials"] == 0
        return plans["tasks of one"], plans["tile partials"]

    tile_q = describe(problem((1, 1, 1, 8), dense(1, 1, 9, 8)))["prefill"]["tile_q"]
    assert counts(tile_q, 4096) == (3, 0)
    assert counts(tile_q, 4097) == (3 * 2, 3 * 2)
    assert counts(tile_q + 1, 9000) == (3 * 2 * 3, 3 * 2 * 3)
    assert counts(tile_q, 9000, key_lengths=np.array([9000, 4096, 0])) == (3 + 1 + 1, 3)
    offset = np.array([8999] * 3)
    assert counts(tile_q, 9000, left=10, right=0, query_offset=offset) == (3, 0)
    assert counts(257, 9000) == (3 * -(-257 // tile_q), 0)


def test_decode_has_at_most_the_rows_of_a_vector_unless_keys_are_converted() -> None:
    plans = describe(problem((1, 4, 1, 8), dense(1, 4, 9, 8)))
    assert plans["max_decode_rows"] == plans["prefill"]["lanes"]
    plans = describe(problem((1, 4, 1, 8), dense(1, 4, 9, 8, dtype=np.float16)))
    assert plans["max_decode_rows"] == min(24, plans["prefill"]["tile_q"])
    assert describe(problem((1, 4, 1, 8), dense(1, 4, 9, 8)), 0.0)["decode"] is None


def test_heads_are_interleaved_where_their_keys_alternate() -> None:
    def interleaving(key: np.ndarray, **fields: Any) -> tuple[int, int, int]:
        plan = describe(problem((64, 8, 1, 128), key, **fields))["decode"]
        return plan["adjacent_keys"], plan["interleave_span"], plan["heads_per_task"]

    assert interleaving(dense(64, 8, 512, 128))[::2] == (0, 1)
    assert interleaving(dense(64, 512, 8, 128).swapaxes(1, 2)) == (16, 64, 8)
    table = {"block_table": np.zeros((64, 32), np.int64), "kv_len": 512}
    for page_size, span in ((16, 64), (64, 64), (128, 128)):
        assert interleaving(dense(9, 8, page_size, 128), **table) == (page_size, span, 8)
    for page_size in (
        8,
        24,
        2048,
    ):  # less than a key run; no multiple of one; long enough as they are
        assert interleaving(dense(9, 8, page_size, 128), **table)[::2] == (0, 1)
    swapped = dense(64, 512, 8, 128).swapaxes(1, 2)
    assert interleaving(swapped, softcap=1.0)[::2] == (0, 1)
    assert interleaving(swapped, num_threads=64)[2] < 8  # enough tasks for all threads


L2 = f"""
import hashlib, sys
sys.path[:0] = {PATHS!r}
import numpy as np, qkv_fast
from qkv_fast import _native
from test_plan import describe, dense, problem
plan = describe(problem((1, 8, 2048, 64), dense(1, 8, 2048, 64)))["prefill"]
q, k, v = np.random.default_rng(0).standard_normal((3, 1, 8, 700, 64), np.float32)
out = qkv_fast.scaled_dot_product_attention(q, k, v, is_causal=True)
print(plan["tiles_per_task"], plan["prefetches"], hashlib.sha256(out).hexdigest())
"""


def test_the_size_of_the_l2_decides_sharing_and_no_bit() -> None:
    small = run_python(L2, QKV_FAST_L2_BYTES=str(512 * KIB)).stdout.split()
    large = run_python(L2, QKV_FAST_L2_BYTES=str(64 * KIB * KIB)).stdout.split()
    assert int(small[0]) > 1
    assert small[1] == "True"
    assert large[:2] == ["1", "False"]
    assert small[2] == large[2]


def test_a_wrong_size_of_the_l2_is_refused_by_name() -> None:
    for wrong in ("0", "-1", "1e6", "many"):
        done = run_python("import qkv_fast; qkv_fast.show_config()", QKV_FAST_L2_BYTES=wrong)
        assert done.returncode != 0  # the Python engine does not replace it
        assert f"QKV_FAST_L2_BYTES is '{wrong}': it must be a whole number" in done.stderr
