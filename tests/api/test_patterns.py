"""qkv_fast.analysis of given weights: known patterns, plain loops as a reference, refusals."""

from __future__ import annotations

import doctest
import math
import re

import ml_dtypes
import numpy as np
import pytest
from helpers import run_python
from scipy.spatial.distance import jensenshannon

from qkv_fast import analysis, attention_weights


def random_weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    w = rng.random(shape)
    return w / w.sum(axis=-1, keepdims=True)


# --- head_similarity ----------------------------------------------------------------------------


def test_similarity_is_that_of_scipy(rng):
    """SciPy's distance is the root of the divergence."""
    w = random_weights(rng, 2, 3, 9, 14)
    got = analysis.head_similarity(w)
    assert got.dtype == np.float64
    for layer in range(2):
        for i in range(3):
            for j in range(3):
                rows = [
                    jensenshannon(w[layer, i, r], w[layer, j, r], base=2) ** 2 for r in range(9)
                ]
                assert got[layer, i, j] == pytest.approx(1 - np.mean(rows), abs=1e-7)
    np.testing.assert_array_equal(got, got.swapaxes(-1, -2))


def test_similarity_of_equal_and_of_disjoint_heads(rng):
    one = np.zeros((4, 6))
    one[:, :3] = random_weights(rng, 4, 3)
    got = analysis.head_similarity([one, one * 0.25, one[:, ::-1]])
    np.testing.assert_allclose(got, [[1, 1, 0], [1, 1, 0], [0, 0, 1]], atol=1e-12)


def test_similarity_leaves_out_rows_without_weights(rng):
    w = random_weights(rng, 2, 5, 7)
    whole = analysis.head_similarity(w[:, 1:4])
    w[0, 0] = w[1, 4] = 0
    np.testing.assert_allclose(analysis.head_similarity(w)[0, 1], whole[0, 1], rtol=1e-12)
    w[0, :3] = w[1, 3:] = 0
    got = analysis.head_similarity(w)
    assert np.isnan(got[0, 1])
    assert got[0, 0] == got[1, 1] == 1


# --- rollout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [0.0, 0.5, 0.8, 1])
def test_rollout_is_the_product_of_the_layers(rng, residual):
    w = random_weights(rng, 4, 3, 6, 6)
    expected = np.eye(6)
    got = analysis.rollout(w, residual)
    for layer in range(4):
        expected = ((1 - residual) * w[layer].mean(axis=0) + residual * np.eye(6)) @ expected
        np.testing.assert_allclose(got[layer], expected, rtol=1e-12)
    np.testing.assert_allclose(got.sum(axis=-1), 1, rtol=1e-12)


def test_rollout_makes_rows_sum_to_one(rng):
    """Rows of a head with a sink are less than 1, and a row without keys is 0."""
    w = random_weights(rng, 2, 2, 5, 5)
    scaled = w * rng.random((2, 2, 5, 1))
    np.testing.assert_allclose(analysis.rollout(scaled), analysis.rollout(w), rtol=1e-12)
    w[:, :, 2] = 0
    np.testing.assert_array_equal(analysis.rollout(w)[-1, 2], np.eye(5)[2])


# --- induction and previous tokens --------------------------------------------------------------


def loop_over_rows(w: np.ndarray, tokens: list, offset: int) -> float:
    """Return a head's induction score by the words of its definition."""
    sums = []
    for row in range(len(w)):
        position = offset + row
        behind = [j + 1 for j in range(position) if tokens[j] == tokens[position]]
        behind = [k for k in behind if k != position]
        if behind:
            sums.append(sum(w[row, k] for k in behind))
    return float(np.mean(sums)) if sums else math.nan


@pytest.mark.parametrize("offset", [0, 4])
@pytest.mark.parametrize("kind", [int, str, np.uint16])
def test_induction_is_the_loop(rng, offset, kind):
    tokens = [kind(x) for x in rng.integers(0, 5, 20)]
    w = random_weights(rng, 2, 3, 16, 20)
    got = analysis.induction_score(w, tokens, query_offset=offset)
    assert got.shape == (2, 3)
    for index in np.ndindex(2, 3):
        expected = loop_over_rows(w[index], tokens, offset)
        assert got[index] == pytest.approx(expected, rel=1e-12)


def test_an_induction_head_is_found(rng):
    """On a sequence that is repeated, a head that copies scores 1, one that looks back scores 0."""
    half = 25
    tokens = np.tile(rng.permutation(half), 2)
    copies, back = np.zeros((2 * half, 2 * half)), np.eye(2 * half, k=-1)
    for i in range(2 * half):
        copies[i, max(0, i - half + 1)] = 1
    w = np.stack([copies, back])
    np.testing.assert_allclose(analysis.induction_score(w, tokens), [1, 0])
    np.testing.assert_allclose(analysis.previous_token_score(w), [1 / (2 * half - 1), 1])
    last = analysis.induction_score(w[:, -5:], tokens, query_offset=2 * half - 5)
    np.testing.assert_allclose(last, [1, 0])


