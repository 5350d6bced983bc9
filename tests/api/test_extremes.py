"""Sizes and distances at which 32-bit arithmetic would fail, in little memory and little time."""

from __future__ import annotations

import mmap
import sys

import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import make, normal

import qkv_fast
from qkv_fast import _loader, analysis, attention_weights, paged_attention, varlen_attention
from qkv_fast import scaled_dot_product_attention as sdpa

FAR = 2**31 + 4096  # bytes between neighbours along an axis
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


@pytest.fixture(scope="module")
def desert():
    """Return 16 GiB of addresses, of which only the pages that are written take memory."""
    if sys.platform != "linux":
        pytest.skip("needs memory without reserve")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, 1 << 34, flags=flags)
    except OSError:
        pytest.skip("no 16 GiB of addresses")
    return np.frombuffer(memory, np.uint8)


def spread_out(x: np.ndarray, axis: int, desert: np.ndarray, place: int = 0) -> np.ndarray:
    """Return a copy of x with FAR bytes between neighbours along an axis, forwards or backwards."""
    strides = np.array(np.zeros(x.shape, x.dtype).strides)
    strides[:axis] //= max(1, x.shape[axis])
    strides[axis] = FAR if place % 2 else -FAR
    first = (0 if place % 2 else FAR * (x.shape[axis] - 1)) + place * (1 << 20)
    far = np.ndarray(x.shape, x.dtype, desert.data, first, tuple(strides))
    far[...] = x
    return far


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("rows", [2, 5])
def test_strides_beyond_32_bits(engine, rng, desert, axis, rows):
    """Every axis of every array: 4 steps of more than 2**31 bytes, 2**31 elements in all."""
    q, k, v = make(rng, (5, 5, 5, rows, 5, 5, 5))
    given = {"query": q, "key": k, "value": v, "attn_mask": normal(rng, (5, 5, rows, 5)),
             "attn_bias": normal(rng, (5, 5, rows, 5))}  # fmt: skip
    expected = sdpa(**given)
    for place, name in enumerate(given):
        far = given | {name: spread_out(given[name], axis, desert, place)}
        # Where keys have to be gathered, another path may be the faster one, with other last bits.
        np.testing.assert_allclose(sdpa(**far), expected, rtol=1e-5, atol=1e-5, err_msg=name)
    allowed = rng.random((5, 5, rows, 5)) < 0.7
    np.testing.assert_array_equal(
        sdpa(q, k, v, spread_out(allowed, axis, desert)), sdpa(q, k, v, allowed)
    )
    out = spread_out(np.zeros_like(q), axis, desert, 7)
    assert sdpa(**given, out=out) is out
    np.testing.assert_array_equal(out, expected)


def assert_equal(engine, actual, expected):
    """Compare bits, but values for the Python engine: NumPy 1.26 leaves BLAS for such strides."""
    if engine.engine == "python":
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("rows", [1, 40])
def test_pages_and_packed_tokens_that_lie_far_apart(engine, rng, desert, rows):
    k, v = normal(rng, (5, 2, 16, 8)), normal(rng, (5, 2, 16, 6))
    q, table = normal(rng, (1, 4, rows, 8)), np.array([[3, 0, 4, 1, 2]])
    expected = paged_attention(q, k, v, table, 75)
    for axis in range(2):
        far = [spread_out(x, axis, desert, i) for i, x in enumerate((k, v))]
        assert_equal(engine, paged_attention(q, *far, table, 75), expected)
    tokens = [normal(rng, (5, 2, n)) for n in (8, 8, 6)]
    expected = varlen_attention(*tokens, [0, 2, 5])
    far = [spread_out(x, 0, desert, i) for i, x in enumerate(tokens)]
    assert_equal(engine, varlen_attention(*far, [0, 2, 5]), expected)
    cache = qkv_fast.KVCache.from_arrays(
        *(spread_out(x, 0, desert, i) for i, x in enumerate((k, v))), lengths=16
    )
    queries = normal(rng, (5, 2, rows, 8))
    assert_equal(engine, cache.attend(queries), sdpa(queries, k, v))


LONG = 2**31 + 11


