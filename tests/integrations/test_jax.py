"""integrations.jax: attention of JAX arrays; jax.nn, the op and the oracle judge."""

from __future__ import annotations

import contextlib
import ctypes
import doctest
import functools
import inspect
import shutil
import subprocess
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
from helpers import normal, run_python

import qkv_fast

jax = pytest.importorskip("jax", minversion="0.10", reason="JAX 0.10 is not installed")

import jax.numpy as jnp  # noqa: E402

import qkv_fast.integrations.jax as adapter  # noqa: E402
from qkv_fast.integrations import _xla_ffi  # noqa: E402
from qkv_fast.integrations.jax import (  # noqa: E402
    dot_product_attention,
    scaled_dot_product_attention,
)

DTYPES = ["float32", "float64", "float16", "bfloat16"]


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        yield


def tensors(
    rng: np.random.Generator,
    dtype: str = "float32",
    shape: tuple[int, ...] = (2, 4, 2, 5, 7, 8, 8),
) -> list[jax.Array]:
    """Return query, key and value of (batch, Hq, Hkv, Lq, Lk, D, Dv)."""
    b, hq, hkv, lq, lk, d, dv = shape
    shapes = (b, hq, lq, d), (b, hkv, lk, d), (b, hkv, lk, dv)
    return [jnp.asarray(normal(rng, s), dtype) for s in shapes]


