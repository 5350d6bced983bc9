"""merge_attention: results over parts of the keys merge to the result over all of them."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import oracle
import pytest

from qkv_fast import merge_attention
from qkv_fast import scaled_dot_product_attention as sdpa

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
CUTS = [[0, 50], [0, 1, 50], [0, 20, 20, 33, 50]]  # the last with an empty part


def inputs(rng, dtype):
    return [rng.standard_normal((2, 4, n, 16)).astype(dtype) for n in (7, 50, 50)]


def parts(q, k, v, cuts, **options):
    """Return outputs and lses over keys[cuts[i]:cuts[i + 1]], each with its own positions."""
    pairs = [
        sdpa(q, k[:, :, a:b], v[:, :, a:b], return_lse=True, query_offset=43 - a, **options)
        for a, b in itertools.pairwise(cuts)
    ]
    return [p[0] for p in pairs], [p[1] for p in pairs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_parts_make_the_whole(engine, rng, dtype, cuts, is_causal):
    q, k, v = inputs(rng, dtype)
    merged, lse = merge_attention(*parts(q, k, v, cuts, is_causal=is_causal))
    assert merged.dtype == dtype
    options = {"is_causal": is_causal, "query_offset": 43}
    exact, exact_lse = oracle.attention(q, k, v, **options)
    whole = sdpa(q, k, v, **options)
    eps = 2.0**-7 if dtype == ml_dtypes.bfloat16 else float(np.finfo(dtype).eps)
    error = np.abs(merged.astype(float) - exact).max()
    assert error <= 2 * np.abs(whole.astype(float) - exact).max() + 4 * eps
    np.testing.assert_allclose(lse, exact_lse, rtol=2e-5, atol=2e-5)


def test_an_empty_part_has_no_influence(rng):
    q, k, v = inputs(rng, np.float32)
    out, lse = sdpa(q, k, v, return_lse=True)
    empty = np.full_like(out, np.nan), np.full_like(lse, -np.inf)
    merged, merged_lse = merge_attention([empty[0], out], [empty[1], lse])
    np.testing.assert_array_equal(merged, out)
    np.testing.assert_array_equal(merged_lse, lse)
    merged, merged_lse = merge_attention([empty[0]] * 2, [empty[1]] * 2)
    assert (merged == 0).all()
    assert (merged_lse == -np.inf).all()


def test_large_and_nan_lse(rng):
    out = [np.full((1, 2), x, np.float32) for x in (1.0, 3.0)]
    lse = [np.full(1, x, np.float32) for x in (1e30, 1e30)]
    merged, total = merge_attention(out, lse)
    np.testing.assert_array_equal(merged, [[2.0, 2.0]])
    assert total[0] == np.float32(1e30)
    merged, total = merge_attention(out, [lse[0], np.float32([np.nan])])
    assert np.isnan(merged).all()
    assert np.isnan(total).all()


def test_bit_patterns_and_foreign_byte_order(rng):
    q, k, v = inputs(rng, ml_dtypes.bfloat16)
    outputs, lses = parts(q, k, v, [0, 20, 50])
    expected, lse = merge_attention(outputs, lses)
    bits, same = merge_attention([x.view(np.uint16) for x in outputs], lses, dtype="bfloat16")
    np.testing.assert_array_equal(bits, expected.view(np.uint16))
    np.testing.assert_array_equal(same, lse)
    wide = [x.astype(np.float32) for x in outputs]
    swapped, _ = merge_attention([x.astype(">f4") for x in wide], lses)
    assert swapped.dtype.isnative
    np.testing.assert_array_equal(swapped, merge_attention(wide, lses)[0])


OUT, LSE = np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("dtype", "shown"), [("float32", "'float32'"), (3, "3"), (OUT, "an array of float32")]
)
def test_the_dtype_must_be_bfloat16_or_none(dtype, shown):
    with pytest.raises(ValueError, match=f"dtype is {shown}.*: it must be 'bfloat16'"):
        merge_attention([OUT], [LSE], dtype=dtype)


@pytest.mark.parametrize(
    ("error", "message", "outputs", "lses"),
    [
        (ValueError, "0 outputs and 0 lses", [], []),
        (ValueError, "2 outputs and 1 lses", [OUT, OUT], [LSE]),
        (TypeError, r"outputs\[0\] has dtype int64", [OUT.astype(int)], [LSE]),
        (TypeError, r"outputs\[1\] has dtype float64", [OUT, OUT.astype(float)], [LSE, LSE]),
        (TypeError, r"lses\[0\] has dtype int64", [OUT], [LSE.astype(int)]),
        (ValueError, r"outputs\[1\] has shape \(2, 2, 4\)", [OUT, OUT[:, :2]], [LSE, LSE]),
        (ValueError, r"lses\[0\] has shape \(2, 2\)", [OUT], [LSE[:, :2]]),
        (TypeError, r"outputs\[0\] is a list", [[1.0]], [LSE]),
        (TypeError, "outputs is a NoneType: it must be a sequence", None, None),
        (TypeError, "lses is a float: it must be a sequence", [OUT], 1.0),
        (
            ValueError,
            r"outputs\[0\] has shape \(\): it must have at least one axis",
            [np.float32(1)],
            [np.float32(1)],
        ),
        (TypeError, "uint16.*dtype='bfloat16' says", [OUT.astype("u2")], [LSE]),
    ],
)
def test_refusals(error, message, outputs, lses):
    with pytest.raises(error, match=message):
        merge_attention(outputs, lses)
