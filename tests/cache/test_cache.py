"""KVCache against a model of it in NumPy, which holds an array of rows for each sequence."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import normal

import qkv_fast
from qkv_fast import KVCache
from qkv_fast import scaled_dot_product_attention as sdpa
from qkv_fast._dtypes import quantize

STORED = {"float32": np.float32, "float64": np.float64, "float16": np.float16,
          "bfloat16": ml_dtypes.bfloat16}  # fmt: skip
HKV, GROUP, D, DV = 2, 3, 12, 9


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """Return (Hkv, n, D) as the cache stores it, in float64."""
    if dtype == "int8":
        rows, scales = quantize(x.astype(np.float32))
        return rows * scales[..., None].astype(float)
    return x.astype(STORED[dtype]).astype(float)


class Model:
    """The keys and values of each sequence, (Hkv, n, D) and (Hkv, n, Dv) in float64."""

    def __init__(self, batch: int, dtype: str) -> None:
        self.dtype = dtype
        self.rows = [(np.zeros((HKV, 0, D)), np.zeros((HKV, 0, DV))) for _ in range(batch)]

    @property
    def lengths(self) -> list[int]:
        return [k.shape[1] for k, _ in self.rows]

    def append(self, i: int, k: np.ndarray, v: np.ndarray) -> None:
        new = (rounded(x, self.dtype) for x in (k, v))
        self.rows[i] = tuple(
            np.concatenate([old, x], 1) for old, x in zip(self.rows[i], new, strict=True)
        )

    def truncate(self, i: int, n: int) -> None:
        self.rows[i] = tuple(x[:, :n] for x in self.rows[i])

    def attend(self, i: int, q: np.ndarray, **options: Any) -> np.ndarray:
        k, v = self.rows[i]
        return oracle.attention(q, k, v, query_offset=k.shape[1] - q.shape[1], **options)[0]


def check_pages(cache: KVCache) -> None:
    """Check that each page is either free or used, and that it counts its users right."""
    table = cache.block_table
    taken = np.unique(table[table >= 0])
    assert len(taken) + cache.free_pages == cache.num_pages
    assert not set(taken) & set(cache._pool.free)
    assert len(set(cache._pool.free)) == cache.free_pages
    counts = np.bincount(table[table >= 0], minlength=cache.num_pages)
    np.testing.assert_array_equal(counts, cache._pool.uses)


SOAKS = [("float32", None, None), ("float32", 1, None), ("float32", 16, None), ("float64", 5, None),
         ("float16", 8, None), ("bfloat16", 16, None), ("bfloat16", None, None),
         ("int8", None, None), ("int8", 7, None), ("float32", 4, 10)]  # fmt: skip


@pytest.mark.parametrize(("dtype", "page_size", "window"), SOAKS)
def test_random_steps_agree_with_the_model(dtype, page_size, window):
    """Each case makes 1000 random steps, on the engine that the environment chooses."""
    rng = np.random.default_rng(7)
    batch, capacity = 4, 90
    pages = None if page_size is None else 3 * capacity // page_size
    cache = KVCache(batch, HKV, capacity, D, DV, dtype=dtype, page_size=page_size,
                    num_pages=pages, window=window)  # fmt: skip
    model = Model(batch, dtype)
    # Where the last append to a sequence began: a window may have dropped keys before that.
    kept = [0] * batch
    refused = 0
    for _ in range(1000):
        step = rng.choice(["append", "append", "attend", "attend", "truncate", "fork", "reorder",
                           "reset"], p=[0.3, 0.15, 0.2, 0.1, 0.1, 0.08, 0.06, 0.01])  # fmt: skip
        if step == "append":
            some = rng.permutation(batch)[: rng.integers(1, batch + 1)]
            counts = rng.integers(0, rng.choice([2, 20]), len(some))
            new = max(1, counts.max(initial=0))
            k = rng.standard_normal((len(some), HKV, new, D))
            v = rng.standard_normal((len(some), HKV, new, DV))
            before = cache.lengths, cache.block_table, cache.free_pages
            wrong: Exception | None = None
            try:
                cache.append(k, v, sequences=some, counts=counts)
            except (ValueError, MemoryError) as error:
                wrong = error
            if wrong is not None:
                refused += 1
                too_long = (before[0][some] + counts > capacity).any()
                assert isinstance(wrong, ValueError if too_long else MemoryError)
                for now, then in zip((cache.lengths, cache.block_table, cache.free_pages), before,
                                     strict=True):  # fmt: skip
                    np.testing.assert_array_equal(now, then)
                cache.reset(sequences=[some[0]])
                model.truncate(some[0], 0)
                kept[some[0]] = 0
                continue
            for j, i in enumerate(some):
                if counts[j]:
                    kept[i] = model.lengths[i]
                model.append(i, k[j, :, : counts[j]], v[j, :, : counts[j]])
        elif step == "truncate":
            i = int(rng.integers(batch))
            low = 0 if window is None else kept[i]
            n = int(rng.integers(low, model.lengths[i] + 1)) if model.lengths[i] >= low else low
            cache.truncate(n, sequences=i)
            model.truncate(i, n)
        elif step == "fork":
            i, j = rng.integers(batch, size=2)
            low = 0 if window is None else kept[i]
            n = int(rng.integers(low, model.lengths[i] + 1))
            cache.fork(i, j, n)
            model.rows[j] = model.rows[i]
            model.truncate(j, n)
            kept[j] = kept[i]
        elif step == "reorder":
            index = rng.integers(batch, size=batch)
            cache.reorder(index)
            model.rows = [model.rows[i] for i in index]
            kept = [kept[i] for i in index]
        elif step == "reset":
            cache.reset()
            model = Model(batch, dtype)
            kept = [0] * batch
        else:
            some = rng.permutation(batch)[: rng.integers(1, batch + 1)]
            most = 6
            if window is not None:
                most = min(model.lengths[i] - kept[i] for i in some)
                if most < 1:
                    continue
            q_len = int(rng.integers(1, min(6, most) + 1))
            q = normal(rng, (len(some), HKV * GROUP, q_len, D))
            options: dict[str, Any] = {"is_causal": bool(rng.integers(2))}
            out = cache.attend(q, sequences=some, **options)
            if window is not None:
                options["window"] = (window, None)
            for j, i in enumerate(some):
                np.testing.assert_allclose(
                    out[j], model.attend(i, q[j].astype(float), **options), rtol=1e-5, atol=2e-6
                )
        assert cache.lengths.tolist() == model.lengths
        if page_size is not None:
            check_pages(cache)
    assert refused > 0
    cache.reset()
    if page_size is not None:
        assert cache.free_pages == cache.num_pages


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("dtype", [*STORED, "int8"])
def test_prefill_and_decode(engine, rng, dtype, page_size):
    cache = KVCache(2, HKV, 60, D, DV, dtype=dtype, page_size=page_size)
    model = Model(2, dtype)
    for new in (33, 1, 1, 5):
        k, v = normal(rng, (2, HKV, new, D)), normal(rng, (2, HKV, new, DV))
        q = normal(rng, (2, HKV * GROUP, new, D))
        assert cache.append(k, v) is None
        out, lse = cache.attend(q, is_causal=True, return_lse=True)
        assert out.dtype == np.float32
        for i in range(2):
            model.append(i, k[i], v[i])
            exact = model.attend(i, q[i].astype(float), is_causal=True)
            np.testing.assert_allclose(out[i], exact, rtol=1e-5, atol=2e-6)
        assert lse.shape == out.shape[:-1]
    assert cache.lengths.tolist() == [40, 40]


@pytest.mark.parametrize("dtype", [*STORED, "int8"])
@pytest.mark.parametrize("new", [1, 20])
def test_attending_to_some_sequences_changes_no_bit(engine, rng, dtype, new):
    """A cache without pages is read as dense arrays for all sequences, and as pages for some."""
    cache = KVCache(3, HKV, 40, D, DV, dtype=dtype)
    cache.append(normal(rng, (3, HKV, 33, D)), normal(rng, (3, HKV, 33, DV)), counts=[33, 5, 24])
    q = normal(rng, (3, HKV * GROUP, new, D))
    everything = cache.attend(q)
    np.testing.assert_array_equal(cache.attend(q[[2, 0]], sequences=[2, 0]), everything[[2, 0]])


def test_attend_equals_the_function_with_lengths_and_offsets(engine, rng):
    cache = KVCache(3, HKV, 30, D)
    k, v = (normal(rng, (3, HKV, 20, D)) for _ in range(2))
    cache.append(k, v, counts=[20, 4, 11])
    q = normal(rng, (3, HKV * GROUP, 3, D))
    options: dict[str, Any] = {"softcap": 3.0, "alibi_slopes": 0.1, "sinks": np.linspace(-1, 1, 6),
                               "window": (8, 1), "scale": 0.4}  # fmt: skip
    for causal in (False, True):
        np.testing.assert_allclose(
            cache.attend(q, is_causal=causal, **options),
            sdpa(q, k, v, is_causal=causal, enable_gqa=True, key_lengths=[20, 4, 11],
                 query_offset=[17, 1, 8], **options), rtol=1e-5, atol=1e-6,
        )  # fmt: skip
    mask = rng.random((3, 1, 3, 20)) > 0.3
    np.testing.assert_allclose(
        cache.attend(q, mask),
        sdpa(q, k, v, mask, enable_gqa=True, key_lengths=[20, 4, 11]), rtol=1e-5, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("page_size", [None, 8])
@pytest.mark.parametrize("new", [1, 3])
def test_a_bias_beside_a_mask(engine, rng, page_size, new):
    cache = KVCache(3, HKV, 30, D, page_size=page_size)
    k, v = (normal(rng, (3, HKV, 20, D)) for _ in range(2))
    cache.append(k, v, counts=[20, 4, 11])
    q, bias = normal(rng, (3, HKV * GROUP, new, D)), normal(rng, (3, HKV * GROUP, new, 20))
    mask = rng.random((3, 1, new, 20)) > 0.3
    for given in (None, mask):
        exact, _ = oracle.attention(
            q, k, v, attn_mask=given, attn_bias=bias, key_lengths=[20, 4, 11]
        )
        out = cache.attend(q, given, attn_bias=bias)
        np.testing.assert_allclose(out, exact, rtol=1e-5, atol=2e-6)


def test_the_error_of_int8_is_bounded(engine, rng):
    """The error of an element is at most 1/254 of the largest magnitude in its row."""
    k, v = normal(rng, (1, HKV, 200, 64)), normal(rng, (1, HKV, 200, 64))
    k[0, 0, 5] = 0
    k[0, 1, 6] *= 1e30
    k[0, 1, 7] *= 1e-30
    rows, scales = quantize(k)
    off = np.abs(rows * scales[..., None].astype(float) - k)
    assert (off <= np.abs(k).max(-1, keepdims=True).astype(float) / 254 * 1.00001).all()
    k[0, 1, 6] /= 1e30
    cache = KVCache(1, HKV, 200, 64, dtype="int8")
    cache.append(k, v)
    q = normal(rng, (1, HKV * GROUP, 1, 64))
    exact, _ = oracle.attention(q, k, v)
    error = np.abs(cache.attend(q) - exact)
    assert error.max() < 0.02 * np.abs(exact).max()
    assert np.sqrt((error**2).mean()) < 0.01 * np.sqrt((exact**2).mean())


def test_from_arrays_shares_their_memory(engine, rng):
    k, v = normal(rng, (2, HKV, 50, D)), normal(rng, (2, 50, HKV, DV)).swapaxes(1, 2)
    cache = KVCache.from_arrays(k, v, [10, 30])
    q = normal(rng, (2, HKV * GROUP, 1, D))
    expected = sdpa(q, k, v, enable_gqa=True, key_lengths=[10, 30])
    np.testing.assert_allclose(cache.attend(q), expected, rtol=1e-5, atol=1e-6)
    new = normal(rng, (2, HKV, 2, D)), normal(rng, (2, HKV, 2, DV))
    cache.append(*new)
    np.testing.assert_array_equal(k[0, :, 10:12], new[0][0])
    np.testing.assert_array_equal(v[1, :, 30:32], new[1][1])
    k[:, :, 40], v[:, :, 40] = 5, 6  # a token that the owner of the arrays wrote
    cache.truncate(0)
    cache.extend([41, 1])
    assert cache.lengths.tolist() == [41, 1]
    keys, values = cache.views(0, 40)[0]
    assert (keys == 5).all()
    assert (values == 6).all()
    assert np.shares_memory(keys, k)


@pytest.mark.parametrize("page_size", [None, 4])
def test_views_are_of_the_stored_tokens(rng, page_size):
    cache = KVCache(2, HKV, 20, D, page_size=page_size)
    k, v = (normal(rng, (2, HKV, 9, D)) for _ in range(2))
    cache.append(k, v)
    pairs = cache.views(1, 2, 7)
    np.testing.assert_array_equal(np.concatenate([a for a, _ in pairs], 1), k[1, :, 2:7])
    np.testing.assert_array_equal(np.concatenate([b for _, b in pairs], 1), v[1, :, 2:7])
    cache.extend(3, sequences=[0])
    for keys, values in cache.views(0, 9):
        keys[...], values[...] = 1.5, 2.5
    q = normal(rng, (1, HKV, 1, D))
    want = sdpa(
        q, np.concatenate([k[:1], np.full((1, HKV, 3, D), 1.5, "f4")], 2),
        np.concatenate([v[:1], np.full((1, HKV, 3, D), 2.5, "f4")], 2),
    )  # fmt: skip
    np.testing.assert_allclose(cache.attend(q, sequences=0), want, rtol=1e-5, atol=1e-6)


def test_a_fork_shares_pages_until_an_append(rng):
    cache = KVCache(3, HKV, 40, D, page_size=8)
    k, v = (normal(rng, (1, HKV, 20, D)) for _ in range(2))
    cache.append(k, v, sequences=0)
    assert cache.num_pages - cache.free_pages == 3
    cache.fork(0, 1)
    cache.fork(0, 2, 16)
    assert cache.num_pages - cache.free_pages == 3
    # Copies the page that both sequences have begun.
    cache.append(k[:, :, :1], v[:, :, :1], sequences=1)
    assert cache.num_pages - cache.free_pages == 4
    # Ends at the end of a page: nothing to copy.
    cache.append(k[:, :, :1], v[:, :, :1], sequences=2)
    assert cache.num_pages - cache.free_pages == 5
    np.testing.assert_array_equal(cache.views(0, 16)[0][0], k[0, :, 16:20])
    check_pages(cache)


def test_a_window_returns_pages_that_no_query_can_see(engine, rng):
    window, n = 40, 1000
    cache = KVCache(1, HKV, n, D, page_size=8, window=window, num_pages=8)
    k, v = (normal(rng, (1, HKV, n, D)) for _ in range(2))
    q = normal(rng, (1, HKV, n, D))
    whole = sdpa(q, k, v, is_causal=True, window=(window, 0))
    at = 0
    while at < n:
        new = min(int(rng.integers(1, 12)), n - at)
        some = slice(at, at + new)
        cache.append(k[:, :, some], v[:, :, some])
        out = cache.attend(q[:, :, some], is_causal=True)
        np.testing.assert_allclose(out, whole[:, :, some], rtol=1e-5, atol=1e-6)
        at += new
    assert int(cache.lengths[0]) == n
    with pytest.raises(ValueError, match="given back"):
        cache.attend(q[:, :, :100])
    with pytest.raises(ValueError, match="given back"):
        cache.truncate(n - 50)
    cache.truncate(0)
    assert cache.free_pages == cache.num_pages


def test_the_default_pool_of_a_window_is_small(rng):
    cache = KVCache(2, HKV, 100_000, D, window=100)
    assert cache.page_size == 64
    k = np.zeros((2, HKV, 512, D), np.float32)
    for _ in range(20):  # the window begins at another place in its page each time
        cache.append(k, k)
        cache.append(k[:, :, :3], k[:, :, :3])
    assert cache.key_pages.nbytes < 2 * HKV * 1000 * D * 4


def test_bit_patterns_are_bfloat16(engine, rng):
    k, v = (normal(rng, (1, HKV, 9, D), ml_dtypes.bfloat16) for _ in range(2))
    q = normal(rng, (1, HKV, 1, D), ml_dtypes.bfloat16)
    caches = [KVCache(1, HKV, 10, D, dtype="bfloat16") for _ in range(2)]
    caches[0].append(k, v)
    caches[1].append(k.view(np.uint16), v.view(np.uint16))
    a, b = caches[0].attend(q), caches[1].attend(q.view(np.uint16))
    assert a.dtype == ml_dtypes.bfloat16
    assert b.dtype == np.uint16
    np.testing.assert_array_equal(a.view(np.uint16), b)
    assert KVCache(1, 1, 1, 1, dtype=ml_dtypes.bfloat16).key_pages.dtype == np.uint16


def full(**options: Any) -> KVCache:
    cache = KVCache(2, 1, 4, 3, **options)
    cache.append(np.ones((2, 1, 3, 3), "f4"), np.ones((2, 1, 3, 3), "f4"))
    return cache


ONE = np.ones((2, 1, 1, 3), np.float32)
REFUSED: list[tuple[type[Exception], str, Any]] = [
    (ValueError, "2 more exceed the cache's capacity of 4",
     lambda c: c.append(ONE.repeat(2, 2), ONE.repeat(2, 2))),
    (ValueError, r"key has shape \(2, 1, 1, 2\): it must be \(2, 1, 1, 3\)",
     lambda c: c.append(ONE[..., :2], ONE)),
    (ValueError, "value has shape", lambda c: c.append(ONE, ONE[:, :, :0])),
    (ValueError, "key has shape", lambda c: c.append(ONE[0], ONE)),
    (TypeError, "key has dtype int64", lambda c: c.append(ONE.astype(int), ONE)),
    (TypeError, "value has dtype int8", lambda c: c.append(ONE, ONE.astype("i1"))),
    (ValueError, "counts holds", lambda c: c.append(ONE, ONE, counts=[2, 0])),
    (TypeError, "counts must be an int", lambda c: c.append(ONE, ONE, counts=0.5)),
    (ValueError, "counts has shape", lambda c: c.append(ONE, ONE, counts=[0, 1, 0])),
    (ValueError, "none may come twice", lambda c: c.append(ONE, ONE, sequences=[0, 0])),
    (ValueError, "sequences holds 2: each must be from 0 to 1", lambda c: c.reset(sequences=2)),
    (TypeError, "sequences must be ints, not a float", lambda c: c.reset(sequences=0.5)),
    (ValueError, "lengths holds .4, 4.", lambda c: c.truncate(4)),
    (ValueError, "lengths holds -1", lambda c: c.truncate(-1)),
    (ValueError, "indices has length 1", lambda c: c.reorder([0])),
    (ValueError, "indices holds", lambda c: c.reorder([0, 2])),
    (ValueError, "length is 4, but sequence 0 has 3", lambda c: c.fork(0, 1, 4)),
    (ValueError, "counts holds", lambda c: c.extend(-1)),
    (ValueError, "counts holds 9223372036854775807", lambda c: c.extend(2**63 - 1)),
    (ValueError, "sequence 1 has 3 tokens, and 2 more exceed", lambda c: c.extend([1, 2])),
    (ValueError, "counts holds 18446744073709551615",
     lambda c: c.extend(np.array([1, 2**64 - 1], np.uint64))),
    (ValueError, "counts holds 1180591620717411303424", lambda c: c.extend([0, 2**70])),
    (ValueError, "counts holds 9223372036854775808", lambda c: c.append(ONE, ONE, counts=2**63)),
    (ValueError, r"counts is \[\[1\], \[1, 2\]\]: its rows", lambda c: c.extend([[1], [1, 2]])),
    (ValueError, r"sequences is \[0, \[1\]\]: its rows", lambda c: c.reset(sequences=[0, [1]])),
    (ValueError, "sequences holds 1180591620717411303424", lambda c: c.reset(sequences=2**70)),
    (ValueError, r"lengths is \[0, \[1\]\]: its rows", lambda c: c.truncate([0, [1]])),
    (ValueError, "lengths holds 1180591620717411303424", lambda c: c.truncate(2**70)),
    (ValueError, r"indices is \[0, \[1\]\]: its rows", lambda c: c.reorder([0, [1]])),
    (ValueError, "source is 2: it must be at most 1", lambda c: c.fork(2, 0)),
    (ValueError, "target is -1: it must be at least 0", lambda c: c.fork(0, -1)),
    (TypeError, "source is 0.5: it must be an int", lambda c: c.fork(0.5, 0)),
    (TypeError, "target is None: it must be an int", lambda c: c.fork(0, None)),
    (ValueError, "length is 1180591620717411303424, but", lambda c: c.fork(0, 1, 2**70)),
    (ValueError, "sequence is 5: it must be at most 1", lambda c: c.views(5)),
    (ValueError, r"key has shape \(2, 1, 3\), 3 axes: it must have 4, \(sequences, Hkv",
     lambda c: c.append(ONE[:, :, 0], ONE[:, :, 0])),
    (ValueError, "value has shape .*, 5 axes", lambda c: c.append(ONE, ONE[None])),
    (TypeError, "window is 1: it must be a pair", lambda c: c.attend(ONE, window=1)),
    (TypeError, "window's left side is 'a'", lambda c: c.attend(ONE, window="ab")),
    (TypeError, "window's left side is 5000.5", lambda c: c.attend(ONE, window=(5000.5, 0))),
    (ValueError, "window's right side is -1", lambda c: c.attend(ONE, window=(0, -1))),
    (ValueError, r"as mask\[:, None, None\]$", lambda c: c.attend(ONE.repeat(3, 2),
                                                                  np.ones((2, 3), bool))),
    (ValueError, "exceed the cache's capacity", lambda c: c.extend(2)),
    (ValueError, "query has shape", lambda c: c.attend(ONE[0])),
    (ValueError, "first axis stands for 2", lambda c: c.attend(np.concatenate([ONE, ONE, ONE]))),
    (ValueError, "multiple", lambda c: KVCache(2, 2, 4, 3).attend(np.ones((2, 3, 1, 3), "f4"))),
]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"page_size": 2}, {"page_size": 2, "window": 3}], ids=str)
@pytest.mark.parametrize(("error", "message", "wrong"), REFUSED)
def test_refusals_change_nothing(options, error, message, wrong):
    cache = full(**options)
    table, free = cache.block_table, cache.free_pages
    with pytest.raises(error, match=message):
        wrong(cache)
    assert cache.lengths.tolist() == [3, 3]
    assert cache.free_pages == free
    np.testing.assert_array_equal(cache.block_table, table)
    assert (cache.views(0)[0][0] == 1).all()


def test_an_exhausted_pool_raises_and_changes_nothing():
    cache = KVCache(2, 1, 8, 3, page_size=2, num_pages=3)
    cache.append(ONE.repeat(2, 2), ONE.repeat(2, 2))
    with pytest.raises(MemoryError, match="2 pages are needed, but 1 of 3 are free"):
        cache.append(ONE, ONE)
    cache.append(ONE, ONE, counts=[1, 0])
    assert cache.lengths.tolist() == [3, 2]
    assert cache.free_pages == 0


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "capacity is 0", {"capacity": 0}),
        (TypeError, "head_dim is 1.5: it must be an int", {"head_dim": 1.5}),
        (TypeError, "batch is True: it must be an int", {"batch": True}),
        (ValueError, "dtype is 'int4': it must be one of", {"dtype": "int4"}),
        (ValueError, "page_size is 0", {"page_size": 0}),
        (ValueError, "num_pages is 3, but there is no page_size", {"num_pages": 3}),
        (ValueError, "window is -1", {"window": -1}),
        (TypeError, "window is 1.5: it must be an int", {"window": 1.5}),
        (TypeError, "dtype is None: it must be one of", {"dtype": None}),
        (TypeError, "dtype is 3: it must be one of", {"dtype": 3}),
        (TypeError, r"dtype is an array of float32 of shape \(2, 1, 1, 3\)", {"dtype": ONE}),
        (ValueError, "dtype is <class 'numpy.int64'>: it must be", {"dtype": np.int64}),
        *[
            (
                ValueError,
                f"{name} is 1180591620717411303424: it must be at most 922337203",
                {"page_size": 1} | {name: 2**70},
            )
            for name in (
                "batch",
                "num_kv_heads",
                "capacity",
                "head_dim",
                "v_dim",
                "page_size",
                "num_pages",
            )
        ],
        (
            MemoryError,
            r"the cache's keys of shape \(1, 1, 4611686018427387904, 3\) need 5.154e\+10 "
            "GiB",
            {"capacity": 2**62},
        ),
        (MemoryError, "values of shape .* need", {"v_dim": 2**50}),
        (
            MemoryError,
            "the cache's block table of shape",
            {"capacity": 2**60, "page_size": 1, "num_pages": 1},
        ),
        (MemoryError, "keys of shape .* need", {"batch": 2**62, "page_size": 1}),
    ],
)
def test_refusals_of_a_new_cache(error, message, options):
    with pytest.raises(error, match=message):
        KVCache(**({"batch": 1, "num_kv_heads": 1, "capacity": 4, "head_dim": 3} | options))


def test_a_window_wider_than_everything_is_no_bound(engine, rng):
    k, v = (normal(rng, (2, HKV, 150, D)) for _ in range(2))
    q = normal(rng, (2, HKV, 3, D))
    expected = sdpa(q, k, v)
    for window in (150, 2**62, 2**63, 2**70):
        cache = KVCache(2, HKV, 200, D, window=window)
        for some in (slice(0, 100), slice(100, 103), slice(103, 150)):
            cache.append(k[:, :, some], v[:, :, some])
        np.testing.assert_allclose(cache.attend(q), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            cache.attend(q, window=(2**70, None)), expected, rtol=1e-5, atol=1e-6
        )
        cache.truncate(20)
        assert cache.lengths.tolist() == [20, 20]


ARRAYS = {"key": "keys", "value": "values", "key_scales": "key_scales",
          "value_scales": "value_scales"}  # fmt: skip


@pytest.mark.parametrize("name", list(ARRAYS))
@pytest.mark.parametrize("page_size", [None, 2])
def test_read_only_storage_is_refused_before_any_of_it_is_written(name, page_size):
    cache = full(dtype="int8", page_size=page_size)
    if page_size is not None:
        cache.fork(0, 1)  # both sequences share a page that is not full
    else:
        cache.truncate([3, 2])
    lengths, table, free = cache.lengths, cache.block_table, cache.free_pages
    storage = {x: getattr(cache._pool, x).copy() for x in ARRAYS.values()}
    getattr(cache._pool, ARRAYS[name]).flags.writeable = False
    steps = [lambda: cache.append(5 * ONE, 5 * ONE)]
    if page_size is None:
        steps += [lambda: cache.reorder([1, 0]), lambda: cache.fork(0, 1)]
    else:
        steps += [lambda: cache.extend(1)]
    for step in steps:
        with pytest.raises(ValueError, match=f"the cache's {name} array is read-only"):
            step()
        assert cache.lengths.tolist() == lengths.tolist()
        assert cache.free_pages == free
        np.testing.assert_array_equal(cache.block_table, table)
        for x, before in storage.items():
            np.testing.assert_array_equal(getattr(cache._pool, x), before)
    assert cache.attend(ONE).shape == ONE.shape
    cache.reorder([0, 1])  # moves nothing, so it may be read-only
    cache.reset()


def test_bit_patterns_are_not_converted_into_arrays_of_bfloat16():
    k, v = np.zeros((2, 2, 1, 4, 3), ml_dtypes.bfloat16)
    cache = KVCache.from_arrays(k, v)
    cache.append(ONE, 2 * ONE)
    assert (k[:, :, 0] == 1).all()
    assert (v[:, :, 0] == 2).all()


COPIES: dict[str, Any] = {"copy": copy.copy, "deepcopy": copy.deepcopy,
                          "pickle": lambda x: pickle.loads(pickle.dumps(x))}  # fmt: skip


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "bfloat16"}, {"dtype": "int8", "page_size": 4}, {"page_size": 4, "window": 9}],
    ids=str,
)
def test_copies_are_independent_and_aligned(rng, duplicate, options):
    cache = KVCache(2, HKV, 30, D, DV, **options)
    k, v = normal(rng, (2, HKV, 15, D)), normal(rng, (2, HKV, 15, DV))
    q = normal(rng, (2, HKV, 1, D))
    for _ in range(5):  # a single copy may be aligned by chance
        cache.reset()
        cache.append(k[:, :, :9], v[:, :, :9])
        if "page_size" in options:
            cache.fork(0, 1, 7)
        before, lengths = cache.attend(q), cache.lengths
        other = duplicate(cache)
        assert type(other) is KVCache
        assert repr(other) == repr(cache)
        for name in ("keys", "values", "key_scales", "value_scales"):
            array = getattr(other._pool, name)
            if array is not None:
                assert array.ctypes.data % 64 == 0
                assert array.flags.c_contiguous
                assert not np.shares_memory(array, getattr(cache._pool, name))
        np.testing.assert_array_equal(other.attend(q), before)
        other.append(k[:, :, 9:], v[:, :, 9:])
        np.testing.assert_array_equal(cache.lengths, lengths)
        np.testing.assert_array_equal(cache.attend(q), before)
        cache.append(k[:, :, 9:], v[:, :, 9:])
        np.testing.assert_array_equal(cache.attend(q), other.attend(q))
        if "page_size" in options:
            check_pages(cache)
            check_pages(other)


def test_a_copy_of_borrowed_storage_owns_its_memory():
    k = np.zeros((2, 7, 1, 3), np.float32).swapaxes(1, 2)  # (batch, capacity, Hkv, D) in memory
    k.flags.writeable = False
    other = copy.copy(KVCache.from_arrays(k, k))
    other.append(ONE, ONE)
    assert not k.any()
    assert other.key_pages.ctypes.data % 64 == 0
    assert not np.shares_memory(other.key_pages, other.value_pages)


def test_the_repr_shows_sizes_lengths_and_pages():
    assert repr(full()) == (
        "<KVCache batch=2, num_kv_heads=1, capacity=4, head_dim=3, dtype=float32, lengths=[3, 3]>"
    )
    cache = KVCache(1, 2, 9, 3, 5, dtype="bfloat16", page_size=4, window=6)
    cache.append(np.ones((1, 2, 5, 3), "f4"), np.ones((1, 2, 5, 5), "f4"))
    assert repr(cache) == (
        "<KVCache batch=1, num_kv_heads=2, capacity=9, head_dim=3, v_dim=5, dtype=bfloat16, "
        "lengths=[5], page_size=4, free_pages=1 of 3, window=6>"
    )
    many = repr(KVCache(1000, 1, 1, 1, dtype="int8"))
    assert "lengths=[0, 0, 0, 0, 0, 0, ...]" in many
    assert len(many) < 150
    assert "lengths=[]" in repr(KVCache(0, 1, 1, 1))


def test_int8_refuses_nan_and_infinity():
    cache = KVCache(2, 1, 4, 3, dtype="int8")
    with pytest.raises(ValueError, match="value holds NaN or infinity"):
        cache.append(ONE, np.where(ONE == 1, np.inf, ONE))
    assert cache.lengths.tolist() == [0, 0]


def test_refusals_of_from_arrays():
    k = np.ones((2, 1, 4, 3), np.float32)
    with pytest.raises(ValueError, match="they must be"):
        KVCache.from_arrays(k, k[:1])
    with pytest.raises(TypeError, match="both must be the same"):
        KVCache.from_arrays(k, k.astype("f8"))
    with pytest.raises(TypeError, match="native byte order"):
        KVCache.from_arrays(k.astype(">f4"), k.astype(">f4"))
    with pytest.raises(ValueError, match="key_scales must be float32"):
        KVCache.from_arrays(k.astype("i1"), k.astype("i1"))
    with pytest.raises(ValueError, match="lengths holds 5: each must be from 0"):
        KVCache.from_arrays(k, k, 5)
    k.flags.writeable = False
    cache = KVCache.from_arrays(k, k, 4)
    assert cache.attend(ONE).shape == ONE.shape
    cache.truncate(2)
    with pytest.raises(ValueError, match="key array is read-only"):
        cache.append(ONE, ONE)


def test_speculative_decoding(engine, rng):
    """Rejecting two of three drafted tokens leaves the cache as if they had not been appended."""
    k, v = (normal(rng, (1, HKV, 12, D)) for _ in range(2))
    q = normal(rng, (1, HKV, 1, D))
    straight, tried = KVCache(1, HKV, 20, D), KVCache(1, HKV, 20, D, page_size=4)
    straight.append(k[:, :, :10], v[:, :, :10])
    tried.append(k[:, :, :9], v[:, :, :9])
    tried.append(k[:, :, 9:12], v[:, :, 9:12])
    tried.truncate(10)
    np.testing.assert_allclose(straight.attend(q), tried.attend(q), rtol=1e-5, atol=1e-6)
    assert qkv_fast.KVCache is KVCache
