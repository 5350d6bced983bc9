"""merge_attention: results over parts of the keys merge to the result over all of them."""

from __future__ import annotations

import itertools
import tracemalloc

import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import layouts

import qkv_fast
from qkv_fast import _python_merge, merge_attention
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


def test_an_empty_part_has_no_influence(engine, rng):
    q, k, v = inputs(rng, np.float32)
    out, lse = sdpa(q, k, v, return_lse=True)
    empty = np.full_like(out, np.nan), np.full_like(lse, -np.inf)
    merged, merged_lse = merge_attention([empty[0], out], [empty[1], lse])
    np.testing.assert_array_equal(merged, out)
    np.testing.assert_array_equal(merged_lse, lse)
    merged, merged_lse = merge_attention([empty[0]] * 2, [empty[1]] * 2)
    assert (merged == 0).all()
    assert (merged_lse == -np.inf).all()


def test_large_and_nan_lse(engine):
    out = [np.full((1, 2), x, np.float32) for x in (1.0, 3.0)]
    lse = [np.full(1, x, np.float32) for x in (1e30, 1e30)]
    merged, total = merge_attention(out, lse)
    np.testing.assert_array_equal(merged, [[2.0, 2.0]])
    assert total[0] == np.float32(1e30)
    merged, total = merge_attention(out, [lse[0], np.float32([np.nan])])
    assert np.isnan(merged).all()
    assert np.isnan(total).all()


def test_bit_patterns_and_foreign_byte_order(engine, rng):
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


def random_parts(rng, shape, count, dtype=np.float32):
    real = np.float64 if dtype == np.float64 else np.float32
    outputs = [rng.standard_normal(shape).astype(dtype) for _ in range(count)]
    lses = [(3 * rng.standard_normal(shape[:-1])).astype(real) for _ in range(count)]
    return outputs, lses


