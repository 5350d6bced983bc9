"""key_ranges: each row sees its own range of keys, in all functions and beside all exclusions."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import make, normal

from qkv_fast import KVCache, attention_weights, paged_attention, varlen_attention
from qkv_fast import scaled_dot_product_attention as sdpa

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


def check(q: Any, k: Any, v: Any, **options: Any) -> np.ndarray:
    gqa = q.ndim > 2 and q.shape[-3] != k.shape[-3]
    out, lse = sdpa(q, k, v, enable_gqa=gqa, return_lse=True, **options)
    exact = oracle.attention(q, k, v, **options)[1]
    # A result may come from one or two rows only: their scores, no greater than lse, decide then.
    largest = float(np.abs(exact[np.isfinite(exact)]).max(initial=0))
    oracle.assert_close(out, q, k, v, largest_score=largest, **options)
    np.testing.assert_allclose(lse, exact, rtol=2e-5, atol=2e-5)
    return out


def drawn(rng: np.random.Generator, shape: tuple[int, ...], kv_len: int) -> tuple[Any, Any]:
    """Return ranges of which some are empty, some the wrong way round, some beyond the keys."""
    begin = rng.integers(-20, kv_len + 20, shape)
    end = begin + rng.integers(-30, kv_len, shape)
    return begin, end


RANGE_SHAPES = [(), (70,), (4, 1), (4, 70), (2, 1, 1), (2, 1, 70), (2, 4, 70), (1, 4, 70)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, np.float32) for shape in RANGE_SHAPES), *(((2, 4, 70), d) for d in DTYPES[1:])],
    ids=str,
)
def test_agrees_with_the_oracle(engine, rng, shape, dtype):
    q, k, v = make(rng, (2, 4, 2, 70, 300, 16, 24), dtype)
    begin, end = drawn(rng, shape, 300)
    check(q, k, v, key_ranges=(begin, end))
    check(q, k, v, key_ranges=(begin, None), is_causal=True, query_offset=100)
    check(q, k, v, key_ranges=(None, end), window=(100, 3), query_offset=[20, 200])
    check(q, k, v, key_ranges=(begin // 2, 300), key_lengths=[250, 40])


@pytest.mark.parametrize(("q_len", "heads"), [(1, (4, 2)), (1, (8, 1)), (7, (1, 1)), (16, (4, 2))])
@pytest.mark.parametrize("kv_len", [150, 4500])
def test_few_queries(engine, rng, q_len, heads, kv_len):
    q, k, v = make(rng, (2, *heads, q_len, kv_len, 24, 16))
    for shape in ((), (q_len,), (2, heads[0], q_len)):
        begin, end = drawn(rng, shape, kv_len)
        check(q, k, v, key_ranges=(begin, end))
        check(q, k, v, key_ranges=(begin, end), is_causal=True, query_offset=kv_len // 2)


def test_beside_masks_and_modifiers(engine, rng):
    q, k, v = make(rng, (2, 4, 2, 70, 290, 24, 24))
    begin, end = rng.integers(0, 200, (4, 70)), rng.integers(150, 290, (2, 1, 1))
    options: dict[str, Any] = {
        "softcap": 2.5,
        "alibi_slopes": rng.random((2, 4)) * 0.1,
        "sinks": rng.standard_normal(4),
        "window": (160, 20),
        "query_offset": 130,
        "key_lengths": [280, 200],
    }
    allowed = rng.random((2, 1, 70, 290)) > 0.3
    check(q, k, v, key_ranges=(begin, end), attn_mask=allowed, **options)
    bias = np.where(allowed, normal(rng, allowed.shape), -np.inf).astype(np.float32)
    check(q, k, v, key_ranges=(begin, end), attn_mask=bias, **options)
    check(q, k, v, key_ranges=(begin, end), attn_mask=allowed[:, :, :1], attn_bias=bias, **options)


@pytest.mark.parametrize("q_len", [1, 5, 70, 200])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_causal_positions_as_ranges_have_the_same_bits(engine, rng, q_len, dtype):
    q, k, v = make(rng, (2, 4, 2, q_len, 5000, 16, 16), dtype)
    position = 4000 + np.arange(q_len)
    plain = sdpa(q, k, v, is_causal=True, window=(1500, None), query_offset=4000, enable_gqa=True)
    out = sdpa(q, k, v, key_ranges=(position - 1500, position + 1), enable_gqa=True)
    if q_len != 5:
        np.testing.assert_array_equal(out, plain)
    else:  # decoding takes the path of rows that have ranges of their own
        eps = 1e-2 if dtype == ml_dtypes.bfloat16 else 1e-5
        np.testing.assert_allclose(out.astype(float), plain.astype(float), rtol=eps, atol=eps)


def test_rows_without_keys(engine, rng):
    q, k, v = make(rng, (1, 2, 2, 130, 300, 16, 16))
    begin, end = np.zeros(130, int), np.full(130, 300)
    end[::3], begin[1::3] = 0, 300
    out, lse = sdpa(q, k, v, key_ranges=(begin, end), return_lse=True)
    empty = np.arange(130) % 3 < 2
    assert not out[:, :, empty].any()
    assert (lse[:, :, empty] == -np.inf).all()
    np.testing.assert_array_equal(out[:, :, ~empty], sdpa(q, k, v)[:, :, ~empty])
    out, lse = sdpa(q, k, v, key_ranges=(200, 100), return_lse=True)
    assert not out.any()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("q_len", [1, 100])
def test_excluded_keys_may_hold_nan(engine, rng, q_len):
    q, k, v = make(rng, (1, 4, 2, q_len, 400, 16, 16))
    end = rng.integers(120, 300, (4, q_len))
    expected = sdpa(q, k, v, key_ranges=(100, end), enable_gqa=True)
    k[:, :, :100] = v[:, :, :100] = np.nan
    k[:, :, 300:] = v[:, :, 300:] = np.nan
    np.testing.assert_array_equal(
        sdpa(q, k, v, key_ranges=(100, end), enable_gqa=True), expected
    )  # fmt: skip
    v[:, :, 200] = np.nan  # some rows see it
    out = sdpa(q, k, v, key_ranges=(100, end), enable_gqa=True)
    np.testing.assert_array_equal(np.isnan(out).any(-1)[0], end > 200)


def test_documents_in_a_row_are_what_they_are_alone(engine, rng):
    lengths = [3, 100, 1, 64, 130]
    q, k, v = make(rng, (1, 2, 2, sum(lengths), sum(lengths), 16, 16))
    ends = np.cumsum(lengths)
    begins = ends - lengths
    ranges = np.repeat(begins, lengths), np.repeat(ends, lengths)
    out = sdpa(q, k, v, key_ranges=ranges, is_causal=True)
    for begin, end in zip(begins, ends, strict=True):
        own = (..., slice(begin, end), slice(None))
        alone = sdpa(q[own], k[own], v[own], is_causal=True)
        np.testing.assert_allclose(out[own], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["i4", "u1", "u8", ">i2", "list", "int"])
def test_any_integers(engine, rng, kind):
    q, k, v = make(rng, (1, 1, 1, 40, 90, 8, 8))
    begin = rng.integers(0, 50, 40)
    expected = sdpa(q, k, v, key_ranges=(begin, 70))
    given = (begin.tolist() if kind in ("list", "int") else begin.astype(kind)), 70
    np.testing.assert_array_equal(sdpa(q, k, v, key_ranges=given), expected)
    wide = np.zeros((40, 3), int)
    wide[:, 1] = begin
    np.testing.assert_array_equal(sdpa(q, k, v, key_ranges=[wide[:, 1], 70]), expected)
    np.testing.assert_array_equal(
        sdpa(q, k, v, key_ranges=(begin[::-1].copy()[::-1], 70)), expected
    )


def test_values_beyond_the_keys_and_absent_ends(engine, rng):
    q, k, v = make(rng, (2, 2, 2, 40, 90, 8, 8))
    for ranges in ((None, None), (0, 90), (-(2**63), 2**63 - 1), (None, 1000), (-5, None)):
        np.testing.assert_array_equal(sdpa(q, k, v, key_ranges=ranges), sdpa(q, k, v))


def test_one_head_and_empty_axes(engine, rng):
    q, k, v = (normal(rng, (n, 8)) for n in (40, 90, 90))
    check(q, k, v, key_ranges=(np.arange(40), np.arange(40) + 30))
    assert sdpa(q[:0], k, v, key_ranges=(np.zeros(0, int), 5)).shape == (0, 8)
    assert not sdpa(q, k[:0], v[:0], key_ranges=(0, 5)).any()


def test_out_may_be_the_memory_of_the_ranges(engine, rng):
    q, k, v = make(rng, (1, 1, 1, 40, 90, 1, 2))
    memory = np.zeros(40, np.int64)
    memory[:] = rng.integers(0, 50, 40)
    expected = sdpa(q, k, v, key_ranges=(memory.copy(), None))
    out = memory.view(np.float32).reshape(1, 1, 40, 2)
    assert sdpa(q, k, v, key_ranges=(memory, None), out=out) is out
    np.testing.assert_array_equal(out, expected)


@pytest.mark.usefixtures("many_cpus")
def test_threads_and_batch_change_no_bit(engine, rng):
    for q_len in (1, 130):
        q, k, v = make(rng, (3, 4, 2, q_len, 5000, 16, 16))
        begin, end = drawn(rng, (3, 4, q_len), 5000)
        one = sdpa(q, k, v, key_ranges=(begin, end), enable_gqa=True, num_threads=1)
        four = sdpa(q, k, v, key_ranges=(begin, end), enable_gqa=True, num_threads=4)
        np.testing.assert_array_equal(four, one)
        alone = sdpa(q[1:2], k[1:2], v[1:2], key_ranges=(begin[1:2], end[1:2]), enable_gqa=True)
        np.testing.assert_array_equal(alone, one[1:2])


@pytest.mark.parametrize("q_len", [1, 5, 70])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_len", [300, 4300])
def test_the_ranges_of_other_rows_change_no_bit(engine, rng, q_len, dtype, kv_len):
    """Few rows: sums begin at the same keys, whichever keys the other rows need."""
    if engine.engine == "python" or engine.tiles == "blas":
        pytest.skip("last bits may depend on the other rows")
    q, k, v = make(rng, (1, 4, 2, q_len, kv_len, 40, 24), dtype)
    begin, end = rng.integers(0, kv_len // 2, (2, 4, q_len))
    end += kv_len // 2
    whole = sdpa(q, k, v, key_ranges=(begin, end), enable_gqa=True)
    for row in {0, q_len // 2, q_len - 1}:
        for others in ((rng.integers(0, kv_len, (2, 4, q_len))), np.full((2, 4, q_len), 3)):
            others[0, 1, row], others[1, 1, row] = begin[1, row], end[1, row]
            out = sdpa(q, k, v, key_ranges=tuple(others), enable_gqa=True)
            np.testing.assert_array_equal(out[:, 1, row], whole[:, 1, row])
        alone = np.zeros((2, 4, q_len), int)  # no other row sees a key
        alone[0, 1, row], alone[1, 1, row] = begin[1, row], end[1, row]
        out = sdpa(q, k, v, key_ranges=tuple(alone), enable_gqa=True)
        np.testing.assert_array_equal(out[:, 1, row], whole[:, 1, row])


# --- The other functions --------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["softcapped", "masked", "softmax"])
def test_weights(engine, rng, stage):
    q, k, _ = make(rng, (2, 4, 2, 70, 290, 16, 16))
    begin, end = drawn(rng, (2, 4, 70), 290)
    options = {"stage": stage, "is_causal": True, "query_offset": 100}
    whole = attention_weights(q, k, key_ranges=(begin, end), enable_gqa=True, **options)
    exact = oracle.weights(q, k, key_ranges=(begin, end), **options)
    np.testing.assert_allclose(whole, exact, rtol=1e-4, atol=1e-5)
    some = attention_weights(
        q, k, key_ranges=(begin, end), enable_gqa=True, rows=[60, 3], heads=[3, 0], **options
    )
    np.testing.assert_allclose(some, whole[:, [3, 0]][:, :, [60, 3]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [([40, 0, 3, 100], [90, 5, 0, 300]), ([1, 1], [4500, 7])])
def test_packed_sequences(engine, rng, lengths):
    """Ranges count from each sequence's own first key."""
    cu_q, cu_k = (np.concatenate([[0], np.cumsum(n)]) for n in lengths)
    q = normal(rng, (cu_q[-1], 4, 16))
    k, v = normal(rng, (2, cu_k[-1], 2, 16))
    for shape in ((), (cu_q[-1],), (4, cu_q[-1])):
        begin, end = drawn(rng, shape, 300)
        out = varlen_attention(q, k, v, cu_q, cu_k, key_ranges=(begin, end), is_causal=True)
        begin, end = (np.broadcast_to(x, (4, len(q))) for x in (begin, end))
        for i, (n, m) in enumerate(zip(*lengths, strict=True)):
            own, keys = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
            a, b, c = q[own].swapaxes(0, 1), k[keys].swapaxes(0, 1), v[keys].swapaxes(0, 1)
            here = {"query_offset": m - n, "key_ranges": (begin[:, own], end[:, own])}
            expected = np.ascontiguousarray(out[own].swapaxes(0, 1))
            oracle.assert_close(expected, a, b, c, is_causal=True, **here)
    with pytest.raises(ValueError, match=r"key_ranges\[1\] has shape .* \(Hq, total_q\)"):
        varlen_attention(q, k, v, cu_q, cu_k, key_ranges=(None, np.zeros((2, 1, 1), int)))


