"""The products around attention: every tail, element type and layout, on every engine."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from helpers import layouts

from qkv_fast import _dtypes, _linear

# Rows below and above the limit of decode's kernels, of a tile and of a task; depths that are no
# whole vectors, and beyond a piece of the depth; features that are no whole block.
SHAPES = [
    (1, 1, 1), (1, 64, 48), (2, 33, 17), (3, 100, 200), (7, 129, 65), (8, 16, 31), (9, 16, 31),
    (16, 40, 7), (63, 33, 130), (64, 512, 64), (65, 513, 63), (130, 70, 129), (257, 1030, 70),
    (300, 24, 500),
]  # fmt: skip


def check(x, weight, bias, *, out=None, num_threads=None):
    real = np.float64 if weight.dtype == np.float64 else np.float32
    out = np.full((len(x), len(weight)), np.nan, real) if out is None else out
    code = _dtypes.code_of(weight.dtype)
    _linear.linear(x, weight, code, bias, out, num_threads)
    exact = x.astype(float) @ weight.astype(float).T
    plain = x @ weight.astype(real).T
    if bias is not None:
        exact, plain = exact + bias.astype(float), plain + bias
    # A sum's rounding is relative to its terms, not to what is left where they cancel.
    terms = (np.abs(x.astype(float)) @ np.abs(weight.astype(float)).T).max(initial=1)
    limit = 2 * np.abs(plain - exact).max(initial=0) + 2 * np.finfo(real).eps * terms
    assert np.abs(out - exact).max(initial=0) <= limit
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_tail(engine, rng, shape, dtype):
    rows, depth, features = shape
    real = np.float64 if dtype == np.float64 else np.float32
    x = rng.standard_normal((rows, depth)).astype(real)
    weight = rng.standard_normal((features, depth)).astype(dtype)
    bias = rng.standard_normal(features).astype(real)
    check(x, weight, bias)
    check(x, weight, None)


@pytest.mark.parametrize("rows", [0, 5, 40])
def test_empty_axes(engine, rows):
    for depth, features in ((0, 3), (4, 0), (0, 0)):
        x, weight = np.ones((rows, depth), np.float32), np.ones((features, depth), np.float32)
        out = np.full((rows, features), np.nan, np.float32)
        _linear.linear(x, weight, _dtypes.FLOAT32, np.full(features, 2, np.float32), out, None)
        assert (out == 2).all()


@pytest.mark.parametrize("rows", [5, 70])
def test_rows_may_lie_anywhere(engine, rng, rows):
    same = np.testing.assert_array_equal if engine.tiles == "simd" else np.testing.assert_allclose
    close = {} if engine.tiles == "simd" else {"rtol": 1e-4, "atol": 1e-5}
    x, weight = (rng.standard_normal(s).astype(np.float32) for s in ((rows, 65), (66, 65)))
    expected = check(x, weight, None)
    for name, array in layouts(x[np.newaxis, np.newaxis]).items():
        if name in ("strided", "negative", "fortran", "swapped bytes"):
            continue  # the last axis has unit stride, in native byte order
        same(check(array[0, 0], weight, None), expected, err_msg=name, **close)
    for name, array in layouts(weight[np.newaxis, np.newaxis]).items():
        if name not in ("strided", "negative", "fortran", "swapped bytes"):
            same(check(x, array[0, 0], None), expected, err_msg=name, **close)
    wide = np.full((rows, 200), np.nan, np.float32)
    check(x, weight, None, out=wide[:, 50:116])
    same(wide[:, 50:116], expected, **close)
    assert np.isnan(wide[:, :50]).all()
    assert np.isnan(wide[:, 116:]).all()


@pytest.mark.parametrize("rows", [4, 300])
def test_bits_do_not_depend_on_threads(native, many_cpus, rng, rows):
    x = rng.standard_normal((rows, 700)).astype(np.float32)
    weight = rng.standard_normal((900, 700)).astype(np.float32)
    one = check(x, weight, None, num_threads=1)
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(check(x, weight, None, num_threads=threads), one)


def test_a_row_does_not_depend_on_the_others(engine, rng):
    if engine.engine == "python" or engine.tiles == "blas":
        pytest.skip("BLAS promises no bits")
    x = rng.standard_normal((300, 600)).astype(np.float32)
    weight = rng.standard_normal((100, 600)).astype(np.float32)
    whole = check(x, weight, None)
    for rows in (slice(0, 20), slice(70, 135), slice(291, 300)):
        np.testing.assert_array_equal(check(x[rows], weight, None), whole[rows])


def test_infinities_and_nan_stay_in_their_row_and_feature(engine, rng):
    for rows in (4, 40):
        x = rng.standard_normal((rows, 30)).astype(np.float32)
        weight = rng.standard_normal((20, 30)).astype(np.float32)
        clean = check(x, weight, None)
        x[1, 3], weight[2, 4] = np.nan, np.inf
        out = np.empty_like(clean)
        _linear.linear(x, weight, _dtypes.FLOAT32, None, out, None)
        assert np.isnan(out[1]).all()
        assert not np.isfinite(out[:, 2]).any()
        rest = np.ones_like(out, bool)
        rest[1], rest[:, 2] = False, False
        np.testing.assert_allclose(out[rest], clean[rest], rtol=1e-5, atol=1e-5)
