"""qkv_fast.analysis of queries and keys: agreement with the oracle, bits, memory, refusals."""

from __future__ import annotations

import os
import re
import signal
import sys
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import statistics_oracle
from helpers import layouts, make, normal, run_python, sdpa_shapes
from hypothesis import given
from hypothesis import strategies as st

import qkv_fast
from qkv_fast import analysis, attention_weights
from qkv_fast import scaled_dot_product_attention as sdpa
from qkv_fast.analysis import attention_received, attention_statistics

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
SHARES = ["on_first", "on_self", "on_previous", "on_next"]


def real_of(q: np.ndarray) -> Any:
    return np.float64 if q.dtype.newbyteorder("=") == np.float64 else np.float32


def largest_score(q: Any, k: Any, options: dict[str, Any]) -> float:
    """Return the size of the scores: a weight is no more exact than the score that it has."""
    options = {n: x for n, x in options.items() if n not in ("rows", "heads", "lse")}
    scores = oracle.weights(q, k, **options | {"stage": "masked"})
    largest = float(np.abs(scores).max(initial=0, where=np.isfinite(scores)))
    return largest if largest < 1e30 else 0.0  # a bias of finfo.min


def check_received(q: Any, k: Any, lse: Any = None, **options: Any) -> np.ndarray:
    """Judge what the keys receive by the oracle's weights."""
    gqa = q.ndim > 2 and q.shape[-3] != k.shape[-3]
    got = attention_received(q, k, enable_gqa=gqa, lse=lse, **options)
    assert got.dtype == real_of(q)
    exact = statistics_oracle.received(q, k, **options)
    plain = statistics_oracle.received(q, k, **options, real=real_of(q))
    size = largest_score(q, k, options)
    if lse is not None:
        size += float(np.abs(lse).max(initial=0, where=np.isfinite(lse)))
    oracle.assert_error_at_most_twice(got, plain, exact, size)
    return got


def check_statistics(q: Any, k: Any, **options: Any) -> analysis.Statistics:
    """Judge the statistics of the queries by those of the oracle's weights."""
    gqa = q.ndim > 2 and q.shape[-3] != k.shape[-3]
    got = attention_statistics(q, k, enable_gqa=gqa, **options)
    exact = statistics_oracle.statistics(q, k, **options)
    plain = statistics_oracle.statistics(q, k, **options, real=real_of(q))
    size = largest_score(q, k, options)
    for name in got._fields:
        if name == "max_key":
            continue
        numbers = getattr(got, name)
        assert numbers.dtype == real_of(q)
        assert numbers.flags.c_contiguous
        judged = numbers, plain[name], exact[name]
        assert numbers.shape == exact[name].shape
        if name in ("max_weight", *SHARES):  # a few weights are as exact as all of a call are
            others = plain["weights"].ravel(), plain["weights"].ravel(), exact["weights"].ravel()
            judged = tuple(
                np.concatenate([x.ravel(), y]) for x, y in zip(judged, others, strict=True)
            )
        oracle.assert_error_at_most_twice(*judged, size)
    check_max_key(got, exact["weights"], 1e-13 if real_of(q) is np.float64 else 1e-5 + size * 1e-7)
    return got


def check_max_key(got: analysis.Statistics, weights: np.ndarray, tolerance: float) -> None:
    """Check that max_key is the key of a weight that is the largest up to rounding."""
    assert got.max_key.dtype == np.int64
    largest = weights.max(axis=-1, initial=0)
    known = got.max_key >= 0
    assert not known[np.isnan(largest)].any()
    sinks_take_all = known & (largest == 0)
    assert (known | ~(largest > 0)).all()
    compared = known & ~sinks_take_all
    if compared.any():
        number = np.maximum(got.max_key, 0)[..., np.newaxis]
        at = np.take_along_axis(weights, number, axis=-1)[..., 0]
        assert (at[compared] >= (1 - tolerance) * largest[compared]).all()


def check(q: Any, k: Any, **options: Any) -> None:
    check_received(q, k, **options)
    check_statistics(q, k, **options)


