"""Statements of docs/semantics.md, beside the page's own blocks: on each engine, by both paths.

Few rows are decoded and many are tiles of prefill, so most tests have both numbers of rows.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import make, normal, run_python

import qkv_fast
from qkv_fast import attention_weights, merge_attention, paged_attention, varlen_attention
from qkv_fast import scaled_dot_product_attention as sdpa

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
ROWS = [2, 70]  # decoded, tiles
BITS = {
    np.float32: (np.uint32, 23, 8),
    np.float64: (np.uint64, 52, 11),
    np.float16: (np.uint16, 10, 5),
    ml_dtypes.bfloat16: (np.uint16, 7, 8),
}


def nans(dtype: Any) -> np.ndarray:
    """Return NaNs of a type: quiet and signalling, with the smallest and largest payloads."""
    unsigned, mantissa, exponent = BITS[dtype]
    quiet = 1 << (mantissa - 1)
    endless = ((1 << exponent) - 1) << mantissa
    sign = 1 << (mantissa + exponent)
    bits = [endless | p for p in (quiet, quiet | 1, 2 * quiet - 1, 1, quiet - 1)]
    return np.array(bits + [b | sign for b in bits], unsigned).view(dtype)


def is_quiet(x: np.ndarray) -> np.ndarray:
    unsigned, mantissa, _ = BITS[next(t for t in BITS if np.dtype(t) == x.dtype)]
    return (np.ascontiguousarray(x).view(unsigned) >> (mantissa - 1) & 1) == 1


def isnan(x: np.ndarray) -> np.ndarray:
    return np.isnan(x.astype(np.float64))


# --- NaN ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_a_nan_of_any_payload_is_one(engine, rng, dtype, rows):
    """A NaN comes out where the table of the page says, and it is quiet."""
    q, k, v = make(rng, (1, 1, 1, rows, 70, 16, 16), dtype)
    clean = sdpa(q, k, v).astype(float)
    for nan in nans(dtype):
        for place, x in ("query", q), ("key", k), ("value", v):
            x = x.copy()
            x[0, 0, rows - 1 if place == "query" else 37, 5] = nan
            out = sdpa(*({"query": q, "key": k, "value": v} | {place: x}).values())
            expected = np.zeros(out.shape, bool)
            expected[{"query": np.s_[:, :, rows - 1], "key": np.s_[:],
                      "value": np.s_[..., 5]}[place]] = True  # fmt: skip
            np.testing.assert_array_equal(isnan(out), expected, place)
            assert is_quiet(out[expected]).all()
            # Columns of blocks with a NaN are summed by another kernel: rounding may differ.
            np.testing.assert_allclose(
                out[~expected].astype(float), clean[~expected], rtol=1e-2, atol=1e-2
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ["attn_mask", "attn_bias"])
def test_a_nan_in_a_mask_is_a_score(engine, rng, dtype, rows, name):
    q, k, v = make(rng, (1, 1, 1, rows, 70, 16, 16), np.float32)
    for nan in nans(dtype):
        added = np.zeros((rows, 70), dtype)
        added[rows - 1, 41] = nan
        out, lse = sdpa(q, k, v, **{name: added}, return_lse=True)
        assert np.isnan(out[0, 0, -1]).all()
        assert np.isnan(lse[0, 0, -1])
        assert np.isfinite(out[0, 0, :-1]).all()
        hidden = np.arange(70) != 41  # and what is excluded otherwise has none
        if name == "attn_bias":
            out = sdpa(q, k, v, hidden, attn_bias=added)
            assert np.isfinite(out).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("keys", [3, 40, 150])
def test_a_hidden_nan_in_a_bias_lifts_no_exclusion(engine, rows, keys):
    """Keys whose bias is -infinity stay excluded beside one whose bias is NaN."""
    q, k = np.ones((1, rows, 4), np.float32), np.ones((1, keys, 4), np.float32)
    for at in {0, 1, 8, 16, keys - 1}:
        if at >= keys:
            continue
        bias = np.zeros((rows, keys), np.float32)
        bias[:, at], bias[:, 2] = np.nan, -np.inf
        for hidden in ({"attn_mask": np.arange(keys) != at}, {"key_ranges": (at + 1, None)}):
            v = np.ones((1, keys, 4), np.float32)
            endless = np.where(np.isnan(bias), bias, -np.inf)
            out, lse = sdpa(q, k, v, attn_bias=endless, **hidden, return_lse=True)
            assert not out.any()
            assert (lse == -np.inf).all()
            v[0, 2] = np.nan
            out = sdpa(q, k, v, attn_bias=bias, **hidden)
            left = np.arange(keys) > at if "key_ranges" in hidden else np.arange(keys) != at
            left[2] = False
            np.testing.assert_allclose(out, np.full(out.shape, left.any()), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_excluded_nans_of_any_payload_change_no_bit(engine, rng, dtype, rows):
    q, k, v = make(rng, (1, 1, 1, rows, 70, 16, 16), dtype)
    hidden = np.arange(70) != 41
    options = [{"attn_mask": hidden}, {"key_lengths": 41}, {"key_ranges": (42, None)},
               {"attn_bias": np.where(hidden, np.float32(0), -np.inf)},
               {"window": (None, 0), "query_offset": 40 - (rows - 1)}]  # fmt: skip
    for given in options:
        clean = sdpa(q, k, v, **given)
        for nan in nans(dtype):
            spoiled_k, spoiled_v = k.copy(), v.copy()
            spoiled_k[..., 41, :], spoiled_v[..., 41, :] = nan, nan
            out = sdpa(q, spoiled_k, spoiled_v, **given)
            np.testing.assert_array_equal(out.view(np.uint8), clean.view(np.uint8))


def test_the_payload_of_a_value_may_change(engine):
    """What the page leaves open: not which NaN comes out, but that one does."""
    for dtype in DTYPES:
        for nan in nans(dtype):
            one, value = np.ones((1, 1), dtype), np.full((1, 1), nan)
            assert isnan(sdpa(one, one, value)).all()


# --- Infinities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_the_table_of_infinities(engine, dtype, rows):
    """Each line of the table of what is seen, in each element type, by decoding and by tiles."""
    inf = np.inf
    q = np.ones((1, rows, 1), dtype)

    def attend(keys: list[float], values: Any, **options: Any) -> np.ndarray:
        k = np.array(keys, dtype).reshape(1, -1, 1)
        v = np.array(values, dtype).reshape(1, len(keys), -1)
        out = sdpa(q, k, v, **options).astype(float)
        assert (out == out[:, :1]).all() or np.isnan(out).any()
        return out

    out = attend([0, 0], [[1, inf, -inf, inf], [3, 0, 0, -inf]])
    np.testing.assert_array_equal(out, np.broadcast_to([2, inf, -inf, np.nan], out.shape))
    assert np.isnan(attend([inf, 0], [1, 2])).all()
    assert (attend([-inf, 0], [1, 2]) == 2).all()
    weightless = -3e4  # exp of that is 0
    assert np.isnan(attend([weightless, 0], [inf, 2], scale=1.0)).all()
    assert (attend([weightless, 0], [9, 2], scale=1.0) == 2).all()
    assert np.isfinite(attend([inf, -inf], [1, 2], softcap=3.0)).all()
    capped = attend([inf, -inf], [1, 0], softcap=3.0)
    np.testing.assert_allclose(capped, 1 / (1 + np.exp(-6)), rtol=1e-2)
    assert (attend([0, 0], [1, 1], sinks=[-inf]) == 1).all()
    assert (attend([0, 0], [1, 1], sinks=[inf]) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_an_infinite_value_under_a_weight_that_is_lost(engine, many_cpus, dtype, rows):
    """The exact weight is positive, and 0 in the arithmetic: infinity or NaN, never a number."""
    q = np.ones((1, rows, 1), dtype)
    for keys in (2, 40, 700, 4500):
        # Scores rise, so the largest one does from block to block, all at once or by steps.
        for scores in (np.where(np.arange(keys) < keys - 1, -3000.0, 0.0),
                       np.linspace(-3000, 0, keys)):  # fmt: skip
            k = scores.astype(dtype).reshape(1, keys, 1)
            for at in {0, 1, keys // 2, keys - 2} - {keys - 1}:
                if k[0, at, 0] > (-800 if dtype == np.float64 else -110):
                    continue
                v = np.ones((1, keys, 3), dtype)
                v[0, at, 1:] = np.inf, -np.inf
                for seen in (None, np.arange(keys) != (at + 1) % keys):  # and with a hidden key
                    for threads in (1, 3):
                        out = sdpa(q, k, v, seen, scale=1.0, num_threads=threads).astype(float)
                        np.testing.assert_allclose(out[..., 0], 1, rtol=1e-2)
                        assert (np.isnan(out[..., 1]) | (out[..., 1] == np.inf)).all()
                        assert (np.isnan(out[..., 2]) | (out[..., 2] == -np.inf)).all()
    k, v = np.zeros((1, 70, 1), dtype), np.ones((1, 70, 1), dtype)
    for at in (0, 33, 69):  # a score of -infinity has no weight in any arithmetic
        k[:], v[:] = 0, 1
        k[0, at], v[0, at] = -np.inf, np.inf
        assert np.isnan(sdpa(q, k, v)).all()


@pytest.mark.parametrize("rows", ROWS)
def test_no_operation_warns(engine, rng, rows):
    """pytest makes errors of warnings; NumPy would warn of invalid operations."""
    q, k, v = make(rng, (1, 1, 1, rows, 70, 16, 16))
    k[0, 0, 3], v[0, 0, 4], q[0, 0, 0] = np.inf, -np.inf, np.nan
    with np.errstate(all="raise"):
        out = sdpa(q, k, v, sinks=[np.inf], softcap=3.0)
        attention_weights(q, k)
        merge_attention([out, out], [np.full((1, 1, rows), np.inf, "f4")] * 2)
    assert np.isnan(out[0, 0, 0]).all()


# --- Order of the modifiers -----------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_softcap_bounds_neither_alibi_nor_mask_nor_bias(engine, rng, dtype, rows):
    q, k, v = make(rng, (1, 1, 1, rows, 70, 16, 16), dtype)
    for options in (
        {"attn_mask": np.linspace(-300, 300, 70).astype(dtype)},
        {"attn_bias": np.linspace(-300, 300, 70).astype(dtype)},
        {"alibi_slopes": -5.0, "query_offset": -1000},
    ):
        out = sdpa(q, k, v, softcap=0.5, **options)
        # The last key has all the weight: a cap on the sum would share it among all of them.
        np.testing.assert_allclose(out, np.broadcast_to(v[:, :, -1:], out.shape), atol=0.1)


@pytest.mark.parametrize("rows", ROWS)
def test_a_sink_is_neither_scaled_nor_capped(engine, rows):
    q, k, v = (np.zeros((1, rows if i == 0 else 3, 4), "f4") + (i == 2) for i in range(3))
    out = sdpa(q, k, v, sinks=[50.0], scale=0.01, softcap=1.0)
    np.testing.assert_allclose(out, 3 / (3 + np.exp(50.0)), rtol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("keys", [3, 70, 300])
def test_a_mask_and_a_bias_below_the_lowest_number(engine, dtype, rows, keys):
    """Their sum is -infinity: no weight, but no exclusion either."""
    lowest = np.finfo(dtype).min
    q, k = np.ones((1, rows, 1), dtype), np.zeros((1, keys, 1), dtype)
    v = np.arange(keys, dtype=dtype).reshape(1, keys, 1) % 7
    for shape in ((keys,), (rows, keys)):
        for first, second in ((1, 1), (0.6, 0.6), (1, 0.1)):
            added = {"attn_mask": np.full(shape, first * lowest, dtype),
                     "attn_bias": np.full(shape, second * lowest, dtype)}  # fmt: skip
            out, lse = sdpa(q, k, v, **added, return_lse=True)
            assert np.isnan(out).all()
            assert (lse == -np.inf).all()
            weights = attention_weights(q, k, **added)
            assert np.isnan(weights).all()
            for x in added.values():  # beside another score
                x[..., 1] = 0
            out, lse = sdpa(q, k, v, **added, return_lse=True)
            assert (out == 1).all()
            assert (lse == 0).all()
            weights = attention_weights(q, k, **added)
            assert (weights == (np.arange(keys) == 1)).all()
            spoiled = v.copy()
            spoiled[0, 2] = np.inf  # it is seen, under a weight of 0
            assert np.isnan(sdpa(q, k, spoiled, **added)).all()
        # Sums down to ln 2 times the lowest number are kept, and what lies between is one of both.
        half = {name: np.full(shape, 0.34 * lowest, dtype) for name in added}
        out, lse = sdpa(q, k, v, **half, return_lse=True)
        np.testing.assert_allclose(out, v.mean(), rtol=1e-4)
        np.testing.assert_allclose(lse, 0.68 * lowest, rtol=1e-5)
        half["attn_bias"][...] = 0.6 * lowest
        out, lse = sdpa(q, k, v, **half, return_lse=True)
        kept = np.isclose(out, v.mean(), rtol=1e-4) & np.isclose(lse, 0.94 * lowest)[..., None]
        assert (kept | np.isnan(out) & (lse == -np.inf)[..., None]).all()
        # A score is part of the sum.
        out, lse = sdpa(q, k + dtype(0.6) * lowest, v, added["attn_mask"] * 0 + lowest, scale=1.0,
                        return_lse=True)  # fmt: skip
        assert np.isnan(out).all()
        assert (lse == -np.inf).all()


# --- Zeros and subnormal numbers ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("keys", [1, 16, 70, 300])
def test_a_mean_of_zeros_is_positive(engine, rng, dtype, rows, keys):
    q, k, _ = make(rng, (1, 2, 2, rows, keys, 16, 16), dtype)
    v = np.full((1, 2, keys, 20), -0.0, dtype)
    some = np.arange(keys) % 2 == 0
    for options in ({}, {"attn_mask": some}, {"is_causal": True, "query_offset": -1},
                    {"sinks": [np.inf, 0.0]}, {"key_lengths": 0}):  # fmt: skip
        out = sdpa(q, k, v, **options).astype(float)
        assert not out.any()
        assert not np.signbit(out).any(), options
    assert not np.signbit(attention_weights(q, k, some)).any()


@pytest.mark.parametrize("rows", ROWS)
def test_a_mean_of_zeros_is_positive_in_pages_packed_tokens_and_caches(engine, rng, rows):
    q = normal(rng, (1, 2, rows, 8))
    k, v = normal(rng, (5, 2, 16, 8)), np.full((5, 2, 16, 8), -0.0, np.float32)
    paged = paged_attention(q, k, v, np.arange(5)[np.newaxis], 75)
    packed = varlen_attention(q[0].swapaxes(0, 1), k[0].swapaxes(0, 1), v[0].swapaxes(0, 1),
                              [0, rows], [0, 16])  # fmt: skip
    cache = qkv_fast.KVCache(1, 2, 40, 8, dtype="int8")
    cache.append(k[:1], v[:1])
    for out in (paged, packed, cache.attend(q)):
        assert not out.any()
        assert not np.signbit(out).any()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_subnormal_values_and_keys_are_kept(engine, rows, dtype):
    tiny = np.finfo(dtype).smallest_subnormal
    counts = np.arange(1, 6).reshape(1, 1, 5)
    v = np.broadcast_to((counts * 40 * tiny).astype(dtype), (1, 300, 5))
    q, k = np.ones((1, rows, 4), dtype), np.ones((1, 300, 4), dtype)
    out = sdpa(q, k, v)
    np.testing.assert_array_equal(out, np.broadcast_to(v[:, :1], out.shape))
    if dtype != np.float16:
        keys = np.zeros((1, 2, 4), dtype)  # the product of a large query and a subnormal key
        keys[0, 1] = 1000 * tiny
        big = q * dtype(np.finfo(dtype).max / 1e9)
        scores = attention_weights(big, keys, stage="scaled", scale=1.0)
        expected = big.astype(float) @ keys.astype(float).swapaxes(1, 2)
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("dtype", "least"), [(np.float32, -126), (np.float64, -1022)])
def test_weights_below_the_normal_numbers_may_be_0(engine, rows, dtype, least):
    """And those above are not."""
    bits = np.arange(4, -least + 40, 3).astype(dtype)  # so many halvings of the largest weight
    keys = np.concatenate([[0], -np.log(2) * bits]).astype(dtype).reshape(1, -1, 1)
    w = attention_weights(np.ones((1, rows, 1), dtype), keys, scale=1.0)[..., 1:]
    exact = np.exp(keys.astype(float)[0, 1:, 0])
    exact = exact / (1 + exact.sum())
    kept = bits < -least - 2
    np.testing.assert_allclose(w[..., kept], np.broadcast_to(exact[kept], w[..., kept].shape),
                               rtol=np.finfo(dtype).eps * 4000)  # fmt: skip
    assert (w >= 0).all()
    assert (w[..., bits > -least + 2] < 2.0 ** (least + 1)).all()


# --- Huge and equal scores ------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_largest_finite_scores(engine, rows, dtype):
    """Scores up to half the largest number overflow nothing; all weight goes to the largest."""
    largest = float(np.finfo(dtype).max)
    q = np.ones((1, rows, 1), dtype)
    for factor in (0.4, -0.4):
        k = np.array([factor * largest, 0, -factor * largest], dtype).reshape(1, 3, 1)
        v = np.array([1, 2, 3], dtype).reshape(1, 3, 1)
        out, lse = sdpa(q, k, v, scale=1.0, return_lse=True)
        assert (out == (1 if factor > 0 else 3)).all()
        np.testing.assert_allclose(lse, 0.4 * largest, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("score", [0.0, 1.0, -200.0, 200.0])
def test_equal_scores_share_the_weight_equally(engine, rows, dtype, score):
    q = np.ones((1, rows, 1), dtype)
    k = np.full((1, 256, 1), score, dtype)
    v = np.broadcast_to(np.arange(256, dtype=np.float64) % 8, (1, 1, 256)).swapaxes(1, 2)
    out, lse = sdpa(q, k, v.astype(dtype), scale=1.0, return_lse=True)
    np.testing.assert_allclose(out.astype(float), 3.5, rtol=1e-6 if dtype == np.float32 else 1e-2)
    np.testing.assert_allclose(lse, score + np.log(256), rtol=1e-6)
    w = attention_weights(q, k, scale=1.0)
    assert (w == w.flat[0]).all()


@pytest.mark.parametrize("rows", ROWS)
def test_a_scale_of_0_and_a_negative_one(engine, rng, rows):
    q, k, v = make(rng, (1, 1, 1, rows, 70, 16, 16))
    out = sdpa(q, k, v, scale=0.0)
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(2, keepdims=True), out.shape), atol=1e-6)
    np.testing.assert_allclose(sdpa(q, k, v, scale=-0.3), sdpa(-q, k, v, scale=0.3), atol=1e-6)
    oracle.assert_close(sdpa(q, k, v, scale=-0.7), q, k, v, scale=-0.7)


# --- Floating point modes -------------------------------------------------------------------------

ROUNDING, FLUSH, FLAGS = 0x6000, 0x8040, 0x3F  # bits of MXCSR


@contextlib.contextmanager
def mxcsr(bits: int) -> Iterator[Any]:
    """Set bits of this thread's MXCSR; yield what reads the register."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("reads MXCSR from glibc's fenv_t of x86-64")
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("reads MXCSR from glibc's fenv_t")
    libm = ctypes.CDLL("libm.so.6")
    before = (ctypes.c_uint32 * 16)()
    libm.fegetenv(before)
    changed = (ctypes.c_uint32 * 16)(*before)
    changed[7] = changed[7] & ~(ROUNDING | FLUSH) | bits

    def read() -> int:
        now = (ctypes.c_uint32 * 16)()
        libm.fegetenv(now)
        return int(now[7])

    libm.fesetenv(changed)
    try:
        yield read
    finally:
        libm.fesetenv(before)