def in_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function compiled with all of its arrays traced, and the rest fixed."""

    def called(*arrays: Any, **options: Any) -> Any:
        traced = {k: x for k, x in options.items() if has_arrays(x)}
        fixed = {k: x for k, x in options.items() if k not in traced}
        return jax.jit(functools.partial(function, **fixed))(*arrays, **traced)

    return called


def has_arrays(x: Any) -> bool:
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))


WAYS = {"eager": lambda function: function, "jit": in_jit}
ways = pytest.mark.parametrize("way", WAYS)


def lengths(*values: int) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


# --- Beside jax.nn ------------------------------------------------------------------------------

NN_SHAPES = {  # (B, T, S, N, K, H)
    "one": (1, 1, 1, 1, 1, 4),
    "small": (2, 5, 7, 4, 4, 8),
    "grouped": (2, 33, 40, 6, 2, 16),
    "long": (1, 130, 300, 2, 1, 64),
}
NN_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "window": {"local_window_size": 3},
    "uneven window": {"local_window_size": (2, 0), "is_causal": True},
    "mask": {"mask": "mask"},
    "bias": {"bias": "bias"},
    "all": {"mask": "mask", "bias": "bias", "is_causal": True, "scale": 0.5},
}


def nn_inputs(rng: np.random.Generator, name: str, dtype: str) -> list[jax.Array]:
    b, t, s, n, k, h = NN_SHAPES[name]
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, h)
    return [jnp.asarray(normal(rng, shape), dtype) for shape in shapes]


def nn_options(rng: np.random.Generator, name: str, shape: str) -> dict[str, Any]:
    b, t, s, n, *_ = NN_SHAPES[shape]
    options = dict(NN_OPTIONS[name])
    if "mask" in options:
        allowed = rng.random((b, 1, t, s)) < 0.7
        allowed[..., 0] = True  # JAX means another thing by a row that sees no key
        options["mask"] = jnp.asarray(allowed)
    if "bias" in options:
        options["bias"] = jnp.asarray(normal(rng, (1, n, t, s)))
    return options


def heads_first(x: Any) -> np.ndarray:
    return np.asarray(x).swapaxes(-2, -3)


@ways
@pytest.mark.parametrize("options", NN_OPTIONS)
@pytest.mark.parametrize("shape", NN_SHAPES)
def test_equals_jax_nn(rng, shape, options, way):
    q, k, v = nn_inputs(rng, shape, "float32")
    given = nn_options(rng, options, shape)
    result = WAYS[way](dot_product_attention)(q, k, v, **given)
    expected = jax.nn.dot_product_attention(q, k, v, **given)
    assert isinstance(result, jax.Array)
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=1e-5)


@ways
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ["plain", "all"])
def test_errors_are_at_most_twice_those_of_a_plain_computation(rng, dtype, options, way):
    with precision(dtype):
        q, k, v = nn_inputs(rng, "grouped", dtype)
        given = nn_options(rng, options, "grouped")
        result = WAYS[way](dot_product_attention)(q, k, v, **given)
        expected = jax.nn.dot_product_attention(q, k, v, **given)
        assert result.dtype == expected.dtype == dtype
        assert result.shape == expected.shape
        arrays = [heads_first(x) for x in (q, k, v)]
    names = {"mask": "attn_mask", "bias": "attn_bias"}
    oracle.assert_close(
        heads_first(result), *arrays, **{names.get(name, name): x for name, x in given.items()}
    )


@ways
def test_lengths_as_jax_nn(rng, way):
    q, k, v = nn_inputs(rng, "small", "float32")
    given = {"query_seq_lengths": lengths(2, 5), "key_value_seq_lengths": lengths(7, 3)}
    attend = WAYS[way](dot_product_attention)
    result, lse = attend(q, k, v, return_residual=True, **given)
    expected, residual = jax.nn.dot_product_attention(q, k, v, return_residual=True, **given)
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-6)
    assert not np.asarray(result[0, 2:]).any()
    seen = np.arange(5) < np.array([[2], [5]])
    assert lse.dtype == residual.dtype
    np.testing.assert_allclose(lse[seen], residual[seen], rtol=2e-5)
    assert (lse[~seen] == -np.inf).all()
    beyond = attend(q, k, v, key_value_seq_lengths=lengths(70, 3))  # as JAX, more than there are
    np.testing.assert_array_equal(beyond, attend(q, k, v, key_value_seq_lengths=lengths(7, 3)))


@ways
def test_one_batch_entry_needs_no_axis(rng, way):
    q, k, v = (x[0] for x in nn_inputs(rng, "small", "float32"))
    mask = jnp.asarray(rng.random((1, 4, 5, 7)) < 0.7).at[..., 0].set(True)
    given = {"query_seq_lengths": lengths(3), "key_value_seq_lengths": lengths(6), "mask": mask}
    result = WAYS[way](dot_product_attention)(q, k, v, **given)
    expected = jax.nn.dot_product_attention(q, k, v, **given)
    assert result.shape == expected.shape == (5, 4, 8)
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-6)


@ways
def test_a_row_without_keys_is_zeros(rng, way):
    q, k, v = nn_inputs(rng, "small", "float32")
    mask = jnp.ones((2, 1, 5, 7), bool).at[0, :, 2].set(False)
    result = WAYS[way](dot_product_attention)(q, k, v, mask=mask)
    assert not np.asarray(result[0, 2]).any()
    mean = jax.nn.dot_product_attention(q, k, v, mask=mask)[0, 2]
    np.testing.assert_allclose(mean, v[0].mean(axis=0), rtol=1e-4, atol=1e-5)  # as the notes say


def test_the_parameters_are_those_of_jax_nn():
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(dot_product_attention).parameters
    shown = [[(p.name, p.kind, p.default) for p in x.values()] for x in (ours, theirs)]
    assert shown[0] == shown[1]


@ways
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"mask": np.ones((1, 1, 5, 7), np.float32)}, TypeError, "mask has dtype float32"),
        ({"implementation": "cudnn"}, ValueError, "must be None or 'xla'"),
        ({"query_seq_lengths": np.ones(3, int)}, ValueError, r"must be \(2,\)"),
        ({"bias": np.ones((1, 3, 5, 7), np.float32)}, ValueError, "attn_bias has shape"),
        ({"local_window_size": (-1, 2)}, ValueError, "window's left side is -1"),
    ],
)
def test_errors_of_dot_product_attention(rng, change, kind, message, way):
    q, k, v = nn_inputs(rng, "small", "float32")
    with pytest.raises(kind, match=message):
        WAYS[way](dot_product_attention)(q, k, v, **change)
    with pytest.raises(ValueError, match="key has shape"):
        WAYS[way](dot_product_attention)(q, k[0], v)


# --- Beside the op ------------------------------------------------------------------------------


def features(rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Return options for tensors of (2, 4, 2, 5, 7, 8, 8)."""
    mask = jnp.asarray(rng.random((5, 7)) < 0.7)
    bias = jnp.asarray(normal(rng, (2, 4, 5, 7)))
    begins = jnp.asarray(rng.integers(0, 4, (2, 1, 5)), jnp.int32)
    ends = jnp.asarray(rng.integers(3, 9, (4, 5)), jnp.int32)
    return {
        "plain": {},
        "causal": {"is_causal": True, "scale": 0.3},
        "offset": {"is_causal": True, "query_offset": 2},
        "offsets": {"window": (2, None), "query_offset": lengths(2, -1)},
        "one traced offset": {"window": (2, 1), "query_offset": jnp.int32(3)},
        "softcap": {"softcap": 2.0, "num_threads": 1},
        "mask": {"attn_mask": mask},
        "floating mask and bias": {"attn_mask": bias[0, 0], "attn_bias": bias},
        "slopes": {"alibi_slopes": jnp.asarray([0.5, 0.25, 0.1, 0.0])},
        "sinks": {"sinks": jnp.asarray([0.5, -1.0, 2.0, 0.0])},
        "lengths": {"key_lengths": lengths(3, 7)},
        "one length": {"key_lengths": 4},
        "ranges": {"key_ranges": (begins, ends)},
        "half a range": {"key_ranges": (None, ends)},
        "whole ranges": {"key_ranges": (1, 5)},
        "lse": {"return_lse": True, "key_lengths": lengths(0, 7)},
    }


