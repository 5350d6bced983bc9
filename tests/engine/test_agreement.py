"""Agreement with the oracle over sizes, dtypes, score modifiers, positions and masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from helpers import make, normal, sdpa_shapes
from hypothesis import given
from hypothesis import strategies as st

import qkv_fast
from qkv_fast import scaled_dot_product_attention as sdpa

ml_dtypes = pytest.importorskip("ml_dtypes")
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


def check(q: Any, k: Any, v: Any, largest_score: float = 0, **options: Any) -> np.ndarray:
    gqa = q.ndim > 2 and q.shape[-3] != k.shape[-3]
    out, lse = sdpa(q, k, v, enable_gqa=gqa, return_lse=True, **options)
    oracle.assert_close(out, q, k, v, largest_score=largest_score, **options)
    exact = oracle.attention(q, k, v, **options)[1]
    np.testing.assert_allclose(lse, exact, rtol=2e-5, atol=2e-5)
    assert lse.dtype == (np.float64 if q.dtype == np.float64 else np.float32)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", sdpa_shapes)
@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_the_oracle(engine, rng, dtype, shape, causal):
    check(*make(rng, shape, dtype), is_causal=causal)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_head_size(engine, rng, dtype):
    for d in [*range(1, 36), 63, 64, 65, 80, 96, 127, 128, 129, 200, 256]:
        check(*make(rng, (1, 1, 1, 3, 9, d, max(1, d - 2)), dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_number_of_keys(engine, rng, dtype):
    for keys in [*range(1, 24), *range(60, 70), *range(126, 131), 191, 193, 257]:
        check(*make(rng, (1, 1, 1, 5, keys, 8, 8), dtype), is_causal=keys % 2 == 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_number_of_queries(engine, rng, dtype):
    for queries in [*range(1, 36), 47, 48, 49, *range(62, 67), 127, 129, 300]:
        check(*make(rng, (1, 1, 1, queries, 40, 8, 8), dtype), is_causal=queries % 2 == 0)


@pytest.mark.parametrize("group", [1, 2, 7])
def test_grouped_heads_read_their_own_key_head(engine, rng, group):
    q, k, v = make(rng, (2, 3 * group, 3, 21, 30, 16, 16))
    out = check(q, k, v, is_causal=True)
    repeated = sdpa(q, k.repeat(group, 1), v.repeat(group, 1), is_causal=True)
    np.testing.assert_allclose(out, repeated, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.7, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_any_scale(engine, rng, scale, causal):
    check(*make(rng, "odd"), scale=scale, is_causal=causal)


@pytest.mark.parametrize("offset", [0, 5, -3, 64, -200, 1000, [3, -2], [0, 170]])
@pytest.mark.parametrize("window", [None, (3, 0), (0, 0), (None, 2), (10, None), (70, 65)])
@pytest.mark.parametrize("causal", [False, True])
def test_positions(engine, rng, offset, window, causal):
    check(
        *make(rng, (2, 2, 1, 70, 150, 16, 16)), query_offset=offset, window=window, is_causal=causal
    )


def test_offset_aligns_bottom_right(engine, rng):
    q, k, v = make(rng, (1, 2, 2, 5, 90, 16, 16))
    whole = normal(rng, (1, 2, 90, 16))
    whole[:, :, 85:] = q
    np.testing.assert_allclose(
        sdpa(q, k, v, is_causal=True, query_offset=85),
        sdpa(whole, k, v, is_causal=True)[:, :, 85:],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("window_side", [2**40, 2**62, 2**70])
def test_a_window_wider_than_everything_is_no_window(engine, rng, window_side):
    q, k, v = make(rng, "odd")
    np.testing.assert_array_equal(sdpa(q, k, v, window=(window_side, window_side)), sdpa(q, k, v))


@pytest.mark.parametrize("lengths", [0, 1, 64, 150, [0, 100], [149, 3]])
def test_keys_past_key_lengths_are_not_read(engine, rng, lengths):
    q, k, v = make(rng, (2, 2, 1, 33, 150, 16, 16))
    clean = check(q, k, v, key_lengths=lengths)
    for b, n in enumerate(np.broadcast_to(lengths, 2)):
        k[b, :, n:] = v[b, :, n:] = np.nan
    np.testing.assert_array_equal(sdpa(q, k, v, key_lengths=lengths, enable_gqa=True), clean)


MASK_SHAPES = [(), (150,), (70, 150), (70, 1), (2, 1, 1, 150), (2, 4, 70, 150), (4, 1, 150)]


@pytest.mark.parametrize("shape", MASK_SHAPES)
@pytest.mark.parametrize("kind", ["bool", "float32", "float64", "float16", ">f4", "bfloat16"])
@pytest.mark.parametrize("causal", [False, True])
def test_masks(engine, rng, shape, kind, causal):
    allowed = rng.random(shape) > 0.4
    mask = allowed
    if kind != "bool":
        dtype = ml_dtypes.bfloat16 if kind == "bfloat16" else np.dtype(kind)
        mask = np.where(allowed, rng.standard_normal(shape), -np.inf).astype(dtype)
    check(*make(rng, (2, 4, 2, 70, 150, 16, 16)), attn_mask=mask, is_causal=causal)


@pytest.mark.parametrize("shape", MASK_SHAPES)
@pytest.mark.parametrize("kind", ["float32", "float64", "float16", ">f4", "bfloat16"])
def test_a_bias_beside_a_mask(engine, rng, shape, kind):
    q, k, v = make(rng, (2, 4, 2, 70, 150, 16, 16))
    bias = np.where(rng.random(shape) > 0.2, rng.standard_normal(shape), -np.inf)
    bias = bias.astype(ml_dtypes.bfloat16 if kind == "bfloat16" else np.dtype(kind))
    padding = np.arange(150) < np.reshape([150, 90], (2, 1, 1, 1))
    check(q, k, v, attn_bias=bias)
    check(q, k, v, attn_mask=padding, attn_bias=bias, is_causal=True, query_offset=30)
    check(q, k, v, attn_mask=rng.random((4, 70, 150)) > 0.4, attn_bias=bias)
    floating = normal(rng, (2, 1, 70, 150), np.float64)
    check(q, k, v, attn_mask=floating, attn_bias=bias, softcap=2.0)


@pytest.mark.parametrize("q_len", [1, 3, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_alone_is_a_floating_mask(engine, rng, q_len, dtype):
    q, k, v = make(rng, (2, 4, 2, q_len, 300, 16, 16), dtype)
    bias = normal(rng, (4, q_len, 300))
    bias[:, :, ::7] = -np.inf
    expected = sdpa(q, k, v, bias, enable_gqa=True)
    np.testing.assert_array_equal(sdpa(q, k, v, attn_bias=bias, enable_gqa=True), expected)
    hidden = np.isfinite(bias[0, 0])
    check(q, k, v, attn_mask=hidden, attn_bias=bias[:, :, ::-1])
    k[:, :, ::7] = v[:, :, ::7] = np.nan
    np.testing.assert_array_equal(
        sdpa(q, k, v, hidden, attn_bias=np.zeros((4, 1, 1), np.float32), enable_gqa=True),
        sdpa(q, k, v, np.where(hidden, 0, bias), enable_gqa=True),
    )


def test_a_bias_that_out_overlaps(engine, rng):
    q, k, v = make(rng, (1, 2, 2, 4, 8, 8, 8))
    memory = normal(rng, q.shape)
    expected = sdpa(q, k, v, attn_bias=memory.copy())
    np.testing.assert_array_equal(sdpa(q, k, v, attn_bias=memory, out=memory), expected)


def test_a_mask_with_any_strides(engine, rng):
    q, k, v = make(rng, (1, 1, 1, 70, 100, 8, 8))
    big = rng.random((200, 140)) > 0.3
    check(q, k, v, attn_mask=big[::2, ::2].T[:, ::1])
    check(q, k, v, attn_mask=big[::-2, ::-2].T)
    bias = rng.standard_normal((100, 70)).astype(np.float32).T
    check(q, k, v, attn_mask=bias)
    check(q, k, v, attn_mask=bias[::-1, ::-1])
    check(q, k, v, attn_mask=big[::2, ::2].T, attn_bias=bias[::-1, ::-1])
    odd_truth = (rng.random((70, 100)) > 0.5).astype(np.uint8) * 6  # bytes other than 0 and 1
    check(q, k, v, attn_mask=odd_truth.view(bool))


def test_finfo_min_is_not_an_exclusion(engine, rng):
    q, k, v = make(rng, (1, 1, 1, 3, 70, 8, 8))
    out = sdpa(q, k, v, np.full((3, 70), np.finfo(np.float32).min))
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(2, keepdims=True), out.shape), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_modifiers_together(engine, rng, dtype):
    q, k, v = make(rng, (2, 4, 2, 70, 150, 24, 24), dtype)
    check(
        q * dtype(4),
        k,
        v,
        softcap=2.5,
        alibi_slopes=rng.random((2, 4)) * 0.1,
        sinks=rng.standard_normal(4),
        attn_mask=rng.standard_normal((70, 150)).astype(np.float32),
        window=(60, 20),
        query_offset=30,
        key_lengths=[140, 30],
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("cap", [0.01, 1.0, 50.0, 1e6])
def test_softcap(engine, rng, dtype, cap):
    q, k, v = make(rng, "odd", dtype)
    check(q * dtype(5), k, v, softcap=cap)


def test_a_softcap_of_0_is_none(engine, rng):
    q, k, v = rng.standard_normal((3, 2, 5, 8), np.float32)
    plain = sdpa(q, k, v)
    for cap in (0, 0.0, -0.0):
        assert np.array_equal(sdpa(q, k, v, softcap=cap), plain)


@pytest.mark.parametrize("slopes", [0.5, [0.0, 0.25], [[1.0, -0.5], [0.125, 2.0]]])
def test_alibi(engine, rng, slopes):
    q, k, v = make(rng, (2, 2, 2, 40, 90, 16, 16))
    check(q, k, v, alibi_slopes=slopes, query_offset=20)


@pytest.mark.parametrize(
    "sinks", [[0.0, 0.0], [5.0, -100.0], [-np.inf, 100.0], [np.inf, 1e30], [1000.0, -1e30]]
)
def test_sinks(engine, rng, sinks):
    q, k, v = make(rng, (1, 2, 2, 5, 90, 16, 16))
    check(q, k, v, sinks=sinks)
    np.testing.assert_array_equal(  # the lse leaves sinks out, so that parts can be merged
        sdpa(q, k, v, sinks=sinks, return_lse=True)[1], sdpa(q, k, v, return_lse=True)[1]
    )


def test_an_infinite_sink_leaves_nan_where_the_values_hold_it(engine, rng):
    q, k, v = make(rng, (1, 2, 2, 5, 9, 16, 16))
    v[0, 0, 3, 4] = np.nan
    out = sdpa(q, k, v, sinks=np.array([0, np.inf, 0, np.inf])[::-2])
    expected = np.zeros_like(out)
    expected[0, 0, :, 4] = np.nan
    np.testing.assert_array_equal(out, expected)


def test_sink_of_a_row_without_keys(engine, rng):
    q, k, v = make(rng, (1, 2, 2, 5, 9, 16, 16))
    out, lse = sdpa(q, k, v, sinks=[1.0, 2.0], key_lengths=0, return_lse=True)
    assert not out.any()
    assert (lse == -np.inf).all()


def test_large_scores_do_not_overflow(engine, rng):
    q, k, v = make(rng, "long")
    q, k = q * 100, k * 100
    exact, plain = (oracle.attention(q, k, v, real=real)[0] for real in (np.float64, np.float32))
    # A weight is no more exact than its score.
    largest = float(np.abs(q @ k.swapaxes(-1, -2)).max()) / 8
    oracle.assert_error_at_most_twice(sdpa(q, k, v), plain, exact, largest)


def test_the_error_is_that_of_rounding(engine, rng):
    q, k, v = make(rng, (1, 2, 2, 128, 2048, 64, 64))
    exact = oracle.attention(q, k, v)[0]
    assert np.abs(sdpa(q, k, v) - exact).max() < 5e-7


@pytest.mark.parametrize("rows", [1, 64, 300])
def test_the_error_does_not_grow_with_the_number_of_keys(engine, rows):
    """With equal keys a plain float32 sum rounds every block in the same direction."""
    errors = {}
    for length in (1 << 12, 1 << 17):
        q, k = (np.broadcast_to(np.float32(1), (1, n, 8)) for n in (rows, length))
        exact = 0.1 + 0.37 * np.arange(8, dtype=np.float32)
        v = np.broadcast_to(exact, (1, length, 8))
        errors[length] = np.abs(sdpa(q, k, v) / exact - 1).max()
    assert errors[1 << 17] <= max(2e-6, 1.5 * errors[1 << 12]), errors


@pytest.mark.parametrize("how", ["rising", "falling", "infinite", "one row is late"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [40, 300])
def test_long_rows_whose_maximum_moves(engine, rng, how, dtype, rows):
    """The sums of earlier blocks are scaled down, not finite or empty."""
    q, k, v = make(rng, (1, 1, 1, rows, 6500, 16, 16), dtype)
    slope = np.linspace(0, 8, 6500)[:, np.newaxis]
    q, k = np.abs(q), k + (slope * (-1 if how == "falling" else 1)).astype(dtype)
    options = {}
    if how == "infinite":
        k, v[:, :, 100, 3], v[:, :, 5000, 4] = -k, np.inf, -np.inf
    if how == "one row is late":
        options = {"is_causal": True, "query_offset": 4000, "window": (2100, None)}
    k = k.astype(dtype)
    scores = q.astype(float) @ k.swapaxes(2, 3) / 4  # a few keys may have most of the weight
    check(q, k, v, largest_score=float(np.abs(scores).max()), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [2, 16, 40])
@pytest.mark.parametrize("kv_len", [70, 4500])
def test_values_that_are_part_of_their_keys(engine, rng, dtype, heads, kv_len):
    """As in latent attention: a view of the keys gives the bits that a copy of them gives."""
    q, k, _ = make(rng, (2, heads, 1, 1, kv_len, 40, 40), dtype)
    k[0, 0, 20, 5] = np.inf  # in a block that the mask hides in part
    options = {"attn_mask": np.arange(kv_len) != 20, "key_lengths": [kv_len, 19]}
    for keys in (k, k.astype(np.dtype(dtype).newbyteorder())):
        for begin, end in ((0, 24), (0, 40), (16, 40)):
            value = keys[..., begin:end]
            shared = sdpa(q, keys, value, enable_gqa=True, **options)
            copied = sdpa(q, keys, np.array(value), enable_gqa=True, **options)
            np.testing.assert_array_equal(shared, copied)
    check(q, k, k[..., :24], **options)


@given(data=st.data())
def test_anything_drawn_at_random(data: st.DataObject):
    """Shapes, layouts, masks and modifiers, on each engine, tile kind and ISA of this machine."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    b, hkv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lq, lk = draw(st.integers(0, 90)), draw(st.integers(0, 150))
    d, dv = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(DTYPES))
    batch = draw(st.sampled_from([(), (b,), (b, 2)]))

    def tensor(*shape: int) -> np.ndarray:
        order = draw(st.permutations(range(len(shape))))
        x = normal(rng, tuple(shape[i] for i in order), dtype).transpose(np.argsort(order))
        steps = tuple(slice(None, None, draw(st.sampled_from([1, -1]))) for _ in shape)
        return x[steps]

    q = tensor(*batch, hkv * group, lq, d)
    k_batch = tuple(draw(st.sampled_from([1, n])) for n in batch)
    k, v = tensor(*k_batch, hkv, lk, d), tensor(*batch, hkv, lk, dv)
    options: dict[str, Any] = {
        "is_causal": draw(st.booleans()),
        "query_offset": draw(st.integers(-40, 120)),
        "softcap": draw(st.sampled_from([None, 1.5])),
        "sinks": draw(st.sampled_from([None, np.linspace(-1, 2, hkv * group)])),
        "alibi_slopes": draw(st.sampled_from([None, np.linspace(0, 0.5, hkv * group)])),
        "key_lengths": draw(st.sampled_from([None, lk // 2])),
        "window": draw(st.sampled_from([None, (5, 3), (None, 0), (40, None)])),
    }
    mask_shape = tuple(draw(st.sampled_from([1, n])) for n in (hkv * group, lq, lk))
    allowed = rng.random(mask_shape) > 0.3
    additive = np.where(allowed, rng.standard_normal(mask_shape), -np.inf).astype(np.float32)
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
            check(q, k, v, **options)


@pytest.mark.parametrize("order", ["<", ">"])
def test_bfloat16_as_bit_patterns(engine, rng, order):
    """uint16 arrays give uint16 results, with the bits that arrays of ml_dtypes give."""
    shape = (2, 3, 70, 40)
    q, k, v = (rng.standard_normal(shape).astype(ml_dtypes.bfloat16) for _ in range(3))
    mask = rng.standard_normal((70, 70)).astype(ml_dtypes.bfloat16)
    expected = sdpa(q, k, v, mask, is_causal=True)
    bits = [x.view(np.uint16).astype(order + "u2") for x in (q, k, v, mask)]
    got = sdpa(*bits, is_causal=True, dtype="bfloat16")
    assert got.dtype == np.uint16
    assert got.dtype.isnative
    np.testing.assert_array_equal(got, expected.view(np.uint16))
    out = np.zeros(shape, np.uint16)
    assert sdpa(*bits, is_causal=True, dtype=ml_dtypes.bfloat16, out=out) is out
    np.testing.assert_array_equal(out, got)
    mixed = sdpa(q, k, v, bits[3], is_causal=True, dtype="bfloat16")
    np.testing.assert_array_equal(mixed.view(np.uint16), got)


@pytest.fixture(scope="module", params=[np.float32, ml_dtypes.bfloat16])
def far(request):
    """Return tensors with over 64 MiB of keys, windows of a shorter array, and the exact result."""
    rng, dtype = np.random.default_rng(0), np.dtype(request.param)
    count = (1 << 26) // ((1000 + 8) * dtype.itemsize) + 1000
    whole = rng.standard_normal(count + 999).astype(dtype)
    keys = np.lib.stride_tricks.sliding_window_view(whole, 1000)[None]
    query = rng.standard_normal((16, 1, 1000)).astype(dtype)
    return query, keys, keys[:, :, :8], oracle.attention(query, keys, keys[:, :, :8])[0]


def test_more_keys_than_caches_hold(engine, far):
    """Beyond the caches, decoding takes calls with more rows."""
    query, key, value, exact = far
    out = sdpa(query, key, value, enable_gqa=True)
    tolerance = 4e-5 if query.dtype == np.float32 else 1e-2 * np.abs(exact).max()
    np.testing.assert_allclose(out.astype(float), exact, rtol=0, atol=tolerance)
