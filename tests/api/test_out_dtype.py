"""out_dtype: results of 16-bit inputs that stay float32, in all functions that take it."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import assert_same, normal

from qkv_fast import KVCache, merge_attention, paged_attention, varlen_attention
from qkv_fast import scaled_dot_product_attention as sdpa

NARROW = [np.float16, ml_dtypes.bfloat16]
PAIRED = ("neonbf16", "avx512bf16", "amx")
LENGTHS = pytest.mark.parametrize("q_len", [1, 3, 70])


def make(rng: np.random.Generator, dtype: Any, q_len: int) -> list[np.ndarray]:
    return [normal(rng, (2, 4, n, 24), dtype) for n in (q_len, 90, 90)]


def assert_exact(engine: Any, wide: np.ndarray, q: Any, k: Any, v: Any, **options: Any) -> None:
    """Check a float32 result by the rule, also for tables that round the weights to bfloat16."""
    assert wide.dtype == np.float32
    exact, _ = oracle.attention(q, k, v, **options)
    plain, _ = oracle.attention(q, k, v, real=np.float32, **options)
    if q.dtype == ml_dtypes.bfloat16 and engine.isa in PAIRED:
        weights = oracle.weights(q, k, **options).astype(q.dtype)
        plain = weights.astype(float) @ v.astype(float)
    oracle.assert_error_at_most_twice(wide, plain.astype(np.float32), exact)


def assert_rounds_to(engine: Any, wide: np.ndarray, narrow: np.ndarray) -> None:
    """Check that a float32 result is what the usual one was rounded from."""
    if engine.engine == "python":  # it rounds to float16 from float64
        tolerance = 2 * float(ml_dtypes.finfo(narrow.dtype).eps)
        np.testing.assert_allclose(wide, narrow.astype(np.float32), rtol=tolerance, atol=1e-6)
    else:
        np.testing.assert_array_equal(wide.astype(narrow.dtype), narrow)


@LENGTHS
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "window": (40, 3)}], ids=str)
def test_dense(engine, rng, dtype, q_len, options):
    q, k, v = make(rng, dtype, q_len)
    wide, lse = sdpa(q, k, v, out_dtype="float32", return_lse=True, **options)
    assert_exact(engine, wide, q, k, v, **options)
    narrow, expected_lse = sdpa(q, k, v, return_lse=True, **options)
    assert_rounds_to(engine, wide, narrow)
    np.testing.assert_array_equal(lse, expected_lse)
    for threads in (1, 2):
        again = sdpa(q, k, v, out_dtype=np.float32, num_threads=threads, **options)
        np.testing.assert_array_equal(again, wide)
    tokens_first = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v)]
    laid_out = sdpa(*tokens_first, out_dtype="float32", **options)
    assert laid_out.swapaxes(1, 2).flags.c_contiguous
    np.testing.assert_allclose(laid_out, wide, rtol=1e-2, atol=1e-2)


@LENGTHS
@pytest.mark.parametrize("dtype", NARROW)
def test_packed_paged_and_cached(engine, rng, dtype, q_len):
    q, k, v = make(rng, dtype, q_len)
    table = np.arange(2 * 6).reshape(2, 6)[:, ::-1]
    pages = [np.zeros((12, 4, 16, 24), dtype) for _ in range(2)]
    cache = KVCache(2, 4, 90, 24, dtype=np.dtype(dtype).name, page_size=16)
    cache.append(k, v)
    for x, stored in zip((k, v), pages, strict=True):
        for i, j in np.ndindex(2, 6):
            rows = x[i, :, 16 * j : 16 * j + 16]
            stored[table[i, j], :, : rows.shape[1]] = rows
    packed = [np.concatenate(list(x.swapaxes(1, 2))) for x in (q, k, v)]
    starts = np.array([0, 1, 2])
    calls = (
        lambda **o: (
            varlen_attention(*packed, starts * q_len, starts * 90, **o)
            .reshape(2, q_len, 4, 24)
            .swapaxes(1, 2)
        ),
        lambda **o: paged_attention(q, *pages, table, [90, 90], **o),
        lambda **o: cache.attend(q, **o),
    )
    for call in calls:
        wide = call(out_dtype="float32")
        assert_exact(engine, wide, q, k, v)
        assert_rounds_to(engine, wide, call())


def test_stored_types_and_queries_may_differ(engine, rng):
    q, k, v = make(rng, np.float16, 2)
    cache = KVCache(2, 4, 90, 24, dtype="float64")
    cache.append(k, v)
    wide = cache.attend(q, out_dtype="float32")
    assert wide.dtype == np.float32
    exact, _ = oracle.attention(q, k, v)
    np.testing.assert_allclose(wide, exact, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", NARROW)
def test_parts_merge_without_rounding_to_16_bits(engine, rng, dtype):
    """The merged result of four parts is as exact as the whole, which float16 parts are not."""
    q, k, v = make(rng, dtype, 40)
    cuts = [slice(i, i + 30) for i in (0, 30, 60)]
    parts = [sdpa(q, k[:, :, at], v[:, :, at], return_lse=True, out_dtype="float32") for at in cuts]
    merged, _ = merge_attention(*zip(*parts, strict=True))
    assert_exact(engine, merged, q, k, v)
    name = np.dtype(dtype).name
    rounded, _ = merge_attention(*zip(*parts, strict=True), out_dtype=name)
    np.testing.assert_array_equal(rounded.view(dtype), merged.astype(dtype))


@pytest.mark.parametrize("q_len", [1, 40])
@pytest.mark.parametrize("dtype", NARROW)
def test_out(engine, rng, dtype, q_len):
    q, k, v = make(rng, dtype, q_len)
    expected = sdpa(q, k, v, out_dtype="float32")
    strided = np.empty((2, 4, q_len, 48), np.float32)[..., ::2]
    for out in (np.empty_like(expected), strided, np.empty_like(expected, ">f4")):
        assert sdpa(q, k, v, out=out, out_dtype="float32") is out
        np.testing.assert_array_equal(out, expected)
    memory = np.zeros(2 * q.size, dtype)
    over = memory[: q.size].reshape(q.shape)
    over[...] = q
    out = memory.view(np.float32).reshape(q.shape)  # over the query itself, twice as wide
    np.testing.assert_array_equal(sdpa(over, k, v, out=out, out_dtype="float32"), expected)


def test_the_own_type_changes_nothing(engine, rng):
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
        q, k, v = make(rng, dtype, 5)
        own = sdpa(q, k, v, out_dtype=np.dtype(dtype).name, return_lse=True)
        expected = sdpa(q, k, v, return_lse=True)
        if dtype is ml_dtypes.bfloat16:
            own, expected = ((x[0].view(np.uint16), x[1]) for x in (own, expected))
        assert_same(own, expected)
    bits = [x.view(np.uint16) for x in (q, k, v)]
    wide = sdpa(*bits, dtype="bfloat16", out_dtype="float32")
    np.testing.assert_array_equal(wide, sdpa(q, k, v, out_dtype="float32"))


@pytest.mark.parametrize(
    ("dtype", "given", "message"),
    [
        (np.float16, "bfloat16", "out_dtype is 'bfloat16': for query of float16 it must be "
                                 "'float32' or 'float16'"),
        (np.float16, "float64", "out_dtype is 'float64'"),
        (ml_dtypes.bfloat16, "float16", "for query of bfloat16 it must be 'float32' or 'bfloat16'"),
        (np.float32, "float16", "for query of float32 it must be 'float32'"),
        (np.float64, "float32", "for query of float64 it must be 'float64'"),
        (np.float32, 3, "out_dtype is 3: for query"),
        (np.float32, "int8", "out_dtype is 'int8': for query"),
    ],
)  # fmt: skip
def test_refused_types(rng, dtype, given, message):
    q, k, v = make(rng, dtype, 2)
    cache = KVCache(2, 4, 90, 24, dtype=np.dtype(dtype).name)
    cache.append(k, v)
    tables = np.zeros((2, 1), int), [1, 1]
    for call in (
        lambda: sdpa(q, k, v, out_dtype=given),
        lambda: varlen_attention(q[0], k[0, :, :2], v[0, :, :2], [0, 4], [0, 4], out_dtype=given),
        lambda: paged_attention(q, k, v, *tables, out_dtype=given),
        lambda: cache.attend(q, out_dtype=given),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_out_must_have_the_type_that_out_dtype_names(rng):
    q, k, v = make(rng, np.float16, 2)
    wide, narrow = np.empty(q.shape, np.float32), np.empty_like(q)
    with pytest.raises(TypeError, match="out has dtype float32: the result's dtype is float16"):
        sdpa(q, k, v, out=wide)
    with pytest.raises(TypeError, match="out has dtype float16: the result's dtype is float32"):
        sdpa(q, k, v, out=narrow, out_dtype="float32")


def test_tensors(engine, rng):
    torch = pytest.importorskip("torch")
    q, k, v = (torch.from_numpy(x).bfloat16() for x in make(rng, np.float32, 3))
    out = torch.empty(q.shape)
    assert sdpa(q, k, v, out=out, out_dtype=torch.float32) is out
    np.testing.assert_array_equal(out.numpy(), sdpa(q, k, v, out_dtype="float32"))