def on_arrays(arrays: Any, options: dict[str, Any]) -> Any:
    """Return what the op gives for the same call of NumPy arrays."""
    arrays = [np.asarray(x) for x in arrays]
    options = {k: jax.tree.map(as_numpy, x) for k, x in options.items()}
    return qkv_fast.scaled_dot_product_attention(*arrays, **options)


def as_numpy(x: Any) -> Any:
    return np.asarray(x) if isinstance(x, jax.Array) else x


def assert_equal(result: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        assert len(result) == len(expected)
        for a, b in zip(result, expected, strict=True):
            assert_equal(a, b)
        return
    assert isinstance(result, jax.Array)
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(result), expected)


@ways
@pytest.mark.parametrize("name", features(np.random.default_rng(0)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_op_to_the_bit(rng, dtype, name, way):
    with precision(dtype):
        arrays = tensors(rng, dtype)
        options = {"enable_gqa": True, **features(rng)[name]}
        result = WAYS[way](scaled_dot_product_attention)(*arrays, **options)
        assert_equal(result, on_arrays(arrays, options))


@ways
@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 8), (7, 8), (7, 3)],
        [(5, 8), (1, 7, 8), (1, 7, 3)],
        [(4, 5, 8), (7, 8), (7, 3)],
        [(3, 4, 5, 8), (7, 8), (7, 3)],
        [(3, 4, 5, 8), (4, 7, 8), (1, 4, 7, 3)],
        [(2, 1, 4, 5, 8), (3, 4, 7, 8), (4, 7, 3)],
        [(2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 3)],
        [(2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 3)],
        [(0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 3)],
    ],
)
def test_axes_as_the_op(rng, shapes, way):
    arrays = [jnp.asarray(normal(rng, shape)) for shape in shapes]
    options = {"enable_gqa": True, "return_lse": True}
    result = WAYS[way](scaled_dot_product_attention)(*arrays, **options)
    assert_equal(result, on_arrays(arrays, options))


def test_numpy_arrays_and_lists_become_jax_arrays(rng):
    q, k, v = tensors(rng)
    options = {"enable_gqa": True, "key_lengths": [3, 7], "alibi_slopes": [1.0, 0.5, 0.25, 0.125]}
    expected = on_arrays((q, k, v), options)
    arrays = [np.asarray(x, np.float64) for x in (q, k, v)]  # jnp.asarray makes them float32
    assert_equal(scaled_dot_product_attention(*arrays, **options), expected)
    assert_equal(jax.jit(lambda: scaled_dot_product_attention(*arrays, **options))(), expected)


def test_the_judge_for_a_jitted_feature_is_the_oracle_too(rng):
    q, k, v = tensors(rng, shape=(1, 4, 2, 70, 130, 32, 32))
    options = {"softcap": 5.0, "window": (40, 3), "query_offset": 60, "sinks": jnp.ones(4)}
    result = in_jit(scaled_dot_product_attention)(q, k, v, enable_gqa=True, **options)
    options["sinks"] = np.ones(4)
    oracle.assert_close(np.asarray(result), *(np.asarray(x) for x in (q, k, v)), **options)


