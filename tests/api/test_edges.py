"""Extreme inputs: empty axes, rows without keys, infinities and NaN, lengths beyond 2**31."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from helpers import make, normal, run_python

import qkv_fast
from qkv_fast import _loader
from qkv_fast import scaled_dot_product_attention as sdpa


@pytest.mark.parametrize(
    "shape",
    [
        (0, 2, 2, 3, 4, 5, 6),
        (2, 0, 0, 3, 4, 5, 6),
        (2, 2, 2, 0, 4, 5, 6),
        (2, 2, 2, 3, 0, 5, 6),
        (2, 2, 2, 3, 4, 5, 0),
        (0, 2, 2, 0, 0, 5, 6),
        (2, 2, 2, 3, 0, 5, 0),
    ],
)
def test_empty_axes(engine, rng, shape):
    q, k, v = make(rng, shape)
    out, lse = sdpa(q, k, v, return_lse=True)
    assert out.shape == (*q.shape[:-1], v.shape[-1])
    assert not out.any()
    np.testing.assert_allclose(lse, oracle.attention(q, k, v)[1], atol=1e-5)


EMPTY = """
import numpy as np, qkv_fast
x = np.broadcast_to(np.float32(1), (1 << 36, 2, 0, 4))
out, lse = qkv_fast.scaled_dot_product_attention(x, x, x, return_lse=True)
print(out.shape, lse.shape)
"""


@pytest.mark.parametrize("name", ["native", "python"])
def test_an_empty_result_needs_no_loop_over_the_batch(name):
    """A loop over the 2**36 entries would take longer than `run_python` waits."""
    if name == "native" and _loader.why_not_native():
        pytest.skip("no native engine")
    done = run_python(EMPTY, QKV_FAST_BACKEND=name)
    assert done.stdout.strip() == "(68719476736, 2, 0, 4) (68719476736, 2, 0)", done.stderr


@pytest.mark.parametrize("how", ["bool", "-inf", "key_lengths", "causal", "window"])
def test_rows_without_keys_are_zero(engine, rng, how):
    q, k, v = make(rng, (1, 2, 2, 70, 130, 16, 16))
    v[..., 0] = np.inf  # 0 * inf would show as NaN
    blind = np.zeros((70, 130), bool)
    blind[::3] = True
    options = {
        "bool": {"attn_mask": ~blind},
        "-inf": {"attn_mask": np.where(blind, -np.inf, 0).astype(np.float32)},
        "key_lengths": {"key_lengths": 0},
        "causal": {"is_causal": True, "query_offset": -10},
        "window": {"window": (5, 5), "query_offset": 100},
    }[how]
    out, lse = sdpa(q, k, v, return_lse=True, **options)
    _, exact_lse = oracle.attention(q, k, v, **options)
    unseen = exact_lse == -np.inf
    assert unseen.any()
    assert (out[unseen] == 0).all()
    np.testing.assert_array_equal(lse == -np.inf, unseen)
    oracle.assert_close(out, q, k, v, **options)


def test_nan_in_a_query_stays_in_its_row(engine, rng):
    q, k, v = make(rng, (1, 2, 2, 70, 130, 16, 16))
    clean = sdpa(q, k, v, is_causal=True)
    q[0, 1, 37, 5] = np.nan
    out = sdpa(q, k, v, is_causal=True)
    assert np.isnan(out[0, 1, 37]).all()
    out[0, 1, 37] = clean[0, 1, 37]
    np.testing.assert_array_equal(out, clean)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("how", ["causal", "bool", "-inf", "window"])
def test_excluded_keys_have_no_influence(engine, rng, bad, how):
    q, k, v = make(rng, (1, 2, 2, 70, 130, 16, 16))
    options = {
        "causal": {"is_causal": True, "query_offset": 20},
        "bool": {"attn_mask": rng.random((70, 130)) > 0.5},
        "-inf": {"attn_mask": np.where(rng.random((70, 130)) > 0.5, 0, -np.inf)},
        "window": {"window": (3, 9), "query_offset": 15},
    }[how]
    clean = sdpa(q, k, v, **options)
    k[0, 1, 41], v[0, 1, 41] = bad, bad
    k[0, 0, 99, 3], v[0, 0, 99, 3] = bad, bad
    out = sdpa(q, k, v, **options)
    seen = oracle.attention(np.zeros_like(q), np.zeros_like(k), np.broadcast_to(
        np.eye(130)[None, None], (1, 2, 130, 130)), **options)[0] > 0  # fmt: skip
    untouched = np.ones((1, 2, 70), bool)
    untouched[0, 1] = ~seen[0, 1, :, 41]
    untouched[0, 0] = ~seen[0, 0, :, 99]
    assert untouched.any()
    assert not untouched.all()
    np.testing.assert_array_equal(out[untouched], clean[untouched])
    assert not np.isfinite(out[~untouched]).all(axis=-1).any() or bad == -np.inf


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_infinities_give_what_the_formula_gives(engine, rng, dtype, place, bad):
    q, k, v = (np.abs(x) for x in make(rng, (1, 1, 1, 20, 70, 8, 8), dtype))
    {"q": q, "k": k, "v": v}[place][0, 0, 3, 2] = bad
    oracle.assert_close(sdpa(q, k, v), q, k, v)


def test_visible_keys_that_all_score_minus_infinity(engine):
    q, k, v = np.ones((2, 4), "f4"), np.full((70, 4), -np.inf, "f4"), np.ones((70, 3), "f4")
    out, lse = sdpa(q, k, v, return_lse=True)  # 0 / 0, and log 0
    assert np.isnan(out).all()
    assert (lse == -np.inf).all()
    k[65] = 1.0  # the first block has only keys of score -inf, the second has another
    np.testing.assert_array_equal(sdpa(q, k, v), np.ones((2, 3)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("lq", [1, 15, 64, 65])
@pytest.mark.parametrize("dv", [1, 7, 16, 33])
def test_nothing_around_out_is_written(engine, rng, dtype, lq, dv):
    q, k, v = make(rng, (2, 2, 2, lq, 30, 8, dv), dtype)
    arena = np.full((2, 2, lq + 2, dv + 3), 77.0, dtype)
    out = arena[:, :, 1:-1, 1:-2]
    assert sdpa(q, k, v, out=out) is out
    np.testing.assert_array_equal(out, sdpa(q, k, v))
    out[...] = 77.0
    assert (arena == 77.0).all()


LONG = 2**31 + 11


def test_lengths_beyond_32_bits(engine, rng):
    """Keys and values are one row of memory, broadcast to 2**31 + 11; queries see few of them."""
    q, k, v = make(rng, (1, 1, 1, 3, 1, 4, 4))
    k, v = (np.broadcast_to(x, (1, 1, LONG, 4)) for x in (k, v))
    expected = np.broadcast_to(v[:, :, :1], (1, 1, 3, 4))
    options = {"window": (3, 2), "query_offset": LONG - 4}
    np.testing.assert_allclose(sdpa(q, k, v, **options), expected, rtol=1e-5)
    np.testing.assert_allclose(sdpa(q, k, v, key_lengths=100), expected, rtol=1e-5)
    mask = np.broadcast_to(np.True_, (3, LONG))
    np.testing.assert_allclose(sdpa(q, k, v, mask, **options), expected, rtol=1e-5)
    bias = np.broadcast_to(np.float32(1), (3, LONG))
    np.testing.assert_allclose(sdpa(q, k, v, bias, **options), expected, rtol=1e-5)


def test_offsets_at_the_limit(engine, rng):
    q, k, v = make(rng, (1, 1, 1, 3, 9, 4, 4))
    np.testing.assert_array_equal(sdpa(q, k, v, is_causal=True, query_offset=2**61), sdpa(q, k, v))
    assert not sdpa(q, k, v, is_causal=True, query_offset=-(2**61)).any()
    assert not sdpa(q, k, v, window=(2**61, 0), query_offset=-(2**61)).any()


def test_many_batch_axes(engine, rng):
    q = normal(rng, (2, 1, 3, 1, 2, 5, 4))
    k = normal(rng, (1, 2, 1, 2, 2, 9, 4))
    v = normal(rng, (2, 2, 3, 2, 2, 9, 3))
    oracle.assert_close(sdpa(q, k, v), q, k, v)
    oracle.assert_close(sdpa(q[0, 0, 0, 0], k[0, 1], v), q[0, 0, 0, 0], k[0, 1], v)


def test_two_and_three_axes(engine, rng):
    q, k, v = (x[0] for x in make(rng, (1, 3, 3, 5, 9, 4, 6)))
    oracle.assert_close(sdpa(q, k, v, is_causal=True), q, k, v, is_causal=True)
    out, lse = sdpa(q[0], k[0], v[0], return_lse=True)
    assert out.shape == (5, 6)
    assert lse.shape == (5,)
    np.testing.assert_array_equal(out, sdpa(q, k, v)[0])


def test_many_heads_over_long_keys(rng):
    """The Python engine then computes some heads at a time and converts 16-bit keys in parts."""
    q, k, v = make(rng, (1, 4, 2, 70, 9000, 8, 8), np.float16)
    v[0, 0, 5000] = np.inf
    with qkv_fast.backend("python"):
        out = sdpa(q, k, v, enable_gqa=True, is_causal=True, query_offset=4970)
    oracle.assert_close(out, q, k, v, is_causal=True, query_offset=4970)
