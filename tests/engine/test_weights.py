"""attention_weights: agreement with the oracle and the op, selections, out, refusals, bits."""

from __future__ import annotations

import os
import re
import signal
import sys
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import layouts, make, normal, run_python, sdpa_shapes
from hypothesis import given
from hypothesis import strategies as st

import qkv_fast
from qkv_fast import _memory, analysis, attention_weights
from qkv_fast import scaled_dot_product_attention as sdpa

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
STAGES = ["scaled", "softcapped", "masked", "softmax"]


def selected(w: np.ndarray, rows: Any = None, heads: Any = None, lse: Any = None) -> np.ndarray:
    """Return what `attention_weights` selects of the whole."""
    if rows is not None:
        w = w[..., rows if isinstance(rows, slice) else np.array(rows, int), :]
    if heads is not None:
        w = w[..., heads if isinstance(heads, slice) else np.array(heads, int), :, :]
    return w


def check(q: Any, k: Any, **options: Any) -> np.ndarray:
    """Judge weights by the oracle's."""
    gqa = q.ndim > 2 and q.shape[-3] != k.shape[-3]
    given = {name: options.pop(name) for name in ("rows", "heads", "lse") if name in options}
    got = attention_weights(q, k, enable_gqa=gqa, **given, **options)
    real = np.float64 if q.dtype.newbyteorder("=") == np.float64 else np.float32
    assert got.dtype == real
    assert got.dtype.isnative
    exact = selected(oracle.weights(q, k, **options), **given)
    plain = selected(oracle.weights(q, k, **options, real=real), **given)
    largest = 0.0
    if options.get("alibi_slopes") is not None and exact.size:
        ends = np.asarray(options.get("query_offset", 0)) + np.array([[0], [q.shape[-2]]])
        distance = np.abs(ends[..., np.newaxis] - [0, k.shape[-2]]).max()
        largest = float(np.abs(options["alibi_slopes"]).max() * distance)
    if options.get("stage", "softmax") == "softmax":  # a weight is no more exact than its score
        scores = oracle.weights(q, k, **options | {"stage": "softcapped"})
        largest += float(np.abs(scores).max(initial=0, where=np.isfinite(scores)))
    if given.get("lse") is not None and exact.size:
        largest += float(np.abs(given["lse"]).max(initial=0, where=np.isfinite(given["lse"])))
    oracle.assert_error_at_most_twice(got, plain, exact, largest)
    if options.get("stage", "softmax") == "softmax":
        assert not np.signbit(got[got == 0]).any()  # an excluded key has weight 0, not -0
    return got


# --- Agreement ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", sdpa_shapes)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_agrees_with_the_oracle(engine, rng, dtype, shape, causal, stage):
    q, k, _ = make(rng, shape, dtype)
    check(q, k, is_causal=causal, stage=stage)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_number_of_queries_and_keys(engine, rng, dtype):
    for n in [*range(1, 36), 47, 63, 64, 65, 127, 128, 129, 257, 300]:
        q, k, _ = make(rng, (1, 1, 1, n, 40, 8, 8), dtype)
        check(q, k, is_causal=n % 2 == 0)
        q, k, _ = make(rng, (1, 1, 1, 5, n, 9, 8), dtype)
        check(q, k, is_causal=n % 2 == 0, stage=STAGES[n % 4])


@pytest.mark.parametrize("offset", [0, 5, -3, -200, 1000, [3, -2], [0, 170]])
@pytest.mark.parametrize("window", [None, (3, 0), (None, 2), (70, 65)])
@pytest.mark.parametrize("stage", ["masked", "softmax"])
def test_positions(engine, rng, offset, window, stage):
    q, k, _ = make(rng, (2, 2, 1, 70, 290, 16, 16))
    check(q, k, query_offset=offset, window=window, stage=stage)
    check(q, k, query_offset=offset, window=window, stage=stage, is_causal=True)