MODES = [0, FLUSH, 0x2000, 0x4000, 0x6000]  # and rounding down, up and towards 0


def test_modes_are_as_the_call_found_them(engine, rng, many_cpus):
    q, k, v = make(rng, (4, 8, 8, 70, 130, 16, 16))
    for bits in MODES:
        cache = qkv_fast.KVCache(4, 8, 200, 16)
        with mxcsr(bits) as read:
            before = read() & ~FLAGS
            for threads in (1, 3):
                out, lse = sdpa(q, k, v, return_lse=True, num_threads=threads)
                merge_attention([out, out], [lse, lse], num_threads=threads)
                attention_weights(q, k, num_threads=threads)
                sdpa(q[:, :, :1], k, v, num_threads=threads)
            cache.append(k, v)
            cache.attend(q[:, :, :1], num_threads=threads)
            after = read() & ~FLAGS
        assert after == before, hex(bits)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_modes_of_the_caller_change_no_bit(engine, rng, many_cpus, dtype):
    """The native engine computes in the default modes, whatever the calling thread has set."""
    if engine.engine == "python":
        pytest.skip("NumPy computes in the modes of the thread")
    for rows in ROWS:
        q, k, v = make(rng, (2, 8, 8, rows, 130, 16, 16), dtype)  # the scale, 1/4, is exact
        v *= dtype(4 * np.finfo(dtype).smallest_normal)  # so that means are subnormal
        expected = sdpa(q, k, v)
        assert (np.abs(expected) < np.finfo(dtype).smallest_normal).any()
        for bits in MODES:
            for threads in (1, 3):
                with mxcsr(bits):
                    out = sdpa(q, k, v, num_threads=threads)
                np.testing.assert_array_equal(out.view(np.uint8), expected.view(np.uint8))