ERRORS: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"key": np.ones((2, 2, 7, 9), np.float32)}, ValueError),
    ({"value": np.ones((2, 2, 6, 8), np.float32)}, ValueError),
    ({"query": np.ones(8, np.float32)}, ValueError),
    ({"query": np.ones((3, 4, 5, 8), np.float32)}, ValueError),
    ({"key": np.ones((2, 2, 7, 8), np.float16)}, TypeError),
    ({"query": np.ones((2, 4, 5, 8), np.int32)}, TypeError),
    ({"enable_gqa": False}, ValueError),
    ({"attn_mask": np.ones((2, 7), bool)}, ValueError),
    ({"attn_mask": np.ones((5, 7), np.int32)}, TypeError),
    ({"attn_bias": np.ones((5, 7), bool)}, TypeError),
    ({"sinks": np.ones(3, np.float32)}, ValueError),
    ({"alibi_slopes": np.ones((2, 5), np.float32)}, ValueError),
    ({"softcap": -1.0}, ValueError),
    ({"scale": "1"}, TypeError),
    ({"is_causal": 1}, TypeError),
    ({"window": 3}, TypeError),
    ({"key_lengths": 8}, ValueError),
    ({"key_lengths": np.ones(3, np.int32)}, ValueError),
    ({"key_ranges": (np.ones((2, 5), np.int32), None)}, ValueError),
    ({"key_ranges": 3}, TypeError),
    ({"query_offset": np.ones(2, np.float32)}, TypeError),
    ({"num_threads": 0}, ValueError),
    ({"dropout_p": 0.5}, ValueError),
]


@ways
@pytest.mark.parametrize(("change", "kind"), ERRORS)
def test_the_op_s_errors_while_a_call_is_traced(rng, change, kind, way):
    arrays = dict(zip(("query", "key", "value"), tensors(rng), strict=True))
    given = {"enable_gqa": True, **arrays, **change}
    staged = {k: jnp.asarray(x) if isinstance(x, np.ndarray) else x for k, x in given.items()}
    with pytest.raises(kind) as ours:
        WAYS[way](scaled_dot_product_attention)(**staged)
    with pytest.raises(kind) as theirs:
        qkv_fast.scaled_dot_product_attention(**{k: as_numpy(x) for k, x in given.items()})
    assert str(ours.value) == str(theirs.value)


# --- jit, vmap, scan ----------------------------------------------------------------------------


def test_a_compiled_program_meets_a_number_out_of_range(rng):
    q, k, v = tensors(rng)
    attend = jax.jit(functools.partial(scaled_dot_product_attention, enable_gqa=True))
    for _ in range(2):  # JAX raises another type from the second call on
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="key_lengths holds 9"):
            attend(q, k, v, key_lengths=9).block_until_ready()
    assert_equal(attend(q, k, v), on_arrays((q, k, v), {"enable_gqa": True}))  # and goes on


@pytest.mark.parametrize("name", ["scale", "is_causal", "softcap"])
def test_what_must_not_be_traced(rng, name):
    q, k, v = tensors(rng, shape=(1, 1, 1, 5, 7, 8, 8))
    with pytest.raises(TypeError, match=f"{name} is traced: .*static_argnames='{name}'"):
        jax.jit(lambda x: scaled_dot_product_attention(q, k, v, **{name: x}))(0.5)
    with pytest.raises(TypeError, match="window is traced"):
        jax.jit(lambda x: scaled_dot_product_attention(q, k, v, window=(x, 0)))(3)


BATCHED: dict[str, tuple[int, ...]] = {  # shapes without the axis that vmap maps
    "query": (2, 4, 5, 8),
    "key": (2, 2, 7, 8),
    "value": (2, 2, 7, 6),
    "attn_mask": (5, 7),
    "attn_bias": (4, 1, 7),
    "query_offset": (),
    "key_lengths": (2,),
    "alibi_slopes": (4,),
    "sinks": (4,),
    "begins": (2, 1, 5),
    "ends": (5,),
}