# --- Agreement ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", sdpa_shapes)
@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_the_oracle(engine, rng, dtype, shape, causal):
    q, k, _ = make(rng, shape, dtype)
    check(q, k, is_causal=causal)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_number_of_queries_and_keys(engine, rng, dtype):
    for n in [*range(1, 36), 47, 63, 64, 65, 127, 128, 129, 257, 300]:
        q, k, _ = make(rng, (1, 1, 1, n, 40, 8, 8), dtype)
        check(q, k, is_causal=n % 2 == 0)
        q, k, _ = make(rng, (1, 1, 1, 5, n, 9, 8), dtype)
        check(q, k, is_causal=n % 2 == 0, query_offset=n - 3)


@pytest.mark.parametrize("offset", [0, 5, -3, -200, 1000, [3, -2], [0, 170]])
@pytest.mark.parametrize("window", [None, (3, 0), (None, 2), (70, 65)])
def test_positions(engine, rng, offset, window):
    q, k, _ = make(rng, (2, 2, 1, 70, 290, 16, 16))
    check(q, k, query_offset=offset, window=window)
    check(q, k, query_offset=offset, window=window, is_causal=True)


def test_a_query_at_every_end_of_a_block(engine, rng):
    """Its last key may be the only one that it sees of a block, or of a task's keys."""
    q, k, _ = make(rng, (1, 2, 1, 1, 600, 16, 16))
    for offset in (15, 16, 127, 128, 129, 255, 256, 257, 511, 512, 513):
        check(q, k, is_causal=True, query_offset=offset)
        check(q, k, window=(0, 1), query_offset=offset)
        check(q, k, window=(1, 0), query_offset=offset)


@pytest.mark.parametrize("shape", [(150,), (70, 150), (70, 1), (2, 1, 1, 150), (2, 4, 70, 150)])
@pytest.mark.parametrize("kind", ["bool", "float32", "float64", ">f4", "bfloat16"])
def test_masks(engine, rng, shape, kind):
    q, k, _ = make(rng, (2, 4, 2, 70, 150, 16, 16))
    mask = np.asarray(rng.random(shape) > 0.4)
    if kind != "bool":
        mask = np.where(mask, rng.standard_normal(shape), -np.inf).astype(kind)
    check(q, k, attn_mask=mask)
    check(q, k, attn_mask=mask, is_causal=True, key_lengths=[150, 70])