def formula(outputs, lses, sinks=-np.inf, real=np.float64):
    """Return what the docstring says, in `real`; sinks broadcast to an lse."""
    lses = [lse.astype(real) for lse in lses]
    m = np.maximum.reduce(lses)
    weights = [np.exp(lse - m) for lse in lses]
    total = sum(weights)
    acc = sum(w[..., None] * x.astype(real) for w, x in zip(weights, outputs, strict=True))
    denominator = total + np.exp(np.asarray(sinks, real) - m)
    return acc / denominator[..., None], m + np.log(total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v_dim", [1, 7, 16, 33, 64, 200, 2500])
def test_the_formula(engine, rng, dtype, v_dim):
    outputs, lses = random_parts(rng, (2, 3, 5, v_dim), 4, dtype)
    sinks = rng.standard_normal(3)
    real = np.float64 if dtype == np.float64 else np.float32
    for options in ({}, {"sinks": sinks}):
        logits = sinks[:, None] if options else -np.inf
        exact, exact_lse = formula(outputs, lses, logits)
        plain, plain_lse = formula(outputs, lses, logits, real)
        merged, lse = merge_attention(outputs, lses, **options)
        assert merged.dtype == dtype
        oracle.assert_error_at_most_twice(merged, plain.astype(dtype), exact)
        oracle.assert_error_at_most_twice(lse, plain_lse, exact_lse)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_out_dtype(engine, rng, dtype):
    """Parts of 16 bits make a float32 result, and float32 ones a result of 16 bits."""
    outputs, lses = random_parts(rng, (2, 3, 50), 3, dtype)
    exact, _ = formula(outputs, lses)
    wide, lse = merge_attention(outputs, lses, out_dtype=np.float32)
    assert wide.dtype == np.float32
    oracle.assert_error_at_most_twice(wide, formula(outputs, lses, real=np.float32)[0], exact)
    outputs = [x.astype(np.float32) for x in outputs]
    same, same_lse = merge_attention(outputs, lses)
    np.testing.assert_array_equal(same, wide)
    np.testing.assert_array_equal(same_lse, lse)
    name = np.dtype(dtype).name
    rounded, _ = merge_attention(outputs, lses, out_dtype=name)
    assert rounded.dtype == (np.uint16 if name == "bfloat16" else dtype)
    np.testing.assert_array_equal(rounded.view(dtype), wide.astype(dtype))
    out = np.empty_like(wide, dtype)
    assert merge_attention(outputs, lses, out=out, out_dtype=name)[0] is out
    np.testing.assert_array_equal(out, wide.astype(dtype))


def test_parts_with_a_sink_make_the_whole_with_it(engine, rng):
    q, k, v = inputs(rng, np.float32)
    sinks = np.array([-3.0, 0.0, 2.0, 30.0])
    exact, _ = oracle.attention(q, k, v, sinks=sinks)
    plain, _ = oracle.attention(q, k, v, sinks=sinks, real=np.float32)
    merged, lse = merge_attention(*parts(q, k, v, [0, 9, 9, 50]), sinks=sinks)
    oracle.assert_error_at_most_twice(merged, plain, exact)
    np.testing.assert_array_equal(lse, merge_attention(*parts(q, k, v, [0, 9, 9, 50]))[1])
    outputs, lses = parts(q, k, v, [0, 9, 50])
    packed = [x.transpose(0, 2, 1, 3) for x in outputs], [x.transpose(0, 2, 1) for x in lses]
    rows, _ = merge_attention(*packed, sinks=sinks[np.newaxis])
    np.testing.assert_array_equal(
        rows, merge_attention(outputs, lses, sinks=sinks)[0].transpose(0, 2, 1, 3)
    )


def test_sinks_that_are_not_finite(engine):
    out, lse = [np.full((3, 1, 2), x, np.float32) for x in (1.0, 3.0)], np.zeros((3, 1), "f4")
    merged, total = merge_attention(out, [lse, lse], sinks=[np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(merged[:, 0, 0], [0, 2, np.nan])
    np.testing.assert_allclose(total, np.log(2), rtol=1e-6)
    empty = np.full_like(lse, -np.inf)
    merged, total = merge_attention(out, [empty, empty], sinks=[np.inf, 0.0, np.nan])
    assert (merged == 0).all()
    assert (total == -np.inf).all()


def test_a_mean_of_zeros_is_positive(engine):
    for count in (1, 2):
        outputs = [np.full((3, 70), -0.0, np.float32)] * count
        merged, _ = merge_attention(outputs, [np.zeros(3, np.float32)] * count)
        assert not np.signbit(merged).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(engine, value):
    """They reach the rows whose weight for them is not 0, and these alone."""
    outputs = [np.ones((3, 40), np.float32), np.ones((3, 40), np.float32)]
    outputs[1][:, 33] = value
    lses = [np.float32([0, 0, 0]), np.float32([-1, -1000, -np.inf])]
    merged, _ = merge_attention(outputs, lses)
    np.testing.assert_array_equal(merged[0, 33], value)
    assert (np.delete(merged[0], 33) == 1).all()
    assert (merged[1:] == 1).all()
    inf = np.float32([np.inf] * 3)
    merged, lse = merge_attention(outputs, [lses[0], inf])
    assert np.isnan(merged).all()
    assert np.isnan(lse).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("layout", list(layouts(np.zeros((1, 1, 1, 1), "f4"))))
def test_any_layout_gives_the_same_bits(engine, rng, dtype, layout):
    outputs, lses = random_parts(rng, (2, 3, 4, 37), 3, dtype)
    expected, expected_lse = merge_attention(outputs, lses)
    for moved in ({0}, {1}, {0, 1, 2}):
        given = [layouts(x)[layout] if i in moved else x for i, x in enumerate(outputs)]
        merged, lse = merge_attention(given, lses)
        np.testing.assert_array_equal(merged, expected)
        np.testing.assert_array_equal(lse, expected_lse)
    for name, out in layouts(np.zeros_like(expected)).items():
        assert merge_attention(outputs, lses, out=out)[0] is out
        np.testing.assert_array_equal(out, expected, name)
    apart = [np.stack([x, x])[:, ::-1].swapaxes(0, 1)[:, 0][::-1] for x in lses]
    lse_out = np.zeros((*expected_lse.shape, 2), expected_lse.dtype)[..., 1]
    assert merge_attention(outputs, apart, lse_out=lse_out)[1] is lse_out
    np.testing.assert_array_equal(lse_out, expected_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 2])
def test_in_place(engine, rng, dtype, place):
    outputs, lses = random_parts(rng, (2, 3, 40, 33), 3, dtype)
    expected, expected_lse = merge_attention(outputs, lses)
    others = [x.copy() for x in outputs]
    merged, lse = merge_attention(outputs, lses, out=outputs[place], lse_out=lses[place])
    assert merged is outputs[place]
    assert lse is lses[place]
    np.testing.assert_array_equal(merged, expected)
    np.testing.assert_array_equal(lse, expected_lse)
    for i in {0, 1, 2} - {place}:
        np.testing.assert_array_equal(outputs[i], others[i])


def test_out_may_overlap_anything(engine, rng):
    memory = rng.standard_normal(4000).astype(np.float32)
    shape = (3, 5, 33)

    def at(begin, *shape):
        return memory[begin : begin + int(np.prod(shape))].reshape(shape)

    def given():
        return [at(0, *shape), at(600, *shape)], [at(1200, *shape[:-1]), at(1300, *shape[:-1])]

    before = memory.copy()
    expected, expected_lse = merge_attention(*given())
    for begin in (0, 1, 33, 595, 600, 610, 1195, 1290, 2000):
        for lse_begin in (0, 590, 1200, 1201, 1300, 2500):
            if begin < lse_begin + 15 and lse_begin < begin + 495:
                with pytest.raises(ValueError, match="out and lse_out overlap"):
                    merge_attention(*given(), out=at(begin, *shape), lse_out=at(lse_begin, 3, 5))
                np.testing.assert_array_equal(memory, before)
                continue
            out, lse = merge_attention(*given(), out=at(begin, *shape), lse_out=at(lse_begin, 3, 5))
            np.testing.assert_array_equal(out, expected, f"{begin} {lse_begin}")
            np.testing.assert_array_equal(lse, expected_lse, f"{begin} {lse_begin}")
            memory[:] = before
    repeated = np.lib.stride_tricks.as_strided(memory, shape, (0, 132, 4), writeable=True)
    merge_attention(*given(), out=repeated)  # the call must return, with any numbers


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_and_other_rows_change_no_bit(engine, rng, many_cpus, dtype):
    outputs, lses = random_parts(rng, (2, 5, 700, 48), 5, dtype)
    sinks = rng.standard_normal(5)
    expected, expected_lse = merge_attention(outputs, lses, sinks=sinks, num_threads=1)
    for threads in (2, 3, 8):
        merged, lse = merge_attention(outputs, lses, sinks=sinks, num_threads=threads)
        np.testing.assert_array_equal(merged.view(np.uint8), expected.view(np.uint8))
        np.testing.assert_array_equal(lse, expected_lse)
    for rows in (slice(1, 2), slice(13, 699, 17)):
        some = [x[:, 1:4, rows] for x in outputs], [x[:, 1:4, rows] for x in lses]
        merged, lse = merge_attention(*some, sinks=sinks[1:4])
        np.testing.assert_array_equal(merged, expected[:, 1:4, rows])
        np.testing.assert_array_equal(lse, expected_lse[:, 1:4, rows])


def test_few_long_rows_and_many_parts(engine, rng):
    outputs, lses = random_parts(rng, (1, 5000), 300)
    merged, lse = merge_attention(outputs, lses)
    exact, exact_lse = formula(outputs, lses)
    oracle.assert_error_at_most_twice(merged, formula(outputs, lses, real=np.float32)[0], exact)
    oracle.assert_error_at_most_twice(lse, formula(outputs, lses, real=np.float32)[1], exact_lse)
    swapped = [x.astype(">f4") for x in outputs]
    np.testing.assert_array_equal(merge_attention(swapped, lses)[0], merged)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (3, 0), (2, 0, 5, 3), (1, 1, 1, 1, 1, 2)])