def arrays_of(rng: np.random.Generator, name: str, entries: int, axis: int = 0) -> jax.Array:
    shape = BATCHED[name]
    axis = min(axis, len(shape))
    shape = (*shape[:axis], entries, *shape[axis:])
    if name == "attn_mask":
        return jnp.asarray(rng.random(shape) < 0.8)
    low, high = {"key_lengths": (0, 8), "query_offset": (-2, 6), "begins": (0, 4), "ends": (3, 9),
                 }.get(name, (0, 0))  # fmt: skip
    return jnp.asarray(rng.integers(low, high, shape) if high else normal(rng, shape))


def call(arrays: dict[str, Any], options: dict[str, Any]) -> Any:
    given = dict(arrays)
    if "begins" in given or "ends" in given:
        given["key_ranges"] = given.pop("begins", None), given.pop("ends", None)
    return scaled_dot_product_attention(**given, **options)


def assert_as_one_by_one(rng: np.random.Generator, mapped: dict[str, int], jit: bool) -> None:
    names = set(mapped) | {"query", "key", "value"}
    entries = 3
    arrays = {
        name: arrays_of(rng, name, entries, mapped[name])
        if name in mapped
        else arrays_of(rng, name, 1)[0]
        for name in sorted(names)
    }
    axes = {
        name: min(mapped[name], len(BATCHED[name])) if name in mapped else None for name in arrays
    }
    options = {"enable_gqa": True, "return_lse": True, "window": (4, None)}
    function = jax.vmap(lambda given: call(given, options), in_axes=(axes,))
    out, lse = (jax.jit(function) if jit else function)(arrays)
    for i in range(entries):
        one = {
            name: x if axes[name] is None else jnp.take(x, i, axis=axes[name])
            for name, x in arrays.items()
        }
        expected = call(one, options)
        np.testing.assert_allclose(out[i], expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse[i], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", BATCHED)
def test_vmap_over_one_argument(rng, name, jit):
    assert_as_one_by_one(rng, {name: 0}, jit)


@pytest.mark.parametrize("jit", [False, True])
def test_vmap_over_all_arguments(rng, jit):
    assert_as_one_by_one(rng, dict.fromkeys(BATCHED, 0), jit)


@pytest.mark.parametrize(
    "names",
    [("query", "key"), ("key", "value"), ("query", "attn_mask"), ("value", "sinks"),
     ("query", "key", "value"), ("key_lengths", "ends"), ("attn_bias", "alibi_slopes", "query"),
     ],
)  # fmt: skip
@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_over_several_arguments_and_other_axes(rng, names, axis):
    assert_as_one_by_one(rng, dict.fromkeys(names, axis), jit=True)


def test_nested_vmap(rng):
    q, k = jnp.asarray(normal(rng, (3, 4, 5, 8))), jnp.asarray(normal(rng, (2, 4, 7, 8)))
    n = lengths(4, 7)
    inner = jax.vmap(
        lambda q, k, n: scaled_dot_product_attention(q, k, k, key_lengths=n), (None, 0, 0)
    )
    result = jax.jit(jax.vmap(inner, (0, None, None)))(q, k, n)
    assert result.shape == (3, 2, 4, 5, 8)
    for i, j in np.ndindex(3, 2):
        expected = on_arrays((q[i], k[j], k[j]), {"key_lengths": int(n[j])})
        np.testing.assert_allclose(result[i, j], expected, rtol=1e-5, atol=1e-6)


def test_vmap_of_dot_product_attention(rng):
    q, k, v = (jnp.stack([x, 2 * x]) for x in nn_inputs(rng, "grouped", "float32"))
    given = {"query_seq_lengths": lengths(3, 33), "key_value_seq_lengths": lengths(40, 7)}
    ours = jax.vmap(functools.partial(dot_product_attention, is_causal=True, **given))(q, k, v)
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True, **given)
    np.testing.assert_allclose(ours, jax.vmap(theirs)(q, k, v), rtol=3e-5, atol=3e-6)