@pytest.mark.parametrize("causal", [False, True])
def test_ranges_of_keys_and_a_bias(engine, rng, causal):
    q, k, _ = make(rng, (2, 4, 2, 70, 150, 24, 24))
    ranges = {
        "documents": (np.arange(70) // 20 * 30, np.arange(70) // 20 * 30 + 30),
        "each head": (None, rng.integers(-3, 160, (4, 1))),
        "some rows see none": (rng.integers(0, 150, (2, 1, 70)), rng.integers(0, 150, 70)),
    }
    bias = normal(rng, (4, 70, 150))
    mask = rng.random((2, 1, 1, 150)) < 0.8
    for key_ranges in ranges.values():
        check(q, k, is_causal=causal, query_offset=20, key_ranges=key_ranges)
        check(q, k, attn_mask=mask, is_causal=causal, key_ranges=key_ranges, attn_bias=bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_modifiers_together(engine, rng, dtype):
    q, k, _ = make(rng, (2, 4, 2, 70, 290, 24, 24), dtype)
    check(
        q * dtype(4),
        k,
        softcap=2.5,
        alibi_slopes=rng.random((2, 4)) * 0.1,
        sinks=rng.standard_normal(4),
        attn_mask=rng.standard_normal((70, 290)).astype(np.float32),
        window=(160, 20),
        query_offset=130,
        key_lengths=[280, 90],
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.7])
def test_any_scale(engine, rng, causal, scale):
    q, k, _ = make(rng, "odd")
    check(q, k, scale=scale, is_causal=causal)


@pytest.mark.parametrize(
    "sinks", [[0.0, 0.0], [5.0, -100.0], [-np.inf, 100.0], [np.inf, 1e30], [1000.0, -1e30]]
)
def test_sinks_take_their_share_of_weights_alone(engine, rng, sinks):
    q, k, _ = make(rng, (1, 2, 2, 70, 190, 16, 16))
    check_received(q, k, sinks=sinks, is_causal=True)
    got = check_statistics(q, k, sinks=sinks, is_causal=True)
    without = check_statistics(q, k, is_causal=True)
    for name in ("entropy", "max_key", "mean_distance"):
        np.testing.assert_array_equal(getattr(got, name), getattr(without, name))


def test_a_bias_of_finfo_min_is_no_exclusion(engine, rng):
    q, k, _ = make(rng, (1, 2, 2, 70, 150, 16, 16))
    mask = np.where(rng.random((70, 150)) > 0.5, 0, np.finfo(np.float32).min).astype(np.float32)
    mask[5] = np.finfo(np.float32).min
    check_received(q, k, attn_mask=mask)
    got = check_statistics(q, k, attn_mask=mask)
    np.testing.assert_allclose(got.entropy[:, :, 5], np.log2(150), rtol=1e-6)
    np.testing.assert_array_equal(got.max_key[:, :, 5], 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blocks_of_finfo_min_before_others(engine, rng, dtype):
    """Such weights become 0 when a score follows; their scores are as far off as reals can be."""
    q, k, _ = make(rng, (1, 2, 2, 20, 700, 16, 16), dtype)
    mask = np.zeros((20, 700), dtype)
    mask[:, :500] = np.finfo(dtype).min
    check(q, k, attn_mask=mask)


@pytest.mark.parametrize("how", ["rising", "falling", "infinite"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_long_rows_whose_maximum_moves(engine, rng, how, dtype):
    """What was summed before is scaled down, whenever a larger score comes."""
    q, k, _ = make(rng, (1, 1, 1, 40, 4500, 16, 16), dtype)
    slope = np.linspace(0, 8, 4500)[:, np.newaxis]
    q, k = np.abs(q), k + (slope * (-1 if how == "falling" else 1)).astype(dtype)
    if how == "infinite":
        k[:, :, 100, 3] = -np.inf
    check(q, k.astype(dtype))


def test_the_first_of_equal_weights_is_the_largest(engine):
    """Of all keys, of those of a window, and where the largest comes twice."""
    q = np.zeros((1, 300, 8), np.float32)
    for options, first in [
        ({}, np.zeros(300)),
        ({"window": (2, 0)}, np.maximum(np.arange(300) - 2, 0)),
        ({"scale": 0.0, "is_causal": True}, np.zeros(300)),
    ]:
        got = attention_statistics(q, q + 1, **options)
        np.testing.assert_array_equal(got.max_key[0], first)
    k = np.zeros((1, 700, 8), np.float32)
    k[:, [41, 42, 300]] = 1
    got = attention_statistics(q + 1, k)
    np.testing.assert_array_equal(got.max_key, 41)
    got = attention_statistics(q + np.float32(0.7), k * np.float32(1.3), scale=0.3)
    np.testing.assert_array_equal(got.max_key, 41)


def test_uniform_weights_have_known_statistics(engine):
    """n equal weights: log2(n) bits, 1 / n each; causal rows are (n - 1) / 2 away on average."""
    length = 5000
    q = np.zeros((1, length, 4), np.float32)
    got = attention_statistics(q, q, is_causal=True)
    n = np.arange(1, length + 1)[np.newaxis]
    np.testing.assert_allclose(got.entropy, np.log2(n), rtol=3e-7, atol=1e-7)
    np.testing.assert_allclose(got.mean_distance, (n - 1) / 2, rtol=1e-6)
    for name in ("max_weight", "on_first", "on_self"):
        np.testing.assert_allclose(getattr(got, name), 1 / n, rtol=1e-6)
    np.testing.assert_allclose(got.on_previous[:, 1:], 1 / n[:, 1:], rtol=1e-6)
    assert got.on_previous[0, 0] == 0
    assert not got.on_next.any()


def test_sums_over_many_queries_stay_exact(engine):
    """2^17 equal weights: a plain float32 sum of them is off by 1e-4."""
    q = np.broadcast_to(np.float32(1), (1, 1 << 17, 4))
    k = np.ones((1, 3, 4), np.float32)
    np.testing.assert_allclose(attention_received(q, k), (1 << 17) / 3, rtol=2e-7)


def test_received_are_the_summed_weights(engine, rng):
    q, k, _ = make(rng, (2, 6, 2, 150, 290, 32, 24))
    options: dict[str, Any] = {"is_causal": True, "query_offset": 140, "enable_gqa": True}
    w = attention_weights(q, k, **options)
    got = attention_received(q, k, **options)
    np.testing.assert_allclose(got, w.sum(axis=-2, dtype=float), rtol=1e-5)


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
    options: dict[str, Any] = {
        "heads": draw(st.sampled_from([None, [0], [-1, 0, 0], list(range(hkv * group))[::-1]])),
        "rows": draw(
            st.sampled_from([None, [], list(range(lq))[::-3], [0, 0, lq - 1] if lq else []])
        ),
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
    for choice in qkv_fast._select.available("bfloat16"):
        with qkv_fast.backend(
            choice.engine, tiles=choice.tiles or "auto", isa=choice.isa or "auto"
        ):
            check(q, k, **options)


# --- Selections and bits ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "heads"),
    [
        (slice(-32, None), None),
        (slice(None, None, -7), slice(2, 5)),
        ([149, 3, 3, -150, 77], [5, 0, 0, -1]),
        (None, [4]),
        ([], [1]),
        ([1], []),
    ],
)
def test_selected_rows_and_heads(engine, rng, rows, heads):
    q, k, _ = make(rng, (2, 6, 2, 150, 190, 24, 24))
    options: dict[str, Any] = {
        "is_causal": True,
        "window": (90, None),
        "query_offset": [20, 130],
        "alibi_slopes": np.linspace(0, 0.3, 6),
        "sinks": np.linspace(-1, 2, 6),
        "attn_mask": rng.standard_normal((6, 150, 190)).astype(np.float32),
    }
    check(q, k, rows=rows, heads=heads, **options)


@pytest.mark.usefixtures("many_cpus")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(300, 700), (130, 4500), (33, 2500)], ids=str)
def test_threads_and_batch_change_no_bit(engine, rng, dtype, size):
    q, k, _ = make(rng, (2, 4, 2, *size, 64, 64), dtype)
    options: dict[str, Any] = {"is_causal": True, "query_offset": 400, "enable_gqa": True}
    for function in (attention_received, attention_statistics):
        one = np.array(function(q, k, num_threads=1, **options))
        for threads in (2, 3, 7):
            many = np.array(function(q, k, num_threads=threads, **options))
            np.testing.assert_array_equal(many, one)
        alone = np.array(function(q[1], k[1], **options))
        np.testing.assert_array_equal(alone, one[..., 1, :, :])


# --- Known log-sum-exps -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sinks", [None, [1.0, -2.0, 0.5, 3.0]])
def test_a_known_lse_gives_the_same_sums(engine, rng, dtype, sinks):
    q, k, v = make(rng, (2, 4, 2, 70, 290, 24, 24), dtype)
    options = {"is_causal": True, "query_offset": -5, "sinks": sinks}
    exact = np.float64 if dtype == np.float64 else np.float32  # bfloat16's own lse is off by 3e-6
    wide = (x.astype(exact) for x in (q, k, v))
    lse = sdpa(*wide, enable_gqa=True, return_lse=True, **options)[1]
    assert (lse == -np.inf).any()
    before = lse.copy()
    check_received(q, k, lse=lse, **options)
    check_received(q, k, lse=lse, rows=[69, 0, 33], heads=[2, 2, 0], **options)
    np.testing.assert_array_equal(lse, before)
    check_received(q[0, 0], k[0, 0], lse=lse[0, 0], **options | {"sinks": None})


def test_an_lse_over_more_keys_gives_a_part_its_share(engine, rng):
    q, k, v = make(rng, (1, 2, 2, 70, 290, 24, 24))
    parts = [slice(0, 100), slice(100, 290)]
    answers = [sdpa(q, k[:, :, i], v[:, :, i], return_lse=True) for i in parts]
    lse = qkv_fast.merge_attention(*zip(*answers, strict=True))[1]
    shares = [attention_received(q, k[:, :, i], lse=lse) for i in parts]
    exact = statistics_oracle.received(q, k)
    np.testing.assert_allclose(np.concatenate(shares, -1), exact, rtol=1e-5)


def test_an_lse_that_is_too_small_gives_more_than_all(engine, rng):
    """Weights are exp(score - lse), whatever the lse."""
    q, k, _ = make(rng, (1, 2, 2, 70, 290, 24, 24))
    lse = np.full((1, 2, 70), -1.0)
    scores = oracle.weights(q, k, stage="masked")
    got = attention_received(q, k, lse=lse)
    np.testing.assert_allclose(got, np.exp(scores + 1).sum(axis=-2), rtol=1e-5)


# --- What is not finite, and nothing at all -----------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("how", ["causal", "bool", "-inf", "window", "key_lengths"])
def test_excluded_keys_have_no_influence(engine, rng, bad, how):
    q, k, _ = make(rng, (1, 2, 2, 70, 130, 16, 16))
    options: dict[str, Any] = {
        "causal": {"is_causal": True, "query_offset": 20},
        "bool": {"attn_mask": rng.random((70, 130)) > 0.5},
        "-inf": {"attn_mask": np.where(rng.random((70, 130)) > 0.5, 0, -np.inf)},
        "window": {"window": (3, 9), "query_offset": 15},
        "key_lengths": {"key_lengths": 99},
    }[how]
    clean = attention_statistics(q, k, **options)
    seen = attention_weights(q, k, stage="masked", **options) > -np.inf
    k[0, 1, 41], k[0, 0, 99, 3] = bad, bad
    got = attention_statistics(q, k, **options)
    touched = np.stack([seen[0, 0, :, 99], seen[0, 1, :, 41]])[np.newaxis]
    for one, other in zip(got, clean, strict=True):
        np.testing.assert_array_equal(one[~touched], other[~touched])
    received = attention_received(q, k, **options)
    affected = (seen & touched[..., np.newaxis]).any(axis=-2)  # keys of rows that are touched
    w = attention_weights(q, k, **options).sum(axis=-2, dtype=float)
    np.testing.assert_allclose(received, w, rtol=1e-5, atol=1e-6)
    assert np.isfinite(received[~affected]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("place", ["q", "k"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("causal", [False, True])
def test_infinities_give_what_the_formula_gives(engine, rng, dtype, place, bad, causal):
    q, k = (np.abs(x) for x in make(rng, (1, 1, 1, 20, 270, 8, 8), dtype)[:2])
    {"q": q, "k": k}[place][0, 0, 3, 2] = bad
    check(q, k, is_causal=causal)


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
    none = lse == -np.inf
    assert none.any()
    check_received(q, k, **options)
    check_received(q, k, lse=lse, **options)
    got = check_statistics(q, k, **options)
    for name in got._fields:
        expected = -1 if name == "max_key" else 0
        assert (getattr(got, name)[none] == expected).all()
        assert not np.signbit(getattr(got, name)[none]).any() or name == "max_key"
    assert (got.max_key[~none] >= 0).all()


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
def test_empty_axes(engine, rng, shape):
    q, k, _ = make(rng, shape)
    assert check_received(q, k).shape == (*q.shape[:-2], k.shape[-2])
    got = check_statistics(q, k)
    assert got.max_key.shape == q.shape[:-1]
    assert (got.max_key == (-1 if shape[4] == 0 else 0)).all() or shape[4] > 0


# --- Memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("layout", list(layouts(np.zeros((1, 1, 1, 1), "f4"))))
def test_any_layout_gives_the_same_answer(engine, rng, dtype, layout):
    q, k, _ = make(rng, (2, 2, 2, 35, 170, 24, 20), dtype)
    mask = rng.standard_normal((2, 2, 35, 170)).astype(dtype)
    options: dict[str, Any] = {"is_causal": True, "query_offset": 99}
    expected = attention_received(q, k, mask, **options)
    statistics = np.array(attention_statistics(q, k, mask, **options))
    for i in range(3):
        mixed = [layouts(x)[layout] if i == j else x for j, x in enumerate((q, k, mask))]
        got = attention_received(*mixed, **options)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        got = np.array(attention_statistics(*mixed, **options))
        np.testing.assert_allclose(got, statistics, rtol=1e-5, atol=1e-6)


def test_out_of_any_layout(engine, rng):
    q, k, _ = make(rng, (2, 2, 2, 35, 170, 24, 20))
    expected = attention_received(q, k)
    for name, four in layouts(np.zeros((2, 1, 2, 170), np.float32)).items():
        out = four[:, 0]
        assert attention_received(q, k, out=out) is out
        np.testing.assert_array_equal(out, expected, name)
    for out in (k[:, :, :, 3], q[0, 0].repeat(8)[: 2 * 2 * 170].reshape(2, 2, 170)):
        attention_received(q, k, out=out)  # a part of key, which is read until the end
        np.testing.assert_array_equal(out, expected)
        q, k, _ = make(np.random.default_rng(20261120), (2, 2, 2, 35, 170, 24, 20))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_around_out_is_written(engine, rng, dtype):
    q, k, _ = make(rng, (1, 2, 2, 37, 133, 16, 16), dtype)
    around = np.full((4, 150), 77, dtype)
    out = around[1:3, 9:142]
    expected = attention_received(q[0], k[0], is_causal=True)
    assert attention_received(q[0], k[0], is_causal=True, out=out) is out
    np.testing.assert_array_equal(out, expected)
    out[...] = 77
    assert (around == 77).all()


def test_bfloat16_as_bit_patterns(engine, rng):
    q, k = (rng.standard_normal((2, 70, 40)).astype(ml_dtypes.bfloat16) for _ in range(2))
    bits = [x.view(np.uint16) for x in (q, k)]
    got = attention_received(*bits, dtype="bfloat16")
    np.testing.assert_array_equal(got, attention_received(q, k))
    got = np.array(attention_statistics(*bits, dtype="bfloat16"))
    np.testing.assert_array_equal(got, np.array(attention_statistics(q, k)))


def test_broadcast_batch_axes_and_two_axes(engine, rng):
    q, k = normal(rng, (3, 1, 2, 5, 8)), normal(rng, (4, 2, 9, 8))
    got = attention_received(q, k)
    assert got.shape == (3, 4, 2, 9)
    np.testing.assert_array_equal(got[2, 1], attention_received(q[2, 0], k[1]))
    alone = attention_received(q[0, 0, 0], k[0, 0])
    assert alone.shape == (9,)
    np.testing.assert_array_equal(alone, got[0, 0, 0])
    rows = attention_statistics(q[0, 0, 0], k[0, 0], rows=[3])
    assert rows.entropy.shape == (1,)
    np.testing.assert_array_equal(rows.max_key, attention_statistics(q, k).max_key[0, 0, 0, 3:4])


FOOTPRINT = """
import resource, numpy as np
from qkv_fast import analysis
x = np.random.default_rng(0).standard_normal((2, 32768, 8), np.float32)
out = np.empty((2, 32768), np.float32)
small = x[:, :64]
analysis.attention_received(small, small)
analysis.attention_statistics(small, small)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def grown(function, **options):
    before = peak()
    function(x, x, is_causal=True, {window} **options)
    return peak() - before
print(grown(analysis.attention_received, out=out), grown(analysis.attention_statistics))
"""


@pytest.mark.parametrize("window", ["", "window=(64, 0),"])
def test_memory_grows_with_the_length_alone(native, window):
    """All weights of 2 heads of 32768 tokens would take 8 GiB.

    Received attention takes two numbers for each row; the statistics are eight for each row, in
    float64 until they are complete.
    """
    done = run_python(FOOTPRINT.format(window=window))
    assert done.returncode == 0, done.stderr
    received, statistics = map(int, done.stdout.split())  # KiB
    assert received < 8 * 1024
    assert statistics < 16 * 1024


def test_memory_of_the_python_engine(rng):
    """All weights of these rows would take 64 MiB, of which it holds some rows at a time."""
    x = normal(rng, (1, 16384, 8))
    tracemalloc.start()
    with qkv_fast.backend("python"):
        for function in (attention_received, attention_statistics):
            tracemalloc.reset_peak()
            function(x, x, rows=slice(1024))
            assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


# --- Refusals -----------------------------------------------------------------------------------

Q = np.ones((2, 4, 5, 8), np.float32)
K = np.ones((2, 4, 7, 8), np.float32)
OUT = np.full((2, 4, 7), 77, np.float32)
REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "rows holds 5: each must be from -5 to 4", {"rows": [0, 5]}),
    (ValueError, "heads holds -5: each must be from -4 to 3", {"heads": [-5]}),
    (TypeError, "rows must be ints or a slice, not a float", {"rows": 1.5}),
    (ValueError, "heads is given, but query and key have no axis of heads",
     {"query": Q[0, 0], "key": K[0, 0], "heads": [0]}),
    (TypeError, "float32, float64", {"key": K.astype(float)}),
    (TypeError, "key is a list: pass a NumPy array", {"key": K.tolist()}),
    (ValueError, "key has length 6 on axis -1, but query has 8", {"key": K[..., :6]}),
    (ValueError, "enable_gqa=True", {"key": K[:, :2]}),
    (ValueError, r"attn_mask has shape \(6, 7\)", {"attn_mask": np.ones((6, 7), bool)}),
    (ValueError, "softcap is -1", {"softcap": -1.0}),
    (ValueError, "key_lengths holds 8", {"key_lengths": 8}),
    (ValueError, "num_threads", {"num_threads": 0}),
]  # fmt: skip
RECEIVED_REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, r"lse has shape \(5,\): that of all rows is needed.* = \(2, 4, 5\)",
     {"lse": np.ones(5)}),
    (TypeError, "lse has dtype", {"lse": np.ones((2, 4, 5), complex)}),
    (ValueError, r"out has shape \(2, 4, 7\): the result's shape is \(2, 1, 7\)", {"heads": [1]}),
    (TypeError, "out has dtype float64: the result's dtype is float32", {"out": OUT.astype("f8")}),
    (TypeError, "out must be a NumPy array or a tensor", {"out": OUT.tolist()}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "arguments"), REFUSED, ids=[r[1] for r in REFUSED])
def test_refusals(engine, error, message, arguments):
    given = {"query": Q, "key": K} | arguments
    with pytest.raises(error) as caught:
        attention_statistics(**given)
    assert re.search(message, str(caught.value)), str(caught.value)
    with pytest.raises(error, match=re.escape(str(caught.value))):
        attention_received(**given, out=OUT)
    assert (OUT == 77).all()


@pytest.mark.parametrize(
    ("error", "message", "arguments"), RECEIVED_REFUSED, ids=[r[1] for r in RECEIVED_REFUSED]
)
def test_refusals_of_received(engine, error, message, arguments):
    with pytest.raises(error) as caught:
        attention_received(**{"query": Q, "key": K, "out": OUT} | arguments)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert (OUT == 77).all()


INTERRUPTED = """
import os, signal, threading, time
import numpy as np
from qkv_fast import analysis

signal.signal(signal.SIGINT, signal.default_int_handler)
query = np.broadcast_to(np.float32(1), (1, 8, 1 << 13, 16384))
small = np.ones((1, 2, 9, 8), np.float32)
analysis.{function}(small, small)
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
begin = time.perf_counter()
try:
    analysis.{function}(query, query[:, :, :4096], num_threads=2, **{options})
except KeyboardInterrupt:
    waited = time.perf_counter() - begin - 0.3
    print("interrupted", waited < 10, np.array(analysis.{function}(small, small)).any())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
@pytest.mark.parametrize("function", ["attention_received", "attention_statistics", "second pass"])
def test_ctrl_c_ends_a_call(native, function):
    assert hasattr(signal, "SIGINT")
    options = "{}"
    if function == "second pass":
        function, options = "attention_received", "dict(lse=np.zeros((1, 8, 1 << 13)))"
    kept = {k: v for k, v in os.environ.items() if k.startswith("QKV_")}
    done = run_python(INTERRUPTED.format(function=function, options=options), **kept)
    assert done.stdout.split() == ["interrupted", "True", "True"], done.stderr


def test_tensors_of_torch(engine, rng):
    torch = pytest.importorskip("torch")
    q, k = (torch.from_numpy(normal(rng, (1, 2, n, 8))) for n in (5, 9))
    weights = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1)
    out = torch.empty((1, 2, 9))
    assert attention_received(q, k, out=out) is out
    torch.testing.assert_close(out, weights.sum(dim=-2))
    got = attention_statistics(q, k)
    entropy = torch.distributions.Categorical(weights).entropy() / np.log(2)
    np.testing.assert_allclose(got.entropy, entropy, rtol=1e-5)
    np.testing.assert_array_equal(got.max_key, weights.argmax(dim=-1))
    half = attention_received(q.to(torch.bfloat16), k.to(torch.bfloat16))
    np.testing.assert_allclose(half, out, atol=0.05)