@pytest.mark.parametrize("shape", [(), (150,), (70, 150), (70, 1), (2, 1, 1, 150), (2, 4, 70, 150)])
@pytest.mark.parametrize("kind", ["bool", "float32", "float64", ">f4", "bfloat16"])
@pytest.mark.parametrize("stage", ["softcapped", "masked", "softmax"])
def test_masks(engine, rng, shape, kind, stage):
    q, k, _ = make(rng, (2, 4, 2, 70, 150, 16, 16))
    mask = np.asarray(rng.random(shape) > 0.4)
    if kind != "bool":
        mask = np.where(mask, rng.standard_normal(shape), -np.inf).astype(kind)
    check(q, k, attn_mask=mask, stage=stage)
    check(q, k, attn_mask=mask, stage=stage, is_causal=True, key_lengths=[150, 70])


@pytest.mark.parametrize("stage", STAGES)
def test_a_bias_beside_a_mask(engine, rng, stage):
    q, k, _ = make(rng, (2, 4, 2, 70, 150, 16, 16))
    bias = np.where(rng.random((4, 70, 150)) > 0.2, normal(rng, (4, 70, 150)), -np.inf)
    check(q, k, attn_bias=bias, stage=stage)
    check(q, k, attn_mask=rng.random((2, 1, 1, 150)) > 0.4, attn_bias=bias, stage=stage)
    check(q, k, attn_mask=normal(rng, (70, 150)), attn_bias=bias, stage=stage, is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_modifiers_together(engine, rng, dtype, stage):
    q, k, _ = make(rng, (2, 4, 2, 70, 290, 24, 24), dtype)
    check(
        q * dtype(4),
        k,
        stage=stage,
        softcap=2.5,
        alibi_slopes=rng.random((2, 4)) * 0.1,
        sinks=rng.standard_normal(4),
        attn_mask=rng.standard_normal((70, 290)).astype(np.float32),
        window=(160, 20),
        query_offset=130,
        key_lengths=[280, 90],
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("causal", [False, True])
def test_any_scale(engine, rng, stage, causal):
    q, k, _ = make(rng, "odd")
    for scale in (0.0, 1.0, -0.7):
        check(q, k, stage=stage, scale=scale, is_causal=causal)


def test_scores_of_integers_are_exact(engine, rng):
    q, k = (rng.integers(-9, 9, (2, n, 40)).astype(np.float32) for n in (70, 150))
    exact = q @ k.swapaxes(-1, -2)
    for stage in ("scaled", "softcapped", "masked"):
        got = attention_weights(q, k, scale=1.0, stage=stage)
        np.testing.assert_array_equal(got, exact)


def test_a_bias_of_finfo_min_is_no_exclusion(engine, rng):
    q, k, _ = make(rng, (1, 2, 2, 70, 150, 16, 16))
    mask = np.where(rng.random((70, 150)) > 0.5, 0, np.finfo(np.float32).min).astype(np.float32)
    mask[5] = np.finfo(np.float32).min
    masked = check(q, k, attn_mask=mask, stage="masked")
    assert np.isfinite(masked).all()
    np.testing.assert_allclose(check(q, k, attn_mask=mask)[:, :, 5], 1 / 150, rtol=1e-6)


@pytest.mark.parametrize(
    "sinks", [[0.0, 0.0], [5.0, -100.0], [-np.inf, 100.0], [np.inf, 1e30], [1000.0, -1e30]]
)
def test_sinks_take_their_share(engine, rng, sinks):
    q, k, _ = make(rng, (1, 2, 2, 70, 190, 16, 16))
    w = check(q, k, sinks=sinks, is_causal=True)
    assert (w.sum(axis=-1) <= 1 + 1e-5).all()


@pytest.mark.parametrize("how", ["rising", "falling", "infinite"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_long_rows_whose_maximum_moves(engine, rng, how, dtype):
    """What was written before is scaled down, once for all."""
    q, k, _ = make(rng, (1, 1, 1, 40, 4500, 16, 16), dtype)
    slope = np.linspace(0, 8, 4500)[:, np.newaxis]
    q, k = np.abs(q), k + (slope * (-1 if how == "falling" else 1)).astype(dtype)
    if how == "infinite":
        k[:, :, 100, 3] = -np.inf
    check(q, k.astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 6, 2, 70, 290, 32, 24), (2, 6, 2, 1, 3000, 32, 24)])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_times_values_are_the_op(engine, rng, dtype, shape, causal):
    q, k, v = make(rng, shape, dtype)
    options = {
        "is_causal": causal,
        "query_offset": shape[4] - shape[3],
        "softcap": 5.0,
        "sinks": np.linspace(-1, 3, 6),
        "enable_gqa": True,
    }
    w = attention_weights(q, k, **options)
    expected = sdpa(q, k, v, **options).astype(float)
    eps = {np.float32: 1e-6, np.float64: 1e-13, np.float16: 2e-3}.get(dtype, 2e-2)
    np.testing.assert_allclose(
        w @ v.repeat(3, axis=1).astype(w.dtype), expected, atol=eps, rtol=eps
    )


@given(data=st.data())
def test_anything_drawn_at_random(data: st.DataObject):
    """Shapes, masks, modifiers and selections; on all engines that are here, in turn."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    hkv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lq, lk = draw(st.integers(0, 90)), draw(st.integers(0, 290))
    dtype = draw(st.sampled_from(DTYPES))
    batch = draw(st.sampled_from([(), (2,), (1, 2)]))
    q, k, _ = make(rng, (1, hkv * group, hkv, lq, lk, draw(st.integers(1, 40)), 1), dtype)
    q, k = (np.broadcast_to(x[0], (*batch, *x.shape[1:])) for x in (q, k))
    heads = draw(st.sampled_from([None, [0], [-1, 0, 0], list(range(hkv * group))[::-1]]))
    rows = draw(st.sampled_from([None, [], list(range(lq))[::-3], [0, 0, lq - 1] if lq else []]))
    options: dict[str, Any] = {
        "stage": draw(st.sampled_from(STAGES)),
        "is_causal": draw(st.booleans()),
        "query_offset": draw(st.integers(-40, 220)),
        "softcap": draw(st.sampled_from([None, 1.5])),
        "sinks": draw(st.sampled_from([None, np.linspace(-1, 2, hkv * group)])),
        "alibi_slopes": draw(st.sampled_from([None, np.linspace(0, 0.5, hkv * group)])),
        "key_lengths": draw(st.sampled_from([None, lk // 2])),
        "window": draw(st.sampled_from([None, (5, 3), (None, 0), (140, None)])),
    }
    allowed = rng.random((hkv * group, lq, lk)) > 0.3
    additive = np.where(allowed, rng.standard_normal(allowed.shape), -np.inf).astype(np.float32)
    options["attn_mask"] = draw(st.sampled_from([None, allowed, additive]))
    options["attn_bias"] = draw(st.sampled_from([None, additive[..., ::-1], additive[:, :1]]))
    begin = rng.integers(-5, lk + 5, (hkv * group, lq))
    end = begin + rng.integers(-9, lk + 1, (lq,))
    ranges = [None, (begin, end), (begin // 4, None), (None, end)]
    options["key_ranges"] = draw(st.sampled_from(ranges))
    for choice in qkv_fast._select.available("bfloat16"):
        with qkv_fast.backend(
            choice.engine, tiles=choice.tiles or "auto", isa=choice.isa or "auto"
        ):
            check(q, k, rows=rows, heads=heads, **options)


# --- Selections ---------------------------------------------------------------------------------


def test_selected_rows_and_heads_are_those_of_the_whole(engine, rng):
    q, k, _ = make(rng, (2, 6, 2, 150, 290, 24, 24))
    options: dict[str, Any] = {
        "enable_gqa": True,
        "is_causal": True,
        "window": (90, None),
        "query_offset": [20, 130],
        "alibi_slopes": np.linspace(0, 0.3, 6),
        "sinks": np.linspace(-1, 2, 6),
        "attn_mask": rng.standard_normal((6, 150, 290)).astype(np.float32),
    }
    for stage in STAGES:
        whole = attention_weights(q, k, stage=stage, **options)
        for heads, rows in [
            (None, slice(None, None, -7)),
            (slice(2, 5), None),
            ([5, 0, 0, -1], [149, 3, 3, -150, 77]),
            (np.array([4], np.uint8), range(64, 129)),
            ([], [1]),
            ([1], slice(9, 9)),
        ]:
            got = attention_weights(q, k, stage=stage, heads=heads, rows=rows, **options)
            expected = selected(whole, rows, heads)
            assert got.shape == expected.shape
            if engine.tiles == "simd":  # neither NumPy's products nor BLAS' promise these bits
                np.testing.assert_array_equal(got, expected)
            else:
                np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("many_cpus")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", ["masked", "softmax"])
@pytest.mark.parametrize("size", [(300, 700), (130, 4500)], ids=str)
def test_threads_and_batch_change_no_bit(engine, rng, dtype, stage, size):
    q, k, _ = make(rng, (2, 4, 2, *size, 64, 64), dtype)
    options: dict[str, Any] = {"stage": stage, "is_causal": True, "query_offset": 400}
    one = attention_weights(q, k, enable_gqa=True, num_threads=1, **options)
    for threads in (2, 3, 7):
        many = attention_weights(q, k, enable_gqa=True, num_threads=threads, **options)
        np.testing.assert_array_equal(many, one)
    alone = attention_weights(q[1], k[1], enable_gqa=True, **options)
    np.testing.assert_array_equal(alone, one[1])


# --- Known log-sum-exps -------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 2, 40])
def test_a_key_that_a_mask_excludes_has_no_weight_beside_nan(engine, queries):
    mask = np.zeros((1, 1, queries, 37))
    mask[..., 0], mask[..., 1], mask[..., 20] = np.nan, -np.inf, -np.inf
    q, k = np.ones((1, 1, queries, 2)), np.ones((1, 1, 37, 2))
    weights = attention_weights(q, k, mask)
    excluded = mask == -np.inf
    assert (weights[excluded] == 0).all()
    assert np.isnan(weights[~excluded]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_known_lse_far_below_the_scores_leaves_finite_sums(engine, dtype):
    """Rounding leaves that: a unit in the last place of scores of 10^9 is 64."""
    q, k = np.zeros((3, 40, 5), dtype), np.zeros((3, 70, 5), dtype)
    lse = np.full((3, 40), -1e4, dtype)
    np.testing.assert_allclose(attention_weights(q, k, lse=lse), 2.0**64, rtol=1e-6)
    received = analysis.attention_received(q, k, lse=lse)
    np.testing.assert_allclose(received, 40 * 2.0**64, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sinks", [None, [1.0, -2.0, 0.5, 3.0]])
def test_a_known_lse_gives_the_same_weights(engine, rng, dtype, sinks):
    q, k, v = make(rng, (2, 4, 2, 70, 290, 24, 24), dtype)
    options = {"is_causal": True, "query_offset": -5, "sinks": sinks}
    exact = np.float64 if dtype == np.float64 else np.float32  # bfloat16's own lse is off by 3e-6
    wide = (x.astype(exact) for x in (q, k, v))
    lse = sdpa(*wide, enable_gqa=True, return_lse=True, **options)[1]
    before = lse.copy()
    check(q, k, lse=lse, **options)
    rows, heads = [69, 0, 33], [2, 2, 0]
    check(q, k, lse=lse, rows=rows, heads=heads, **options)
    np.testing.assert_array_equal(lse, before)
    check(q[0, 0], k[0, 0], lse=lse[0, 0], **options | {"sinks": None})


def test_an_lse_over_more_keys_gives_a_part_its_share(engine, rng):
    q, k, v = make(rng, (1, 2, 2, 70, 290, 24, 24))
    parts = [slice(0, 100), slice(100, 290)]
    answers = [sdpa(q, k[:, :, i], v[:, :, i], return_lse=True) for i in parts]
    lse = qkv_fast.merge_attention(*zip(*answers, strict=True))[1]
    shares = [attention_weights(q, k[:, :, i], lse=lse) for i in parts]
    np.testing.assert_allclose(np.concatenate(shares, -1), oracle.weights(q, k), atol=1e-6)


# --- What is not finite, and nothing at all -----------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("how", ["causal", "bool", "-inf", "window", "key_lengths"])
@pytest.mark.parametrize("stage", ["masked", "softmax"])
def test_excluded_keys_have_no_influence(engine, rng, bad, how, stage):
    q, k, _ = make(rng, (1, 2, 2, 70, 130, 16, 16))
    options: dict[str, Any] = {
        "causal": {"is_causal": True, "query_offset": 20},
        "bool": {"attn_mask": rng.random((70, 130)) > 0.5},
        "-inf": {"attn_mask": np.where(rng.random((70, 130)) > 0.5, 0, -np.inf)},
        "window": {"window": (3, 9), "query_offset": 15},
        "key_lengths": {"key_lengths": 99},
    }[how]
    clean = attention_weights(q, k, stage=stage, **options)
    seen = attention_weights(q, k, stage="masked", **options) > -np.inf
    k[0, 1, 41], k[0, 0, 99, 3] = bad, bad
    got = attention_weights(q, k, stage=stage, **options)
    untouched = np.ones((1, 2, 70), bool)
    untouched[0, 1] = ~seen[0, 1, :, 41]
    untouched[0, 0] = ~seen[0, 0, :, 99]
    assert untouched.any()
    assert not untouched.all()
    np.testing.assert_array_equal(got[untouched], clean[untouched])
    np.testing.assert_array_equal(got[~seen], -np.inf if stage == "masked" else 0)


def test_keys_past_key_lengths_are_not_read(engine, rng):
    q, k, _ = make(rng, (2, 2, 1, 33, 150, 16, 16))
    for stage in STAGES:
        clean = check(q, k, key_lengths=[149, 3], stage=stage)
        poisoned = k.copy()
        poisoned[0, :, 149:] = poisoned[1, :, 3:] = np.nan
        got = attention_weights(q, poisoned, key_lengths=[149, 3], stage=stage, enable_gqa=True)
        np.testing.assert_array_equal(got, clean)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("place", ["q", "k"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("stage", STAGES)
def test_infinities_give_what_the_formula_gives(engine, rng, dtype, place, bad, stage):
    q, k = (np.abs(x) for x in make(rng, (1, 1, 1, 20, 270, 8, 8), dtype)[:2])
    {"q": q, "k": k}[place][0, 0, 3, 2] = bad
    check(q, k, stage=stage)


@pytest.mark.parametrize("how", ["bool", "-inf", "key_lengths", "causal", "window"])
def test_rows_without_keys_are_zero(engine, rng, how):
    q, k, v = make(rng, (1, 2, 2, 70, 130, 16, 16))
    blind = np.zeros((70, 130), bool)
    blind[::3] = True
    options: dict[str, Any] = {
        "bool": {"attn_mask": ~blind},
        "-inf": {"attn_mask": np.where(blind, -np.inf, 0).astype(np.float32)},
        "key_lengths": {"key_lengths": 0},
        "causal": {"is_causal": True, "query_offset": -10},
        "window": {"window": (5, 5), "query_offset": 100},
    }[how]
    lse = sdpa(q, k, v, return_lse=True, **options)[1]
    for known in (None, lse):
        w = check(q, k, **options, **({} if known is None else {"lse": known}))
        assert (w[lse == -np.inf] == 0).all()
    masked = check(q, k, stage="masked", **options)
    assert (masked[lse == -np.inf] == -np.inf).all()


@pytest.mark.parametrize(
    "shape",
    [
        (0, 2, 2, 3, 4, 5, 6),
        (2, 0, 0, 3, 4, 5, 6),
        (2, 2, 2, 0, 4, 5, 6),
        (2, 2, 2, 3, 0, 5, 6),
        (0, 2, 2, 0, 0, 5, 6),
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_empty_axes(engine, rng, shape, stage):
    q, k, _ = make(rng, shape)
    assert check(q, k, stage=stage).shape == (*q.shape[:-1], k.shape[-2])


# --- Memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("layout", list(layouts(np.zeros((1, 1, 1, 1), "f4"))))
def test_any_layout_gives_the_same_answer(engine, rng, dtype, layout):
    q, k, _ = make(rng, (2, 2, 2, 35, 170, 24, 20), dtype)
    mask = rng.standard_normal((2, 2, 35, 170)).astype(dtype)
    expected = attention_weights(q, k, mask, is_causal=True, query_offset=99)
    for i in range(3):
        mixed = [layouts(x)[layout] if i == j else x for j, x in enumerate((q, k, mask))]
        got = attention_weights(*mixed, is_causal=True, query_offset=99)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    for name, out in layouts(np.zeros_like(expected)).items():
        assert attention_weights(q, k, mask, is_causal=True, query_offset=99, out=out) is out
        np.testing.assert_array_equal(out, expected, name)


def test_out_may_overlap_anything(engine, rng):
    arena = normal(rng, (3, 2, 70, 70))
    rows = np.arange(70)[::-1]
    for place in (0, 1, 2):
        for options in ({}, {"rows": rows}, {"heads": [1, 0]}):
            q, k, mask = memory = arena.copy()
            expected = attention_weights(q, k, mask, **options)
            out = memory[place]
            assert attention_weights(q, k, mask, out=out, **options) is out
            np.testing.assert_array_equal(out, expected)
    flat = normal(rng, (20_000,))
    q, k = (flat[i : i + 4900].reshape(1, 70, 70) for i in (0, 100))
    expected = attention_weights(q, k)
    out = flat[37 : 37 + 4900].reshape(1, 70, 70)
    np.testing.assert_array_equal(attention_weights(q, k, out=out), expected)
    q, k, v = make(rng, (1, 2, 2, 70, 70, 24, 24))
    q, k, lse = q[0], k[0], sdpa(q, k, v, return_lse=True)[1][0]
    expected = attention_weights(q, k, lse=lse)
    out = np.zeros((2, 70, 70), np.float32)
    out[0, 0] = lse[0]
    np.testing.assert_array_equal(attention_weights(q[:1], k[:1], lse=out[0, :1], out=out[:1]),
                                  expected[:1])  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("stage", STAGES)
def test_nothing_around_out_is_written(engine, rng, dtype, stage):
    q, k, _ = make(rng, (1, 2, 2, 37, 133, 16, 16), dtype)
    around = np.full((2, 41, 150), 77, dtype)
    out = around[:, 2:39, 9:142]
    expected = attention_weights(q[0], k[0], is_causal=True, stage=stage)
    assert attention_weights(q[0], k[0], is_causal=True, stage=stage, out=out) is out
    np.testing.assert_array_equal(out, expected)
    out[...] = 77
    assert (around == 77).all()


def test_bfloat16_as_bit_patterns(engine, rng):
    q, k = (rng.standard_normal((2, 70, 40)).astype(ml_dtypes.bfloat16) for _ in range(2))
    expected = attention_weights(q, k)
    got = attention_weights(q.view(np.uint16), k.view(np.uint16), dtype="bfloat16")
    np.testing.assert_array_equal(got, expected)


def test_broadcast_batch_axes_and_two_axes(engine, rng):
    q, k = normal(rng, (3, 1, 2, 5, 8)), normal(rng, (4, 2, 9, 8))
    got = attention_weights(q, k)
    assert got.shape == (3, 4, 2, 5, 9)
    np.testing.assert_array_equal(got[2, 1], attention_weights(q[2, 0], k[1]))
    alone = attention_weights(q[0, 0, 0], k[0, 0])
    assert alone.shape == (5, 9)
    np.testing.assert_array_equal(alone, got[0, 0, 0])
    assert attention_weights(q[0, 0, 0], k[0, 0], rows=[3]).shape == (1, 9)


def test_the_available_memory(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:     5000 kB\n")
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("4096\n")
    places = [str(tmp_path / name) for name in ("meminfo", "max", "limit", "none")]
    assert _memory.available_memory(places[0], places[1]) == 5000 * 1024
    assert _memory.available_memory(places[0], places[2]) == 4096
    assert _memory.available_memory(places[3], places[3]) is None


# --- Refusals -----------------------------------------------------------------------------------

Q = np.ones((2, 4, 5, 8), np.float32)
K = np.ones((2, 4, 7, 8), np.float32)
OUT = np.full((2, 4, 5, 7), 77, np.float32)
LONG = np.broadcast_to(np.float32(1), (1, 12, 10**6, 64))
REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "stage is 'soft': it must be one of scaled, softcapped, masked, softmax",
     {"stage": "soft"}),
    (ValueError, "stage is None", {"stage": None}),
    (ValueError, "rows holds 5: each must be from -5 to 4", {"rows": [0, 5]}),
    (ValueError, "heads holds -5: each must be from -4 to 3", {"heads": [-5]}),
    (TypeError, "rows must be ints or a slice, not a float", {"rows": 1.5}),
    (TypeError, "rows must be ints along one axis or a slice, not of shape", {"rows": 3}),
    (TypeError, "heads must be ints or a slice, not an array of bool", {"heads": np.ones(4, bool)}),
    (TypeError, "rows is slice.*: a slice must be of ints", {"rows": slice(0.5, 2)}),
    (ValueError, "heads is given, but query and key have no axis of heads",
     {"query": Q[0, 0], "key": K[0, 0], "heads": [0]}),
    (ValueError, r"lse has shape \(5,\): that of all rows is needed.* = \(2, 4, 5\)",
     {"lse": np.ones(5)}),
    (ValueError, "lse is given for the stage 'masked'",
     {"lse": np.ones((2, 4, 5)), "stage": "masked"}),
    (TypeError, "lse has dtype", {"lse": np.ones((2, 4, 5), complex)}),
    (ValueError, r"out has shape \(2, 4, 5, 7\): the result's shape is \(2, 1, 5, 7\)",
     {"heads": [1], "out": OUT}),
    (TypeError, "out has dtype float64: the result's dtype is float32", {"out": OUT.astype("f8")}),
    (TypeError, "out must be a NumPy array or a tensor", {"out": OUT.tolist()}),
    (TypeError, "float32, float64", {"key": K.astype(float)}),
    (TypeError, "key is a list: pass a NumPy array", {"key": K.tolist()}),
    (ValueError, r"key has shape \(\)", {"key": np.float32(1)}),
    (ValueError, "key has length 6 on axis -1, but query has 8", {"key": K[..., :6]}),
    (ValueError, "enable_gqa=True", {"key": K[:, :2]}),
    (ValueError, r"attn_mask has shape \(6, 7\)", {"attn_mask": np.ones((6, 7), bool)}),
    (ValueError, "softcap is -1", {"softcap": -1.0}),
    (ValueError, "key_lengths holds 8", {"key_lengths": 8}),
    (MemoryError, r"\(1, 12, 1000000, 1000000\) take 48000.0 GB, but .* rows= and heads=",
     {"query": LONG, "key": LONG}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "arguments"), REFUSED, ids=[r[1] for r in REFUSED])
def test_refusals(engine, error, message, arguments):
    given = {"query": Q, "key": K} | arguments
    with pytest.raises(error) as caught:
        attention_weights(**given)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert (OUT == 77).all()


def test_a_read_only_out_is_refused(engine):
    out = OUT.copy()
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        attention_weights(Q, K, out=out)


def test_weights_beyond_memory_can_be_had_by_rows(engine):
    """Of a million tokens, without a pass over the other rows."""
    length = 1 << 17
    q = np.broadcast_to(np.float32(1), (1, 2, length, 8))
    w = attention_weights(q, q, is_causal=True, rows=[-1, 9], heads=[1])
    assert w.shape == (1, 1, 2, length)
    np.testing.assert_allclose(w[0, 0, 0], 1 / length, rtol=1e-5)
    np.testing.assert_allclose(w[0, 0, 1, :10], 0.1, rtol=1e-6)
    assert not w[0, 0, 1, 10:].any()


INTERRUPTED = """
import os, signal, threading, time
import numpy as np, qkv_fast

signal.signal(signal.SIGINT, signal.default_int_handler)
query = np.broadcast_to(np.float32(1), (1, 8, 1 << 13, 16384))
small = np.ones((1, 2, 9, 8), np.float32)
qkv_fast.attention_weights(small, small)
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
begin = time.perf_counter()
try:
    qkv_fast.attention_weights(query, query[:, :, :4096], num_threads=2)
except KeyboardInterrupt:
    waited = time.perf_counter() - begin - 0.3
    print("interrupted", waited < 10, (qkv_fast.attention_weights(small, small) > 0).all())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_ctrl_c_ends_a_call(native):
    assert hasattr(signal, "SIGINT")
    done = run_python(INTERRUPTED, **{k: v for k, v in os.environ.items() if k.startswith("QKV_")})
    assert done.stdout.split() == ["interrupted", "True", "True"], done.stderr


def test_tensors_of_torch(engine, rng):
    torch = pytest.importorskip("torch")
    q, k = (torch.from_numpy(normal(rng, (1, 2, n, 8))) for n in (5, 9))
    expected = attention_weights(q.numpy(), k.numpy())
    np.testing.assert_array_equal(attention_weights(q, k), expected)
    out = torch.empty((1, 2, 5, 9))
    assert attention_weights(q, k, out=out) is out
    np.testing.assert_array_equal(out.numpy(), expected)
    half = attention_weights(q.to(torch.bfloat16), k.to(torch.bfloat16))
    np.testing.assert_allclose(half, expected, atol=0.02)