def test_decoding_in_a_scan(rng):
    steps, size = 6, 8
    tokens = jnp.asarray(normal(rng, (steps, 2, 1, size)))  # heads, one query

    def step(cache: jax.Array, given: Any) -> Any:
        token, i = given
        cache = jax.lax.dynamic_update_slice(cache, token, (0, i, 0))
        attended = scaled_dot_product_attention(
            token, cache, cache, is_causal=True, query_offset=i, key_lengths=i + 1
        )
        return cache, attended

    empty = jnp.full((2, steps, size), jnp.nan)
    _, result = jax.jit(lambda x: jax.lax.scan(step, empty, (x, jnp.arange(steps))))(tokens)
    whole = tokens[:, :, 0].swapaxes(0, 1)
    expected = on_arrays((whole, whole, whole), {"is_causal": True})
    np.testing.assert_allclose(result[:, :, 0].swapaxes(0, 1), expected, rtol=1e-5, atol=1e-6)


def test_cond_while_and_checkpoint(rng):
    q, k, v = tensors(rng, shape=(1, 2, 2, 5, 5, 8, 8))

    def layer(x: jax.Array) -> Any:
        return jax.checkpoint(scaled_dot_product_attention)(x, k, v)

    looped = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: layer(x), x))(q)
    np.testing.assert_allclose(looped, layer(layer(layer(q))), rtol=1e-5, atol=1e-6)
    chosen = jax.jit(lambda p, x: jax.lax.cond(p, layer, lambda x: x, x))(True, q)
    assert_equal(chosen, on_arrays((q, k, v), {}))


def test_a_call_of_constants_within_a_trace(rng):
    q, k, v = tensors(rng, shape=(1, 2, 2, 5, 7, 8, 8))
    result = jax.jit(lambda x: x + scaled_dot_product_attention(q, k, v))(1.0)
    np.testing.assert_array_equal(result, 1 + on_arrays((q, k, v), {}))


# --- Gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", [scaled_dot_product_attention, dot_product_attention])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_differentiation_is_refused(rng, attend, argument):
    arrays = tensors(rng, shape=(1, 3, 3, 5, 5, 8, 8))

    def total(x: jax.Array) -> jax.Array:
        return attend(*arrays[:argument], x, *arrays[argument + 1 :]).sum()

    x = arrays[argument]
    calls: list[Callable[[], Any]] = [
        lambda: jax.grad(total)(x),
        lambda: jax.jit(jax.grad(total))(x),
        lambda: jax.vmap(jax.grad(total))(x[None]),
        lambda: jax.jvp(total, (x,), (x,)),
        lambda: jax.linearize(jax.jit(total), x),
        lambda: jax.jacfwd(jax.vmap(total))(x[None]),
    ]
    for differentiate in calls:
        with pytest.raises(NotImplementedError, match=r"call jax\.nn\.dot_product_attention"):
            differentiate()


def test_what_does_not_depend_on_the_call_is_differentiated(rng):
    q, k, v = tensors(rng, shape=(1, 2, 2, 5, 7, 8, 8))

    def total(x: jax.Array) -> jax.Array:
        return (x * scaled_dot_product_attention(jax.lax.stop_gradient(x), k, v)).sum()

    np.testing.assert_allclose(jax.grad(total)(q), on_arrays((q, k, v), {}), rtol=1e-6)


# --- Memory and devices -------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """Return a list that gets the arrays of each call of the op, and its out."""
    calls: list[dict[str, Any]] = []
    op = adapter._op

    def watching(arrays, options, out):
        calls.append({**arrays, "out": out})
        return op(arrays, options, out)

    monkeypatch.setattr(adapter, "_op", watching)
    return calls


@ways
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("attend", [scaled_dot_product_attention, dot_product_attention])
def test_nothing_is_copied(rng, seen, attend, dtype, way):
    with precision(dtype):
        q, k, v = tensors(rng, dtype, (2, 16, 16, 16, 16, 64, 64))
        mask = jnp.ones((2, 16, 16, 16), bool)
        name = "mask" if attend is dot_product_attention else "attn_mask"
        result = WAYS[way](attend)(q, k, v, **{name: mask}).block_until_ready()
    (call,) = seen
    for name, x in (("query", q), ("key", k), ("value", v), ("attn_mask", mask), ("out", result)):
        assert call[name].ctypes.data == x.unsafe_buffer_pointer(), name