POOL_MADE_WHILE_FLUSHING = """
import ctypes, numpy as np, qkv_fast
from qkv_fast import _loader
_loader.native_module().assume_cpus(4)
x = np.random.default_rng(0).standard_normal((3, 8, 8, 70, 32)).astype("f4")
q, k, v = x[0], x[1], x[2] * np.float32(2e-38)
libm = ctypes.CDLL("libm.so.6")
env = (ctypes.c_uint32 * 16)()
libm.fegetenv(env)
flushing = (ctypes.c_uint32 * 16)(*env)
flushing[7] |= 0x8040
libm.fesetenv(flushing)
first = qkv_fast.scaled_dot_product_attention(q, k, v, num_threads=4)  # makes the threads
libm.fesetenv(env)
many = qkv_fast.scaled_dot_product_attention(q, k, v, num_threads=4)
one = qkv_fast.scaled_dot_product_attention(q, k, v, num_threads=1)
print((one == many).all(), (one == first).all(), (abs(one) < 1.1e-38).sum() > 1000)
"""


def test_threads_that_were_made_while_subnormals_were_flushed(native):
    """A new thread inherits the modes of its maker, and keeps them."""
    with mxcsr(0):
        pass
    done = run_python(POOL_MADE_WHILE_FLUSHING)
    assert done.stdout.split() == ["True"] * 3, done.stderr
