"""paged_attention: keys and values in pages of any element type, size and layout."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import normal

from qkv_fast import paged_attention
from qkv_fast import scaled_dot_product_attention as sdpa
from qkv_fast._dtypes import quantize

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
LENGTHS = [130, 0, 7, 300, 64]


def scattered(rng, k, v, page_size: int, lengths=LENGTHS, spare: int = 3):
    """Return pages that hold (B, H, L, D) keys and values in random order, and their table."""
    blocks = -(-max(lengths) // page_size)
    table = np.full((len(lengths), blocks), -1)
    needed = sum(-(-n // page_size) for n in lengths)
    free = rng.permutation(needed + spare)
    shape = (needed + spare, k.shape[1], page_size)
    pages = [np.full((*shape, x.shape[-1]), np.nan, x.dtype) for x in (k, v)]
    for b, n in enumerate(lengths):
        for j in range(-(-n // page_size)):
            table[b, j], free = free[0], free[1:]
            some = slice(j * page_size, min(n, (j + 1) * page_size))
            for page, x in zip(pages, (k, v), strict=True):
                page[table[b, j], :, : some.stop - some.start] = x[b, :, some]
    return *pages, table


def tensors(rng, q_len: int, dtype: Any = np.float32, heads: int = 4, kv_heads: int = 2):
    n, longest = len(LENGTHS), max(LENGTHS)
    q = normal(rng, (n, heads, q_len, 24), dtype)
    k = normal(rng, (n, kv_heads, longest, 24), dtype)
    return q, k, normal(rng, (n, kv_heads, longest, 20), dtype)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "window": {"window": (50, 0)},
    "all": {"is_causal": True, "softcap": 2.0, "alibi_slopes": 0.05, "sinks": [0.5, -1, 2, 0]},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 256, 512])
@pytest.mark.parametrize("q_len", [1, 3, 40])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_agrees_with_the_oracle(engine, rng, dtype, page_size, q_len, options):
    q, k, v = tensors(rng, q_len, dtype)
    pages = scattered(rng, k, v, page_size)
    out, lse = paged_attention(q, *pages, LENGTHS, return_lse=True, **options)
    here = options | {"query_offset": np.array(LENGTHS) - q_len, "key_lengths": LENGTHS}
    oracle.assert_close(out, q, k, v, **here)
    exact = oracle.attention(q, k, v, **here)[1]
    np.testing.assert_allclose(lse, exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["bool", "float32"])
def test_masks(engine, rng, kind):
    q, k, v = tensors(rng, 3)
    allowed = rng.random((5, 4, 3, 300)) > 0.3
    mask = allowed if kind == "bool" else np.where(allowed, 0.5, -np.inf).astype(kind)
    out = paged_attention(q, *scattered(rng, k, v, 16), LENGTHS, mask)
    oracle.assert_close(
        out, q, k, v, attn_mask=mask, key_lengths=LENGTHS, query_offset=np.array(LENGTHS) - 3
    )


@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_a_bias_beside_a_mask(engine, rng, q_len):
    q, k, v = tensors(rng, q_len)
    pages = scattered(rng, k, v, 16)
    bias = normal(rng, (5, 4, q_len, 300))
    here = {"key_lengths": LENGTHS, "query_offset": np.array(LENGTHS) - q_len, "attn_bias": bias}
    oracle.assert_close(paged_attention(q, *pages, LENGTHS, attn_bias=bias), q, k, v, **here)
    allowed = rng.random((5, 1, q_len, 300)) > 0.3
    out = paged_attention(q, *pages, LENGTHS, allowed, attn_bias=bias)
    oracle.assert_close(out, q, k, v, attn_mask=allowed, **here)


@pytest.mark.parametrize("q_len", [1, 20])
def test_unseen_pages_and_rows_may_hold_anything(engine, rng, q_len):
    """Entries of the table for unseen pages are not read; NaN in unseen rows has no influence."""
    q, k, v = tensors(rng, q_len)
    kp, vp, table = scattered(rng, k, v, 16)  # NaN in the rest of last pages, and in spare pages
    expected = paged_attention(q, kp, vp, table, LENGTHS, window=(30, 0))
    for b, n in enumerate(LENGTHS):
        table[b, : max(0, n - q_len - 30) // 16] = 10**9
        table[b, -(-n // 16) :] = -(10**9)
    np.testing.assert_array_equal(
        paged_attention(q, kp, vp, table, LENGTHS, window=(30, 0)), expected
    )
    assert np.isfinite(expected).all()


@pytest.mark.parametrize("query", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("q_len", [1, 30])
def test_a_query_of_another_dtype_than_the_pages(engine, rng, query, stored, q_len):
    q, k, v = tensors(rng, q_len, stored)
    q = q.astype(query)
    out = paged_attention(q, *scattered(rng, k, v, 32), LENGTHS, is_causal=True)
    assert out.dtype == query
    here = {"is_causal": True, "key_lengths": LENGTHS, "query_offset": np.array(LENGTHS) - q_len}
    exact = oracle.attention(q.astype(float), k.astype(float), v.astype(float), **here)[0]
    wide = np.float64 in (query, stored)
    eps = 1e-12 if wide and query == np.float64 else 2e-6
    eps = max(eps, {np.float16: 1e-3, ml_dtypes.bfloat16: 1e-2}.get(query, 0))
    np.testing.assert_allclose(out.astype(float), exact, rtol=eps, atol=eps)


@pytest.mark.parametrize("q_len", [1, 2, 30])
@pytest.mark.parametrize("query", DTYPES)
@pytest.mark.parametrize("page_size", [8, 48, 512])
def test_int8_pages_are_integers_times_scales(engine, rng, q_len, query, page_size):
    q, k, v = tensors(rng, q_len)
    q = q.astype(query)
    (k8, ks), (v8, vs) = quantize(k), quantize(v)
    kp, vp, table = scattered(rng, k, v, page_size)
    (kp8, kps), (vp8, vps) = quantize(np.nan_to_num(kp)), quantize(np.nan_to_num(vp))
    kps[np.isnan(kp).any(-1)] = np.nan
    out = paged_attention(
        q, kp8, vp8, table, LENGTHS, is_causal=True, key_scales=kps, value_scales=vps
    )
    k, v = k8 * ks[..., None].astype(float), v8 * vs[..., None].astype(float)
    exact, _ = oracle.attention(
        q.astype(float), k, v, is_causal=True, key_lengths=LENGTHS,
        query_offset=np.array(LENGTHS) - q_len,
    )  # fmt: skip
    eps = {np.float16: 2e-3, ml_dtypes.bfloat16: 2e-2}.get(query, 3e-6)
    np.testing.assert_allclose(out.astype(float), exact, rtol=eps, atol=eps)


def test_an_excluded_key_has_no_influence_whatever_its_scale(engine, rng):
    q, k, v = tensors(rng, 2)
    (k8, ks), (v8, vs) = quantize(k), quantize(v)
    mask = rng.random((1, 1, 1, 300)) > 0.4
    options: dict[str, Any] = {"attn_mask": mask, "key_scales": ks, "value_scales": vs}
    table = np.arange(5)[:, None]
    expected = paged_attention(q, k8, v8, table, LENGTHS, **options)
    ks[:, :, ~mask[0, 0, 0]] = np.nan
    vs[:, :, ~mask[0, 0, 0]] = np.inf
    np.testing.assert_array_equal(paged_attention(q, k8, v8, table, LENGTHS, **options), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_batch_change_no_bit(engine, rng, dtype):
    lengths = [4000, 1, 1025, 2048]
    q = normal(rng, (4, 4, 2, 32), dtype)
    k, v = (normal(rng, (4, 2, 4000, 32), dtype) for _ in range(2))
    pages = scattered(rng, k, v, 16, lengths)
    one = paged_attention(q, *pages, lengths, is_causal=True, num_threads=1)
    for threads in (2, 3, 4):
        np.testing.assert_array_equal(
            paged_attention(q, *pages, lengths, is_causal=True, num_threads=threads), one
        )
    kp, vp, table = pages
    for b in range(4):
        alone = paged_attention(
            q[b : b + 1], kp, vp, table[b : b + 1], lengths[b : b + 1], is_causal=True
        )
        np.testing.assert_array_equal(alone, one[b : b + 1])


def test_one_page_for_each_sequence_equals_a_dense_batch(engine, rng):
    """The native engine gives the same bits: the rows of a sequence are adjacent in both."""
    q, k, v = tensors(rng, 1)
    dense = sdpa(q, k, v, key_lengths=LENGTHS, enable_gqa=True)
    paged = paged_attention(q, k, v, np.arange(5)[:, None], LENGTHS)
    if engine.engine == "native":
        np.testing.assert_array_equal(paged, dense)
    np.testing.assert_allclose(paged, dense, rtol=1e-5, atol=1e-6)


def test_any_layout_of_pages(engine, rng):
    q, k, v = tensors(rng, 2)
    kp, vp, table = scattered(rng, k, v, 16)
    expected = paged_attention(q, kp, vp, table, LENGTHS)
    flash = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (kp, vp)]
    np.testing.assert_array_equal(paged_attention(q, *flash, table, LENGTHS), expected)
    for x in (kp[..., ::-1].copy()[..., ::-1], kp.astype(">f4"), np.asfortranarray(kp)):
        out = paged_attention(q, x, vp, table.astype(np.int32), LENGTHS)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, np.int8])
@pytest.mark.parametrize("layout", [16, 32, 64, 128, 256, "rows", "rows of pages"])
def test_interleaved_heads_do_not_affect_each_other(engine, rng, dtype, layout):
    """Where the rows of heads alternate in memory, a task computes several heads."""
    heads, longest, lengths = 18, 768, [768, 512, 40, 700, 0, 129]
    q = normal(rng, (6, 2 * heads, 2, 16), np.float32 if dtype == np.int8 else dtype)
    arrays = [normal(rng, (6, heads, longest, d), np.float32) for d in (16, 12)]
    if dtype == np.int8:
        (k, k_scales), (v, v_scales) = map(quantize, arrays)
        arrays = [k, v, k_scales, v_scales]
    else:
        arrays = [x.astype(dtype) for x in arrays]
    size = {"rows": longest, "rows of pages": 48}.get(layout, layout)
    table = rng.permutation(6 * longest // size).reshape(6, -1)
    for i, x in enumerate(arrays):
        arrays[i] = np.empty((table.size, heads, size, *x.shape[3:]), x.dtype)
        arrays[i][table] = x.reshape(6, heads, -1, size, *x.shape[3:]).swapaxes(1, 2)
        if size != layout:  # (pages, page_size, heads, D)
            arrays[i] = np.ascontiguousarray(arrays[i].swapaxes(1, 2)).swapaxes(1, 2)

    def attend(query, of: slice = slice(None), **more):
        key, value, *scales = (x[:, of] for x in arrays)
        more |= dict(zip(("key_scales", "value_scales"), scales, strict=False))
        return paged_attention(query, key, value, table, lengths, window=(550, 0), **more)

    together = attend(q, num_threads=1)
    np.testing.assert_array_equal(attend(q, num_threads=2), together)
    for h in (0, 5, 15, 16, 17):
        rows, alone = slice(2 * h, 2 * h + 2), slice(h, h + 1)
        if engine.engine == "native":
            np.testing.assert_array_equal(attend(q[:, rows], alone), together[:, rows])
        else:
            np.testing.assert_allclose(
                attend(q[:, rows], alone).astype(float), together[:, rows].astype(float),
                rtol=1e-2, atol=1e-2,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_v_dim_of_zero(engine, rng, dtype):
    pages = normal(rng, (3, 2, 4, 8), dtype)
    query = normal(rng, (1, 4, 5, 8), dtype)
    table = np.frombuffer(bytes(3) + np.array([[2, 0]]).tobytes(), np.int64, 2, 3)  # unaligned
    options = {"block_table": table.reshape(1, 2), "key_lengths": 7, "return_lse": True}
    out, lse = paged_attention(query, pages, pages[..., :0], **options)
    assert out.shape == (1, 4, 5, 0)
    np.testing.assert_array_equal(lse, paged_attention(query, pages, pages, **options)[1])


Q = np.ones((2, 4, 1, 8), np.float32)
PAGES = np.ones((3, 2, 4, 8), np.float32)
REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "query has dtype int64", {"query": Q.astype(int)}),
    (TypeError, "key_pages has dtype int64", {"key_pages": PAGES.astype(int)}),
    (TypeError, "int8 has scales, and nothing else", {"key_pages": PAGES.astype("i1")}),
    (TypeError, "int8 has scales, and nothing else", {"value_scales": PAGES[..., 0]}),
    (ValueError, "key_scales is an array of float64", {"key_pages": PAGES.astype("i1"),
                                                      "key_scales": PAGES[..., 0].astype(float)}),
    (ValueError, r"query has shape \(4, 1, 8\)", {"query": Q[0]}),
    (ValueError, r"value_pages has shape", {"value_pages": PAGES[0]}),
    (ValueError, "value_pages has 2 pages, but key_pages has 3", {"value_pages": PAGES[:2]}),
    (ValueError, "page must hold at least one", {"key_pages": PAGES[:, :, :0],
                                                "value_pages": PAGES[:, :, :0]}),
    (ValueError, "block_table is an array", {"block_table": [0, 1]}),
    (ValueError, "block_table is an array of float64", {"block_table": [[0.0], [1.0]]}),
    (ValueError, r"block_table\[0, 1\] is 3: it must be a page, from 0 to 2",
     {"block_table": [[0, 3], [1, 2]]}),
    (ValueError, r"block_table\[1, 0\] is -1", {"block_table": [[0, 1], [-1, 2]]}),
    (ValueError, "key_lengths holds 9: it must be between 0 and 8", {"key_lengths": [9, 1]}),
    (ValueError, "attn_mask has shape", {"attn_mask": np.ones((1, 8), bool)}),
    (ValueError, "out has shape", {"out": Q[:1].copy()}),
    (ValueError, "dtype is 'float32'", {"dtype": "float32"}),
    (ValueError, "dtype is 3", {"dtype": 3}),
    (ValueError, "dtype is an array of float32", {"dtype": Q}),
    (TypeError, "query has dtype uint16.*dtype='bfloat16' says", {"query": Q.astype("u2")}),
    (TypeError, "key_pages has dtype uint16.*dtype='bfloat16' says",
     {"key_pages": PAGES.astype("u2")}),
    (ValueError, r"block_table is \[\[0\], \[1, 2\]\]: its rows", {"block_table": [[0], [1, 2]]}),
    (ValueError, "block_table is an array of object", {"block_table": [[0, 2**70], [1, 2]]}),
    (ValueError, r"key_lengths is \[\[1\], 2\]: its rows", {"key_lengths": [[1], 2]}),
    (ValueError, r"attn_mask has shape \(2, 6\).*as mask\[:, None, None\]$",
     {"attn_mask": np.ones((2, 6), bool)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "wrong"), REFUSED)
def test_refusals(error, message, wrong):
    options: dict[str, Any] = {"query": Q, "key_pages": PAGES, "value_pages": PAGES,
                               "block_table": [[0, 1], [1, 2]], "key_lengths": [5, 6]}  # fmt: skip
    with pytest.raises(error, match=message):
        paged_attention(**(options | wrong))