def test_an_eager_result_lives_as_long_as_it_is_used(rng):
    q, k, v = tensors(rng, shape=(1, 4, 4, 128, 128, 64, 64))
    expected = on_arrays((q, k, v), {})
    results = [scaled_dot_product_attention(q, k, v) for _ in range(8)]
    more = jax.jit(lambda x: x + 1, donate_argnums=0)(results[0] + 0)
    for result in results:
        np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(more, expected + 1)


def test_donated_results(rng):
    """JAX does not write into memory that it took over, or only when nobody else reads it."""
    q, k, v = tensors(rng, shape=(1, 4, 4, 128, 128, 64, 64))
    result = scaled_dot_product_attention(q, k, v)
    expected = np.array(result)
    np.testing.assert_array_equal(jax.jit(lambda x: 2 * x, donate_argnums=0)(result), 2 * expected)


def test_other_platforms_are_refused():
    elsewhere = SimpleNamespace(devices=lambda: [SimpleNamespace(platform="gpu")])
    with pytest.raises(TypeError, match="key is on a device of the platform gpu: qkv_fast"):
        adapter._is_elsewhere("key", elsewhere)


DEVICES = """
import jax, numpy as np
from jax.sharding import PartitionSpec, NamedSharding
from qkv_fast.integrations.jax import scaled_dot_product_attention as attend

first, second = jax.devices()
x = jax.random.normal(jax.random.key(0), (4, 2, 16, 8))
expected = np.asarray(attend(x, x, x))
assert attend(x, x, x).devices() == {first}
moved = jax.device_put(x, second)
assert attend(moved, moved, moved).devices() == jax.jit(attend)(moved, moved, moved).devices()
assert attend(moved, moved, moved).devices() == {second}

mesh = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("i")))
for function in (attend, jax.jit(attend)):
    np.testing.assert_array_equal(function(spread, spread, spread), expected)
local = jax.shard_map(attend, mesh=mesh, in_specs=PartitionSpec("i"), out_specs=PartitionSpec("i"))
result = jax.jit(local)(spread, spread, spread)
np.testing.assert_array_equal(result, expected)
assert len(result.devices()) == 2
"""


def test_several_devices():
    done = run_python(DEVICES, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert done.returncode == 0, done.stderr


THREADS = """
import concurrent.futures, jax, numpy as np
from qkv_fast.integrations.jax import scaled_dot_product_attention as attend

x = jax.random.normal(jax.random.key(0), (1, 8, 1024, 64))  # 2 MiB: JAX computes it elsewhere
expected = np.asarray(attend(x, x, x))
compiled = jax.jit(lambda x: attend(x + 0, x + 0, x + 0))
def call(i):
    function = attend if i % 4 == 3 else compiled
    return [np.asarray(function(x, x, x) if function is attend else function(x)) for _ in range(3)]
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    for results in pool.map(call, range(16)):
        for result in results:
            np.testing.assert_array_equal(result, expected)

# Several calls in one program, which XLA may run at the same time, and many in flight.
many = jax.jit(lambda x: sum(attend(x + i, x, x) for i in range(4)))
waiting = [many(x) for _ in range(6)]
for result in waiting:
    np.testing.assert_array_equal(result, waiting[0])
"""


def test_calls_at_the_same_time():
    done = run_python(THREADS)  # fails after 120 s
    assert done.returncode == 0, done.stderr


# --- How XLA reaches the op ---------------------------------------------------------------------


def test_without_the_custom_call_pure_callback_computes(rng, monkeypatch):
    monkeypatch.setattr(adapter, "_chosen", None)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("API version (0.1) is incompatible")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    q, k, v = tensors(rng)
    options = {"enable_gqa": True, "return_lse": True, "key_lengths": lengths(3, 7)}
    with pytest.warns(RuntimeWarning, match=r"does not take version 0\.1 .*jax\.pure_callback"):
        result = in_jit(scaled_dot_product_attention)(q, k, v, **options)
    assert_equal(result, on_arrays((q, k, v), options))
    assert_as_one_by_one(rng, dict.fromkeys(BATCHED, 0), jit=True)
    ours = in_jit(dot_product_attention)(*(x.swapaxes(1, 2) for x in (q, k, v)))
    theirs = jax.nn.dot_product_attention(*(x.swapaxes(1, 2) for x in (q, k, v)))
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), "CANCELLED: KeyboardInterrupt"),
        (MemoryError("17 GB"), "RESOURCE_EXHAUSTED: 17 GB"),
        (RuntimeError("naïve"), "INTERNAL: naïve"),
    ],
)
def test_no_exception_passes_through_xla(rng, monkeypatch, error, code):
    def fail(*_: Any) -> None:
        raise error

    q, k, v = tensors(rng, shape=(1, 2, 2, 5, 7, 8, 8))
    attend = jax.jit(lambda *arrays: scaled_dot_product_attention(*arrays))
    expected = np.asarray(attend(q, k, v))
    with monkeypatch.context() as patch:
        patch.setattr(adapter, "_op", fail)
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=code):
            attend(q, k, v).block_until_ready()
    assert_equal(attend(q, k, v), expected)


