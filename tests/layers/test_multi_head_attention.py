"""MultiHeadAttention against the formula in float64: what it computes, refuses and leaves alone."""

from __future__ import annotations

import copy
import pickle

import ml_dtypes
import numpy as np
import oracle
import pytest
from helpers import layouts, normal

import qkv_fast
from qkv_fast import KVCache, MultiHeadAttention


def plain(layer, x, context=None, *, real=np.float64, is_causal=False, **options):
    """Return the layer's result as the formula has it; options are those of oracle.attention."""
    key, value = (x, x) if context is None else context
    state = {name: array.astype(real) for name, array in layer.state_dict().items()}
    rows = [layer.num_heads * layer.head_dim] + 2 * [layer.num_kv_heads * layer.head_dim]
    bounds = np.cumsum(rows)[:-1]
    weights = [state.get(f"{part}_proj_weight") for part in "qkv"]
    if "in_proj_weight" in state:
        weights = np.split(state["in_proj_weight"], bounds)
    biases = np.split(state.get("in_proj_bias", np.zeros(sum(rows), real)), bounds)

    def heads(source, weight, bias, norm):
        y = source.astype(real) @ weight.T + bias
        y = y.reshape(*source.shape[:-1], -1, layer.head_dim)
        if norm in state:
            y = y / np.sqrt((y * y).mean(axis=-1, keepdims=True) + real(layer.norm_eps))
            y = y * state[norm]
        return np.swapaxes(y, -2, -3)

    norms = ("q_norm.weight", "k_norm.weight", None)
    q, k, v = map(heads, (x, key, value), weights, biases, norms)
    if layer.scale is not None:
        options["scale"] = layer.scale
    out, _ = oracle.attention(q, k, v, is_causal=is_causal, real=real, **options)
    out = np.swapaxes(out, -2, -3).reshape(*x.shape[:-1], -1)
    return out @ state["out_proj.weight"].T + state.get("out_proj.bias", real(0))


def check(layer, x, context=None, *, got=None, **options):
    got = layer(x, context, **options) if got is None else got
    real = np.float64 if layer.out_proj_weight.dtype == np.float64 else np.float32
    exact = plain(layer, x, context, **options)
    oracle.assert_error_at_most_twice(
        got, plain(layer, x, context, real=real, **options), exact, 64
    )
    return got


def make_layer(rng, *sizes, **options):
    layer = MultiHeadAttention(*sizes, rng=rng, **options)
    for bias in (layer.in_proj_bias, layer.out_proj_bias):
        if bias is not None:
            dtype = ml_dtypes.bfloat16 if bias.dtype == np.uint16 else bias.dtype
            bias.view(dtype)[...] = rng.standard_normal(bias.shape)
    return layer


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "head_dim": 12},
        {"bias": False},
        {"scale": 0.3},
        {"qk_norm": True, "norm_eps": 1e-3},
        {"dtype": "float64"},
    ],
    ids=str,
)
def test_self_attention_of_every_kind(engine, rng, sizes):
    layer = make_layer(rng, 40, 4, **sizes)
    for shape in ((2, 33, 40), (1, 1, 40), (9, 2, 40), (17, 40)):
        x = normal(rng, shape, layer.out_proj_weight.dtype)
        check(layer, x)
        check(layer, x, is_causal=True)