@pytest.mark.parametrize("rows", [1, 40])
def test_more_keys_than_32_bits_count(engine, rng, rows):
    """One row of keys, broadcast; the call sees the last ones, by each way to exclude others."""
    q, k, v = make(rng, (1, 2, 1, rows, 1, 8, 8))
    k, v = (np.broadcast_to(x, (1, 1, LONG, 8)) for x in (k, v))
    expected = np.broadcast_to(v[:, :, :1], (1, 2, rows, 8))
    begin = np.full((2, rows), LONG - 5)
    for options in (
        {"key_ranges": (begin, None)},
        {"key_ranges": (begin, begin + 2)},
        {"key_ranges": (LONG - 70, None), "key_lengths": LONG - 3},
        {"is_causal": True, "window": (3, None), "query_offset": LONG - 7 - rows},
    ):
        out, lse = sdpa(q, k, v, enable_gqa=True, return_lse=True, **options)
        np.testing.assert_allclose(out, expected, rtol=1e-5)
        assert np.isfinite(lse).all()


def test_statistics_of_positions_beyond_32_bits(engine, rng):
    q, k, _ = make(rng, (1, 2, 2, 3, 70, 8, 8))
    rows = analysis.attention_statistics(q, k, query_offset=2**33)
    np.testing.assert_allclose(rows.mean_distance, 2.0**33, rtol=1e-6)
    assert not rows.on_self.any()


@pytest.mark.parametrize("name", ["native", "python"])
def test_a_million_keys_with_a_window(name, rng):
    """Each query sees 9 keys: the work is that of the window, not of the keys."""
    if name == "native" and _loader.why_not_native():
        pytest.skip("no native engine")
    count = 1_000_000
    rows = count if name == "native" else 100
    q = normal(rng, (1, rows, 4))
    k, v = normal(rng, (1, count, 4)), normal(rng, (1, count, 4))
    offset = count - rows
    with qkv_fast.backend(name):
        out = sdpa(q, k, v, is_causal=True, window=(8, 0), query_offset=offset)
        masked = sdpa(q[:, -40:], k, v, window=(8, 0), query_offset=count - 40, key_lengths=count)
    for first in (0, 1234, rows // 2, rows - 50):
        begin = max(0, offset + first - 8)
        end = offset + first + 50
        piece = k[:, begin:end], v[:, begin:end]
        seen = {"is_causal": True, "window": (8, 0), "query_offset": offset + first - begin}
        oracle.assert_close(out[:, first : first + 50], q[:, first : first + 50], *piece, **seen)
    np.testing.assert_allclose(masked, out[:, -40:], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 70])
def test_head_sizes_to_4096(engine, rng, dtype, rows):
    for d, dv in ((4096, 4096), (4095, 3), (2, 4095), (2049, 4096)):
        q, k, v = make(rng, (1, 2, 1, rows, 40, d, dv), dtype)
        q = (q * 0.1).astype(dtype)
        out = sdpa(q, k, v, enable_gqa=True)
        if dtype == ml_dtypes.bfloat16:  # pairs of bfloat16 round the weights too
            exact = oracle.attention(q, k, v)[0]
            np.testing.assert_allclose(out.astype(float), exact, atol=0.03)
        else:
            oracle.assert_close(out, q, k, v)
        if dtype == np.float32:
            w = attention_weights(q, k, enable_gqa=True)
            np.testing.assert_allclose(w, oracle.weights(q, k), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("native", (1000, 1000)),
        ("native", (100_000, 1)),
        ("native", (1, 100_000)),
        ("python", (1, 1_000_000)),  # it loops over the batch, which takes it minutes
    ],
)
def test_a_million_tiny_problems(name, rng, shape):
    if name == "native" and _loader.why_not_native():
        pytest.skip("no native engine")
    q, k, v = normal(rng, (*shape, 1, 2)), normal(rng, (*shape, 3, 2)), normal(rng, (*shape, 3, 2))
    with qkv_fast.backend(name):
        out = sdpa(q, k, v)
    np.testing.assert_allclose(out, oracle.attention(q, k, v, real=np.float32)[0], atol=3e-6)


def test_a_million_packed_sequences(native, rng):
    count = 1_000_000
    ends = np.arange(count + 1)
    q, k, v = (normal(rng, (count, 1, 2)) for _ in range(3))
    np.testing.assert_array_equal(varlen_attention(q, k, v, ends), v)  # a key each