@pytest.mark.parametrize("q_len", [1, 3, 40])
@pytest.mark.parametrize("page_size", [7, 16, 64])
def test_pages(engine, rng, q_len, page_size):
    lengths, blocks = [250, 0, 7, 130], -(-250 // page_size)
    q = normal(rng, (4, 4, q_len, 16))
    pages = normal(rng, (2, 4 * blocks, 2, page_size, 16))
    table = rng.permutation(4 * blocks).reshape(4, blocks)
    k, v = (x[table].swapaxes(1, 2).reshape(4, 2, -1, 16)[:, :, :250] for x in pages)
    for shape in ((), (q_len,), (4, 1, 1), (4, 4, q_len)):
        begin, end = drawn(rng, shape, 250)
        out = paged_attention(q, *pages, table, lengths, key_ranges=(begin, end), is_causal=True)
        oracle.assert_close(
            out, q, k, v, key_lengths=lengths, query_offset=np.array(lengths) - q_len,
            key_ranges=(begin, end), is_causal=True,
        )  # fmt: skip


@pytest.mark.parametrize("q_len", [1, 20])
def test_pages_that_no_range_reaches_need_not_exist(engine, rng, q_len):
    q = normal(rng, (2, 2, q_len, 8))
    pages = normal(rng, (2, 40, 2, 16, 8))
    table = np.arange(40).reshape(2, 20)
    begin = np.full((2, 2, q_len), 40)
    begin[1] = rng.integers(100, 140, (2, q_len))
    end = begin + 60
    begin[:, :, 1::2], end[:, :, 1::2] = 5, 5  # rows without keys
    expected = paged_attention(q, *pages, table, 310, key_ranges=(begin, end))
    table[0, :2], table[0, 7:], table[1, :6], table[1, 13:] = -1, 40, 10**9, -(10**9)
    np.testing.assert_array_equal(
        paged_attention(q, *pages, table, 310, key_ranges=(begin, end)), expected
    )
    with pytest.raises(ValueError, match=r"block_table\[0, 7\] is 40"):
        paged_attention(q, *pages, table, 310, key_ranges=(begin, np.where(begin < end, 113, 0)))


@pytest.mark.parametrize("stored", [*DTYPES, "int8"])
@pytest.mark.parametrize("page_size", [None, 16, 24])
def test_in_a_cache_the_ranges_of_other_rows_change_no_bit(engine, rng, stored, page_size):
    if engine.engine == "python" or engine.tiles == "blas":
        pytest.skip("last bits may depend on the other rows")
    cache = KVCache(1, 2, 300, 24, dtype=stored, page_size=page_size)
    cache.append(*normal(rng, (2, 1, 2, 290, 24)))
    for q_len in (1, 2):
        q = normal(rng, (1, 4, q_len, 24))
        for _ in range(10):
            begin, end = rng.integers(0, 100, (2, 4, q_len))
            end += rng.integers(1, 190)
            whole = cache.attend(q, key_ranges=(begin, end))
            begin[[0, 2, 3]], end[[0, 2, 3]] = rng.integers(0, 290, (2, 3, q_len))
            out = cache.attend(q, key_ranges=(begin, end))
            np.testing.assert_array_equal(out[:, 1], whole[:, 1])


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("q_len", [1, 3, 20])
def test_caches(engine, rng, page_size, q_len):
    cache = KVCache(3, 2, 90, 8, page_size=page_size)
    k, v = normal(rng, (2, 3, 2, 80, 8))
    lengths = [80, 24, 61]
    cache.append(k, v, counts=lengths)
    q = normal(rng, (3, 4, q_len, 8))
    for shape in ((), (3, 1, 1), (3, 4, q_len)):
        begin, end = drawn(rng, shape, 80)
        for causal in (False, True):
            out = cache.attend(q, key_ranges=(begin, end), is_causal=causal)
            oracle.assert_close(
                out, q, k, v, key_ranges=(begin, end), is_causal=causal, key_lengths=lengths,
                query_offset=np.array(lengths) - q_len,
            )  # fmt: skip
    some = cache.attend(q[:1], sequences=[2], key_ranges=(10, 50))
    np.testing.assert_allclose(
        some, sdpa(q[:1], k[2:], v[2:], enable_gqa=True, key_ranges=(10, 50)), rtol=1e-5, atol=1e-6
    )


def test_a_cache_with_a_window(engine, rng):
    cache = KVCache(1, 2, 200, 8, page_size=16, window=30)
    k, v = normal(rng, (2, 1, 2, 150, 8))
    for at in range(0, 150, 10):
        cache.append(k[:, :, at : at + 10], v[:, :, at : at + 10])
    q = normal(rng, (1, 2, 2, 8))
    out = cache.attend(q, is_causal=True, key_ranges=([[0, 125]], [[130, 2**40]]))
    oracle.assert_close(
        out, q, k, v, is_causal=True, query_offset=148, window=(30, None),
        key_ranges=(np.array([0, 125]), np.array([130, 1000])),
    )  # fmt: skip


Q, KV = np.ones((2, 4, 5, 8), np.float32), np.ones((2, 4, 7, 8), np.float32)


@pytest.mark.parametrize(
    ("error", "message", "ranges"),
    [
        (TypeError, r"key_ranges is 3: it must be a pair \(begin, end\)", 3),
        (TypeError, "key_ranges is an array of int64 of shape", np.zeros((5, 2), int)),
        (TypeError, r"key_ranges is \(1,\)", (1,)),
        (TypeError, r"key_ranges\[0\] must be an int, or ints for each row", (1.0, None)),
        (TypeError, r"key_ranges\[1\] must be .* array of float64", (None, np.zeros(5))),
        (TypeError, r"key_ranges\[0\] must be .* array of bool", (np.zeros(5, bool), None)),
        (TypeError, r"key_ranges\[0\] must be .* not a bool", (True, 3)),
        (TypeError, r"key_ranges\[0\] must be .* not a str", "ab"),
        (TypeError, r"key_ranges\[0\] is a MaskedArray", (np.ma.zeros(5, int), None)),
        (ValueError, r"key_ranges\[0\] has shape \(4,\).* = \(2, 4, 5\)$", ([0] * 4, None)),
        (ValueError, r"key_ranges\[1\] has shape \(2, 5\).* as x\[:, None\]$",
         (None, np.zeros((2, 5), int))),
        (ValueError, r"key_ranges\[1\] has shape \(1, 2, 4, 5\)",
         (None, np.zeros((1, 2, 4, 5), int))),
        (ValueError, r"key_ranges\[1\] holds 9223372036854775808", (0, 2**63)),
        (ValueError, r"key_ranges\[0\] is .*: its rows differ", ([[1], [1, 2]], None)),
    ],
)  # fmt: skip
def test_refusals(engine, error, message, ranges):
    out = np.full((2, 4, 5, 8), 77, np.float32)
    for call in (
        lambda: sdpa(Q, KV, KV, key_ranges=ranges, out=out),
        lambda: paged_attention(Q, KV, KV, [[0], [1]], 7, key_ranges=ranges, out=out),
        lambda: KVCache.from_arrays(KV, KV, 7).attend(Q, key_ranges=ranges, out=out),
    ):
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(error, match=message):
        attention_weights(Q, KV, key_ranges=ranges)
    assert (out == 77).all()