@pytest.mark.parametrize("sizes", [{}, {"kdim": 24, "vdim": 24}, {"kdim": 24, "vdim": 56}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention(engine, rng, sizes, bias):
    layer = make_layer(rng, 40, 4, bias=bias, **sizes)
    x, key, value = (normal(rng, (3, n, d)) for n, d in ((9, 40), (21, layer.kdim),
                                                         (21, layer.vdim)))  # fmt: skip
    check(layer, x, (key, value))
    check(layer, x[0], (key[0], value[0]))
    if layer.kdim == layer.vdim:
        got = layer(x, key)
        check(layer, x, (key, key), got=got)
        cache = layer.new_cache(3, 30)
        layer.fill(cache, key)
        np.testing.assert_allclose(layer(x, cache), got, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(layer(x[:, 3:4], cache), got[:, 3:4], rtol=1e-5, atol=1e-5)
        assert (cache.lengths == 21).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_weights_of_16_bits_are_computed_in_float32(engine, rng, dtype):
    layer = make_layer(rng, 72, 3, dtype=np.dtype(dtype).name)
    assert layer.in_proj_weight.dtype == (np.uint16 if dtype is ml_dtypes.bfloat16 else dtype)
    state = {name: array.view(dtype).astype(np.float32)
             for name, array in layer.state_dict().items()}  # fmt: skip
    wide = MultiHeadAttention.from_state_dict(state, 3)
    for shape in ((2, 40, 72), (1, 3, 72)):
        x = normal(rng, shape)
        got = layer(x)
        assert got.dtype == np.float32
        check(wide, x, got=got)
        narrow = x.astype(dtype)
        got = layer(narrow)
        assert got.dtype == dtype
        expected = plain(wide, narrow.astype(np.float32))
        limit = np.abs(expected).max() * (2**-8 if dtype is ml_dtypes.bfloat16 else 2**-11) + 1e-5
        assert np.abs(got.astype(float) - expected).max() <= limit


def test_many_sequences_are_taken_some_at_a_time(engine, rng):
    layer = make_layer(rng, 16, 2)
    x = normal(rng, (40, 60, 16))
    mask = rng.random((40, 1, 60, 60)) < 0.7
    mask[..., 0] = True
    check(layer, x, attn_mask=mask)
    slopes = rng.random((40, 2)).astype(np.float32)
    got = layer(x, alibi_slopes=slopes)
    np.testing.assert_allclose(got[7:8], layer(x[7:8], alibi_slopes=slopes[7:8]), atol=1e-5)


def test_ranges_and_biases_of_a_batch(engine, rng):
    layer = make_layer(rng, 16, 2)
    x = normal(rng, (40, 60, 16))
    begins = rng.integers(0, 30, (40, 1, 60))
    bias = normal(rng, (40, 2, 60, 60))
    check(layer, x, key_ranges=(begins, None))
    check(layer, x, attn_bias=bias, is_causal=True)
    check(layer, x, attn_bias=bias[0], key_ranges=(None, begins[0] + 30))


@pytest.mark.parametrize("kind", ["none", "right", "left", "all of one", "holes"])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "per head"])
def test_padding_and_masks(engine, rng, kind, mask):
    layer = make_layer(rng, 24, 3)
    x = normal(rng, (3, 20, 24))
    padding = np.zeros((3, 20), bool)
    if kind == "right":
        padding[0, 12:], padding[2, 1:] = True, True
    elif kind == "left":
        padding[0, :5], padding[1, :19] = True, True
    elif kind == "all of one":
        padding[1] = True
    elif kind == "holes":
        padding[:, 1:] = rng.random((3, 19)) < 0.5
    masks = {
        "none": None, "bool": rng.random((20, 20)) < 0.8,
        "float": normal(rng, (1, 20, 20)), "per head": normal(rng, (3, 3, 20, 20)),
    }  # fmt: skip
    allowed = ~padding[:, np.newaxis, np.newaxis]
    given = masks[mask]
    if given is None:
        joined = allowed
    elif given.dtype == bool:
        joined = given & allowed
    else:
        joined = np.where(allowed, given, -np.inf)
    got, weights = layer(x, key_padding_mask=padding, attn_mask=given, need_weights=True)
    np.testing.assert_array_equal(got, layer(x, key_padding_mask=padding, attn_mask=given))
    check(layer, x, got=got, attn_mask=joined)
    assert (weights[np.broadcast_to(~(joined if joined.dtype == bool else np.isfinite(joined)),
                                    weights.shape)] == 0).all()  # fmt: skip
    sums = weights.sum(axis=-1)
    np.testing.assert_allclose(sums[sums > 0], 1, rtol=1e-5)


def test_padding_may_hold_anything(engine, rng):
    layer = make_layer(rng, 24, 3)
    x = normal(rng, (2, 20, 24))
    padding = np.zeros((2, 20), bool)
    padding[0, 15:] = True
    clean = layer(x, key_padding_mask=padding)
    x[0, 15:] = np.nan
    np.testing.assert_array_equal(layer(x, key_padding_mask=padding)[0, :15], clean[0, :15])


def test_the_weights_are_those_of_the_op(engine, rng):
    layer = make_layer(rng, 48, 4, num_kv_heads=2)
    x = normal(rng, (3, 25, 48))
    for options in ({}, {"is_causal": True}, {"window": (4, 0), "softcap": 3.0}):
        got, weights = layer(x, need_weights=True, **options)
        assert weights.shape == (3, 4, 25, 25)
        value = (x @ layer.in_proj_weight[72:].T + layer.in_proj_bias[72:]).reshape(3, 25, 2, 12)
        mixed = weights @ np.repeat(value.swapaxes(1, 2), 2, axis=1)
        again = mixed.swapaxes(1, 2).reshape(3, 25, 48) @ layer.out_proj_weight.T
        np.testing.assert_allclose(got, again + layer.out_proj_bias, atol=1e-5)
        flat = layer(x[1], need_weights=True, **options)[1]
        np.testing.assert_allclose(flat, weights[1], atol=1e-6)


CACHES = {
    "one piece": {},
    "pages": {"page_size": 5},
    "window": {"window": 6},
    "int8": {"dtype": "int8", "page_size": 4},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("kind", CACHES)
def test_token_by_token_is_as_at_once(engine, rng, kind):
    layer = make_layer(rng, 48, 4, num_kv_heads=2, qk_norm=True)
    x = normal(rng, (2, 30, 48))
    options = CACHES[kind]
    close = {"atol": {"int8": 0.05, "bfloat16": 0.02}.get(kind, 2e-6), "rtol": 1e-5}
    window = {"window": (6, 0)} if kind == "window" else {}
    whole = layer(x, is_causal=True, **window)
    cache = layer.new_cache(2, 40, **options)
    pieces = [layer(x[:, :7], is_causal=True, cache=cache)]
    for i in range(7, 30, 1 if kind == "one piece" else 3):
        end = min(30, i + (1 if kind == "one piece" else 3))
        pieces.append(layer(x[:, i:end], is_causal=True, cache=cache))
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, **close)
    assert (cache.lengths == 30).all()
    if kind != "window":
        cache.truncate(28)
        got, weights = layer(x[:, 28:], is_causal=True, cache=cache, need_weights=True)
        np.testing.assert_allclose(got, whole[:, 28:], **close)
        expected = layer(x, is_causal=True, need_weights=True)[1]
        np.testing.assert_allclose(weights, expected[:, :, 28:], **close)
    else:
        with pytest.raises(ValueError, match="need_weights"):
            layer(x[:, :1], is_causal=True, cache=cache, need_weights=True)


def test_sequences_of_a_cache_differ_in_length(engine, rng):
    layer = make_layer(rng, 24, 2)
    x = normal(rng, (2, 12, 24))
    cache = layer.new_cache(2, 20)
    layer(x[:, :8], is_causal=True, cache=cache)
    cache.truncate([8, 3])
    got, weights = layer(x[:, 8:10], is_causal=True, cache=cache, need_weights=True)
    np.testing.assert_allclose(got[0], layer(x[0, :10], is_causal=True)[8:], atol=1e-5)
    other = layer(np.concatenate([x[1, :3], x[1, 8:10]]), is_causal=True, need_weights=True)
    np.testing.assert_allclose(got[1], other[0][3:], atol=1e-5)
    np.testing.assert_allclose(weights[1, :, :, :5], other[1][:, 3:], atol=1e-5)
    assert (weights[1, :, :, 5:] == 0).all()


def test_out_is_written_in_place(engine, rng):
    layer = make_layer(rng, 24, 2)
    x = normal(rng, (50, 30, 24))
    expected = layer(x)
    out = np.full_like(x, np.nan)
    assert layer(x, out=out) is out
    np.testing.assert_array_equal(out, expected)
    inside = x.copy()
    layer(inside, out=inside)
    np.testing.assert_array_equal(inside, expected)
    shifted = np.concatenate([x, x[:1]])
    layer(shifted[:-1], out=shifted[1:])
    np.testing.assert_array_equal(shifted[1:], expected)
    for name, array in layouts(np.zeros((1, 50, 30, 24), np.float32)).items():
        if name == "swapped bytes":
            continue
        target = array[0]
        layer(x, out=target)
        np.testing.assert_array_equal(target, expected, err_msg=name)
    context = normal(rng, (50, 30, 24))
    crossed = layer(x, context)
    layer(x, context, out=context)
    np.testing.assert_array_equal(context, crossed)


def test_any_layout_of_x(engine, rng):
    layer = make_layer(rng, 24, 2)
    x = normal(rng, (1, 3, 30, 24))
    expected = layer(x[0])
    for name, array in layouts(x).items():
        np.testing.assert_array_equal(layer(array[0]), expected, err_msg=name)
    np.testing.assert_allclose(layer(np.broadcast_to(x[0, :1], (4, 30, 24)))[3], expected[0],
                               atol=1e-6)  # fmt: skip


def test_empty_axes(engine, rng):
    layer = make_layer(rng, 24, 2)
    assert layer(np.ones((0, 5, 24), np.float32)).shape == (0, 5, 24)
    assert layer(np.ones((2, 0, 24), np.float32)).shape == (2, 0, 24)
    nothing = layer(np.ones((2, 3, 24), np.float32), np.ones((2, 0, 24), np.float32))
    np.testing.assert_allclose(nothing, np.broadcast_to(layer.out_proj_bias, (2, 3, 24)))


def test_copies_and_pickles(rng):
    layer = make_layer(rng, 24, 2)
    x = normal(rng, (1, 5, 24))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(other(x), layer(x))
        assert repr(other) == repr(layer)


def test_initial_weights_are_drawn_by_the_seed():
    one, two = (MultiHeadAttention(32, 4, rng=5) for _ in range(2))
    np.testing.assert_array_equal(one.in_proj_weight, two.in_proj_weight)
    assert 0.9 * (6 / 128) ** 0.5 < np.abs(one.in_proj_weight).max() <= (6 / 128) ** 0.5
    assert np.abs(one.out_proj_weight).max() <= 32**-0.5
    assert not one.in_proj_bias.any()
    assert (MultiHeadAttention(32, 4, rng=6).in_proj_weight != one.in_proj_weight).any()


ARGUMENTS = [
    ((30, 4), {}, ValueError, "embed_dim is 30: it must be a multiple of num_heads, 4"),
    ((32, 4), {"num_kv_heads": 3}, ValueError, "num_kv_heads"),
    ((32, 0), {}, ValueError, "num_heads"),
    ((32.0, 4), {}, TypeError, "embed_dim"),
    ((32, 4), {"dtype": "int8"}, ValueError, "dtype is 'int8'"),
    ((32, 4), {"dtype": None}, TypeError, "dtype"),
    ((32, 4), {"bias": 1}, TypeError, "bias"),
    ((32, 4), {"scale": "1"}, TypeError, "scale"),
]


@pytest.mark.parametrize(("sizes", "options", "kind", "message"), ARGUMENTS, ids=str)
def test_arguments_that_are_refused(sizes, options, kind, message):
    with pytest.raises(kind, match=message):
        MultiHeadAttention(*sizes, **options)


X = np.ones((2, 5, 24), np.float32)
CALLS = {
    "x has shape": {"x": X[..., :23]},
    "x has dtype int64": {"x": X.astype(int)},
    "context has batch 1": {"context": X[:1]},
    "context has shape": {"context": X[..., :20]},
    "context has 3 arrays": {"context": (X, X, X)},
    "key_padding_mask": {"key_padding_mask": np.zeros((2, 6), bool)},
    "key_padding_mask is an array of int64": {"key_padding_mask": np.zeros((2, 5), int)},
    "attn_mask": {"attn_mask": np.zeros((7, 7), bool)},
    "must be of float32": {"out": np.zeros((2, 5, 24))},
    "out is read-only": {"out": np.broadcast_to(np.float32(0), (2, 5, 24))},
    "num_threads": {"num_threads": 0},
    "is_causal": {"is_causal": 1},
    "need_weights": {"need_weights": None},
    "the cache has batch": {"cache": KVCache(2, 3, 10, 12)},
    "context goes with": {"context": X, "cache": KVCache(2, 2, 10, 12)},
    "window": {"window": (1, -3)},
}


@pytest.mark.parametrize("message", CALLS)
def test_calls_that_are_refused(engine, message):
    layer = MultiHeadAttention(24, 2, rng=0)
    out = np.full((2, 5, 24), 7, np.float32)
    arguments = {"x": X, "out": out} | CALLS[message]
    with pytest.raises((TypeError, ValueError), match=message):
        layer(**arguments)
    assert (out == 7).all()


def test_a_failed_call_takes_its_tokens_off_the_cache(engine):
    layer = MultiHeadAttention(24, 2, rng=0)
    cache = layer.new_cache(2, 10)
    layer(X, is_causal=True, cache=cache)
    with pytest.raises(ValueError, match="attn_mask"):
        layer(X[:, :2], attn_mask=np.zeros((7, 9), bool), cache=cache)
    with pytest.raises(ValueError, match="capacity"):
        layer(np.ones((2, 6, 24), np.float32), cache=cache)
    assert (cache.lengths == 5).all()


def test_a_layer_of_other_sizes_needs_a_context():
    layer = MultiHeadAttention(24, 2, kdim=20, vdim=30, rng=0)
    with pytest.raises(ValueError, match="context must be given"):
        layer(X)
    with pytest.raises(ValueError, match="context must be a pair"):
        layer(X, X)
    assert "kdim=20" in repr(layer)
    assert "vdim=30" in repr(layer)


def test_threads_do_not_change_bits(native, many_cpus, rng):
    layer = make_layer(rng, 128, 4)
    x = normal(rng, (3, 200, 128))
    one = layer(x, num_threads=1)
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(layer(x, num_threads=threads), one)


def test_a_batch_does_not_change_bits(native, rng):
    # A product of BLAS may: OpenBLAS's kernels for Haswell round a row as its place has it.
    layer = make_layer(rng, 128, 4)
    x = normal(rng, (3, 200, 128))
    with qkv_fast.backend(tiles="simd"):
        np.testing.assert_array_equal(layer(x[1:2]), layer(x)[1:2])


def test_the_package_knows_the_layer():
    assert qkv_fast.MultiHeadAttention.__module__ == "qkv_fast"