def test_shapes_of_few_or_many_axes(engine, rng, shape):
    outputs, lses = random_parts(rng, shape, 2)
    lses = [np.asarray(x) for x in lses]
    merged, lse = merge_attention(outputs, lses)
    assert merged.shape == shape
    assert lse.shape == shape[:-1]
    exact, exact_lse = formula(outputs, lses)
    np.testing.assert_allclose(merged, exact, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, exact_lse, rtol=1e-5, atol=1e-6)


def test_blocks_of_the_python_engine(monkeypatch, rng):
    outputs, lses = random_parts(rng, (2, 3, 7, 5), 2)
    expected = merge_attention(outputs, lses)
    for elements in (1, 5, 20, 40, 105, 210, 1000):
        monkeypatch.setattr(_python_merge, "BLOCK_ELEMENTS", elements)
        with qkv_fast.backend("python"):
            merged, lse = merge_attention(outputs, lses)
        np.testing.assert_allclose(merged, expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse, expected[1], rtol=1e-5, atol=1e-6)


def test_no_memory_of_the_size_of_the_parts_is_taken(engine, rng):
    outputs, lses = random_parts(rng, (64, 1024, 64), 2)  # 16 MiB each
    tracemalloc.start()
    merge_attention(outputs, lses, out=outputs[0], lse_out=lses[0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < (16 << 20)


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


READ_ONLY = OUT.copy()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, r"sinks has shape \(3,\): one logit for each of 2 ", {"sinks": [1.0] * 3}),
        (ValueError, r"sinks has shape \(\): one logit", {"sinks": 1.0}),
        (ValueError, r"sinks has shape \(3, 1\): it must broadcast", {"sinks": [[1.0]] * 3}),
        (TypeError, "sinks has dtype <U1", {"sinks": "a"}),
        (TypeError, "out must be a NumPy array or a tensor, not list", {"out": OUT.tolist()}),
        (ValueError, r"out has shape \(2, 3\)", {"out": LSE.copy()}),
        (TypeError, "out has dtype float64: the result's dtype is float32",
         {"out": OUT.astype(float)}),
        (ValueError, "out is read-only", {"out": READ_ONLY}),
        (ValueError, r"lse_out has shape \(2, 3, 4\)", {"lse_out": OUT.copy()}),
        (TypeError, "lse_out has dtype float64", {"lse_out": LSE.astype(float)}),
        (ValueError, "out_dtype is 'float64': for outputs of float32 it must be 'float16', "
                     "'bfloat16' or 'float32'", {"out_dtype": "float64"}),
        (ValueError, "out_dtype is 3: for outputs", {"out_dtype": 3}),
        (TypeError, "out has dtype float32: the result's dtype is float16",
         {"out": OUT.copy(), "out_dtype": "float16"}),
        (TypeError, "num_threads", {"num_threads": 1.5}),
        (ValueError, "num_threads", {"num_threads": 0}),
    ],
)  # fmt: skip
def test_refused_options(error, message, options):
    with pytest.raises(error, match=message):
        merge_attention([OUT, OUT], [LSE, LSE], **options)


def test_float64_has_no_other_result():
    with pytest.raises(ValueError, match="for outputs of float64 it must be 'float64'"):
        merge_attention([OUT.astype(float)], [LSE], out_dtype="float32")