def test_no_query_that_counts_is_nan():
    w = np.eye(3)[np.newaxis]
    assert np.isnan(analysis.induction_score(w, [1, 2, 3])).all()
    assert np.isnan(analysis.induction_score(w, [1, 1, 2])).all()  # behind it is the query itself
    assert np.isnan(analysis.previous_token_score(w[:, :1, :1])).all()


def test_previous_token_of_some_rows(rng):
    w = random_weights(rng, 3, 6, 9)
    got = analysis.previous_token_score(w, query_offset=3)
    expected = [np.mean([w[h, i, i + 2] for i in range(6)]) for h in range(3)]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    rows = attention_weights(*rng.standard_normal((2, 2, 7, 8)), is_causal=True)
    plain = [np.mean([rows[h, i, i - 1] for i in range(1, 7)]) for h in range(2)]
    np.testing.assert_allclose(analysis.previous_token_score(rows), plain, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16, ">f8", int])
def test_any_real_dtype(dtype):
    w = np.array([[[1, 0, 0], [1, 0, 0], [0, 1, 0]]], dtype)
    np.testing.assert_array_equal(analysis.previous_token_score(w), [1])
    np.testing.assert_array_equal(analysis.head_similarity(w), [[1]])
    assert analysis.rollout(w[np.newaxis])[0, 2].tolist() == [0, 0.5, 0.5]


# --- Refusals -----------------------------------------------------------------------------------

W = np.full((2, 5, 5), 0.2)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"weights have shape \(5, 5\): they must be \(\.\.\., heads, queries, keys\)",
         lambda: analysis.head_similarity(W[0])),
        (ValueError, r"weights have shape \(2, 5, 5\): they must be \(layers, heads, queries, keys",
         lambda: analysis.rollout(W)),
        (ValueError, r"weights have shape \(1, 2, 4, 5\): rollout is of self-attention",
         lambda: analysis.rollout(W[np.newaxis, :, :4])),
        (ValueError, "weights hold -0.2: none may be negative",
         lambda: analysis.previous_token_score(-W)),
        (ValueError, "weights hold nan: all must be finite",
         lambda: analysis.head_similarity(W * np.nan)),
        (ValueError, r"weights have shape \(2, 0, 5\): no axis may be empty",
         lambda: analysis.head_similarity(W[:, :0])),
        (TypeError, "weights have dtype complex128: real numbers are needed",
         lambda: analysis.head_similarity(W * 1j)),
        (ValueError, "residual is 1.5: it must be from 0 to 1",
         lambda: analysis.rollout(W[np.newaxis], 1.5)),
        (TypeError, "residual must be a real number, not str",
         lambda: analysis.rollout(W[np.newaxis], "half")),
        (ValueError, "tokens has 4 entries, but weights have 5 keys on axis -1",
         lambda: analysis.induction_score(W, [1, 2, 3, 4])),
        (TypeError, "tokens is 'abcde': ints or strings along one axis are needed",
         lambda: analysis.induction_score(W, "abcde")),
        (TypeError, "tokens is .*: ints or strings along one axis",
         lambda: analysis.induction_score(W, np.ones(5))),
        (ValueError, "query_offset is 1: it must be from 0 to 0, so that each of 5 queries stands",
         lambda: analysis.induction_score(W, [1, 2, 3, 4, 5], 1)),
        (ValueError, "query_offset is -1: it must be from 0 to 2",
         lambda: analysis.previous_token_score(W[:, :3], -1)),
        (ValueError, "weights have 5 queries on axis -2 and 3 keys on axis -1",
         lambda: analysis.previous_token_score(W[:, :, :3])),
    ],
)  # fmt: skip
def test_refusals(error, message, call):
    with pytest.raises(error) as caught:
        call()
    assert re.search(message, str(caught.value)), str(caught.value)


# --- Documentation ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", analysis.__all__)
def test_docstrings(name):
    public = getattr(analysis, name)
    assert public.__module__ == "qkv_fast.analysis"
    tests = doctest.DocTestFinder(exclude_empty=True).find(public, name, module=False, globs={})
    examples = [test for test in tests if test.examples]
    assert examples or name == "Statistics"
    for test in examples:
        assert doctest.DocTestRunner().run(test).failed == 0, test.name


def test_the_package_does_not_import_it():
    done = run_python("import sys, qkv_fast; print('qkv_fast.analysis' in sys.modules)")
    assert done.stdout.split() == ["False"], done.stderr