PROBE = """
#include <stdio.h>
#include "xla/ffi/api/c_api.h"
#define FIELD(s, f) printf(#s "." #f " %zu %zu\\n", offsetof(s, f), sizeof(((s*)0)->f))
int main(void) {
  struct_fields
  return 0;
}
"""
STRUCTS = {
    "XLA_FFI_Extension_Base": _xla_ffi._Extension,
    "XLA_FFI_Api_Version": _xla_ffi._ApiVersion,
    "XLA_FFI_Metadata": _xla_ffi._Metadata,
    "XLA_FFI_Metadata_Extension": _xla_ffi._MetadataExtension,
    "XLA_FFI_Error_Create_Args": _xla_ffi._ErrorCreateArgs,
    "XLA_FFI_Buffer": _xla_ffi._Buffer,
    "XLA_FFI_ByteSpan": _xla_ffi._ByteSpan,
    "XLA_FFI_CallFrame": _xla_ffi._CallFrame,
    "XLA_FFI_Attrs": _xla_ffi._Attributes,
    "XLA_FFI_Args": _xla_ffi._Buffers,
    "XLA_FFI_Rets": _xla_ffi._Buffers,
    "XLA_FFI_Api": _xla_ffi._Api,
}


def test_the_structs_are_those_of_jaxlib_s_header(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    names = {
        ("XLA_FFI_Args", "buffers"): "args",
        ("XLA_FFI_Rets", "buffers"): "rets",
        ("XLA_FFI_Api", "error_create"): "XLA_FFI_Error_Create",
    }
    expected, lines = [], []
    for struct, ours in STRUCTS.items():
        for name, *_ in ours._fields_:
            theirs = names.get((struct, name), name)
            field = getattr(ours, name)
            size = field.size
            if struct == "XLA_FFI_CallFrame" and name in ("args", "rets", "attrs"):
                size = ctypes.sizeof(_xla_ffi._Buffers if name != "attrs" else _xla_ffi._Attributes)
            expected.append(f"{struct}.{theirs} {field.offset} {size}")
            lines.append(f"FIELD({struct}, {theirs});")
    source = tmp_path / "probe.c"
    source.write_text(PROBE.replace("struct_fields", "\n  ".join(lines)))
    subprocess.run(
        [compiler, "-I", jax.ffi.include_dir(), "-o", tmp_path / "probe", source], check=True
    )
    printed = subprocess.run([tmp_path / "probe"], check=True, capture_output=True, text=True)
    assert printed.stdout.splitlines() == expected


def test_a_program_holds_all_of_a_call(rng):
    """Not a number of this process: JAX keeps compiled programs on disk, for other processes."""
    q, k, v = tensors(rng)
    attend = functools.partial(scaled_dot_product_attention, enable_gqa=True, softcap=3.5)
    first, second = (jax.jit(attend).lower(q, k, v).as_text() for _ in range(2))
    assert first == second
    assert "qkv_fast.attention" in first
    assert "3.5" in first


def test_docstrings():
    assert doctest.testmod(adapter).failed == 0
    assert doctest.testmod(adapter).attempted > 5


WITHOUT = """
import sys
import qkv_fast, qkv_fast.integrations
assert "jax" not in sys.modules
sys.modules["jax"] = None
try:
    import qkv_fast.integrations.jax
except ImportError as error:
    assert "qkv-fast[jax]" in str(error)
else:
    raise AssertionError
"""


def test_without_jax():
    done = run_python(WITHOUT)
    assert done.returncode == 0, done.stderr
