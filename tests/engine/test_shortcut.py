"""_native/shortcut.pyx and stored_shortcut.pyx give the results and errors of the stages.

Most tests make each call twice, with the shortcut and without it.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import threading
from typing import Any

import numpy as np
import pytest
from helpers import assert_same, connected, counted, make, normal, without_shortcut

import qkv_fast
from qkv_fast import _dispatch
from qkv_fast import scaled_dot_product_attention as sdpa

DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16,
          "bfloat16": np.uint16}  # fmt: skip
SHAPES = [
    (1, 1, 1, 1, 1, 64, 64),  # B, Hq, Hkv, Lq, Lk, D, Dv
    (1, 9, 3, 1, 32, 64, 64),
    (3, 4, 2, 5, 70, 8, 24),
    (2, 2, 2, 131, 67, 33, 33),
]


def has_shortcut(engine: Any) -> bool:
    return engine.engine == "native" and engine.tiles == "simd"


def tensors(rng: np.random.Generator, shape: Any, name: str) -> tuple[list[np.ndarray], dict]:
    """Return query, key and value, and the options that go with their element type."""
    arrays = list(make(rng, shape, np.float32 if name == "bfloat16" else DTYPES[name]))
    if name == "bfloat16":
        return [(x.view(np.uint32) >> 16).astype(np.uint16) for x in arrays], {"dtype": name}
    return arrays, {}


def both_ways(*arguments: Any, call: Any = sdpa, **options: Any) -> bool:
    """Compare a call with and without the shortcut; return whether the shortcut computed it."""
    with without_shortcut():
        expected = call(*arguments, **options)
    with counted() as taken:
        assert_same(call(*arguments, **options), expected)
    return taken == [True]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_answers(engine, rng, shape, name):
    arrays, options = tensors(rng, shape, name)
    batch, heads, _, q_len, kv_len, *_ = shape
    options["enable_gqa"] = True
    padding = rng.random((batch, 1, 1, kv_len)) < 0.7
    bias = normal(rng, (heads, q_len, kv_len), np.float16 if name == "float16" else np.float32)
    calls: list[dict[str, Any]] = [
        {},
        {"is_causal": True, "scale": -0.3, "return_lse": True},
        {"num_threads": 1, "return_lse": True},
        {"num_threads": 2},
        {"query_offset": kv_len - q_len, "is_causal": True, "attn_mask": padding},
        {"query_offset": -2, "is_causal": True, "return_lse": True},
        {"attn_mask": padding, "return_lse": True},
        {"attn_mask": rng.random((batch, 1, q_len, kv_len)) < 0.7},
        {"attn_mask": (rng.random((batch, heads, q_len, kv_len)) < 0.7)[..., ::-1]},
        {"attn_mask": np.zeros((q_len, 1), bool), "return_lse": True},
        {"attn_mask": np.asfortranarray(padding), "is_causal": True},
    ]
    for call in calls:
        assert both_ways(*arrays, **options, **call) == has_shortcut(engine)
    if name != "bfloat16":
        assert both_ways(*arrays, **options, attn_mask=bias) == has_shortcut(engine)


def test_same_layouts(engine, rng):
    expected = has_shortcut(engine)
    q, k, v = make(rng, (2, 4, 2, 5, 9, 8, 8))
    tokens_first = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v)]
    assert both_ways(*tokens_first, enable_gqa=True, return_lse=True) == expected
    assert both_ways(*(np.asfortranarray(x) for x in (q, k, v)), enable_gqa=True) == expected
    assert both_ways(*(x[:, :, ::2, ::-1] for x in (q, k, v)), enable_gqa=True) == expected
    assert both_ways(*(x[0] for x in (q, k, v)), enable_gqa=True) == expected
    assert both_ways(*(x[np.newaxis] for x in (q, k, v)), enable_gqa=True) == expected
    assert both_ways(q, np.broadcast_to(k[:1], k.shape), v[..., :3], enable_gqa=True) == expected
    unaligned = np.zeros(q.nbytes + 1, np.uint8)[1:].view(np.float32).reshape(q.shape)
    unaligned[...] = q
    assert both_ways(unaligned, k, v, enable_gqa=True) == expected


def test_calls_that_are_left_to_the_stages(engine, rng):
    q, k, v = make(rng, (2, 2, 2, 5, 9, 8, 8))
    m = np.ones((5, 9), bool)
    wide = np.ones((2, 2, 5, 8), np.float32).swapaxes(1, 2).copy().swapaxes(1, 2)
    for arguments, options in (
        ((q[0, 0], k[0, 0], v[0, 0]), {}),
        ((q, k[:1], v), {}),
        ((q, k[:, :, :0], v[:, :, :0]), {}),
        ((q[:, :, :0], k, v), {}),
        ((q.astype(">f4"), k, v), {}),
        ((memoryview(q), k, v), {}),
        ((np.broadcast_to(q[:1], q.shape), k, v), {}),
        ((wide, k, v[..., :3]), {}),
        ((q, k, v), {"scale": 1}),
        ((q, k, v), {"dropout_p": 0}),
        ((q, k, v), {"is_causal": np.bool_(True)}),
        ((q, k, v), {"num_threads": np.int64(2)}),
        ((q, k, v), {"query_offset": [3, 2], "is_causal": True}),
        ((q, k, v), {"query_offset": np.int64(3), "is_causal": True}),
        ((q, k, v), {"query_offset": 1 << 40, "is_causal": True}),
        ((q, k, v), {"window": (2, 2)}),
        ((q, k, v), {"softcap": 2.0}),
        ((q, k, v), {"sinks": [0.0, 1.0]}),
        ((q, k, v), {"alibi_slopes": 0.5}),
        ((q, k, v), {"attn_bias": np.ones((5, 9), np.float32)}),
        ((q, k, v), {"key_ranges": (1, 6)}),
        ((q, k, v), {"key_ranges": (None, None)}),
        ((q, k, v), {"key_lengths": 4}),
        ((q, k, v), {"out_dtype": "float32"}),
        ((q, k, v, m.view(np.memmap)), {}),
    ):
        assert not both_ways(*arguments, **options)


@pytest.mark.parametrize("name", DTYPES)
def test_out(engine, rng, name):
    (q, k, v), options = tensors(rng, (2, 3, 3, 5, 9, 8, 8), name)
    expected = sdpa(q, k, v, **options)

    def taken(out: np.ndarray, *inputs: np.ndarray, **more: Any) -> bool:
        with counted() as calls:
            assert sdpa(*inputs, out=out, **options, **more) is out
        np.testing.assert_array_equal(out, expected)
        return calls[0]

    fast = has_shortcut(engine)
    assert taken(np.empty_like(q), q, k, v) == fast
    in_place = q.copy()
    assert taken(in_place, in_place, k, v) == fast
    in_place = q.copy()
    assert taken(in_place[...], in_place, k, v) == fast
    for out in (
        np.empty((2, 5, 3, 8), q.dtype).swapaxes(1, 2),
        np.empty((2, 3, 5, 16), q.dtype)[..., ::2],
        np.empty(q.shape, q.dtype.newbyteorder()),
    ):
        assert not taken(out, q, k, v)
    shared = np.empty(k.size + 3, q.dtype)
    keys = shared[3:].reshape(k.shape)
    keys[...] = k
    assert not taken(shared[: q.size].reshape(q.shape), q, keys, v)
    shared[3:] = np.resize(q, k.size)
    assert not taken(
        shared[: q.size].reshape(q.shape), shared[3 : 3 + q.size].reshape(q.shape), k, v
    )


def test_a_mask_that_out_overlaps(engine, rng):
    q, k, v = make(rng, (1, 2, 2, 4, 8, 8, 8))
    memory = normal(rng, q.shape)
    expected = sdpa(q, k, v, memory.copy())
    np.testing.assert_array_equal(sdpa(q, k, v, memory, out=memory), expected)


def refusal(*arguments: Any, call: Any = sdpa, **options: Any) -> tuple[type, str]:
    with pytest.raises((TypeError, ValueError, MemoryError)) as caught:
        call(*arguments, **options)
    return caught.type, str(caught.value)


def test_same_refusals(engine):
    x = np.ones((2, 4, 3, 8), np.float32)
    huge = np.lib.stride_tricks.as_strided(x, (1, 1, 1, 1 << 41), (0, 0, 0, 0))
    read_only = np.ones_like(x)
    read_only.flags.writeable = False
    one = np.ones((1, 1, 1, 4), np.float32)
    sdpa(x, x, x)  # the shortcut exists from the first call on
    for arguments, options in (
        ((x, x, x[:, :3]), {}),
        ((x, x[:, :3], x[:, :3]), {"enable_gqa": True}),
        ((x, x[:, :2], x[:, :2]), {}),
        ((x, x[:, :0], x[:, :0]), {"enable_gqa": True}),
        ((x, x, x[:, :, :2]), {}),
        ((x, x[..., :7], x), {}),
        ((x[..., :0], x[..., :0], x), {}),
        ((x, x[:1].repeat(3, 0), x), {}),
        ((x, x.astype(np.float64), x), {}),
        ((x.astype(np.int32),) * 3, {}),
        ((x.astype(bool),) * 3, {}),
        ((x.astype(np.uint16),) * 3, {}),
        ((x,) * 3, {"dtype": "bfloat16"}),
        ((x.astype(np.uint16), x.astype(np.uint16), x), {"dtype": "bfloat16"}),
        ((x,) * 3, {"dtype": "float16"}),
        ((np.ma.masked_array(x), x, x), {}),
        ((x[0, 0, 0],) * 3, {}),
        ((x, x, x, np.ones((2, 3), bool)), {}),
        ((x, x, x, np.ones((1, 2, 4, 3, 3), bool)), {}),
        ((x, x, x, np.ones((3, 3), np.int8)), {}),
        ((x, x, x, np.ones((3, 3), np.uint16)), {}),
        ((x, x, x, np.ma.masked_array(np.ones((3, 3), bool))), {}),
        ((x, x, x, None, 0.1), {}),
        ((x, x, x, None, "0.0"), {}),
        ((x,) * 3, {"is_causal": 1}),
        ((x,) * 3, {"enable_gqa": 1}),
        ((x,) * 3, {"return_lse": None}),
        ((x,) * 3, {"scale": "1"}),
        ((x,) * 3, {"query_offset": 0.0}),
        ((x,) * 3, {"query_offset": 1 << 62}),
        ((x,) * 3, {"query_offset": -(1 << 70)}),
        ((x,) * 3, {"query_offset": False, "window": 1}),
        ((x,) * 3, {"num_threads": 0}),
        ((x,) * 3, {"num_threads": -1}),
        ((x,) * 3, {"num_threads": True}),
        ((x,) * 3, {"num_threads": 1.0}),
        ((x,) * 3, {"out": read_only}),
        ((x,) * 3, {"out": x[:1]}),
        ((x,) * 3, {"out": x[0]}),
        ((x,) * 3, {"out": x.astype(np.float64)}),
        ((x,) * 3, {"out": x.tolist()}),
        ((huge, huge, one), {"out": one.copy()}),
    ):  # fmt: skip
        if arguments[0] is huge and engine.engine == "python":
            continue
        with without_shortcut():
            expected = refusal(*arguments, **options)
        assert refusal(*arguments, **options) == expected


def stored(rng: np.random.Generator, pages: int, name: str) -> tuple[np.ndarray, dict]:
    """Return rows of 3 heads in pages of 8, and their scales."""
    rows = normal(rng, (pages, 3, 8, 16))
    if name == "int8":
        return (rows * 40).astype(np.int8), {"scales": rng.random(rows.shape[:3], np.float32)}
    if name == "bfloat16":
        return (rows.view(np.uint32) >> 16).astype(np.uint16), {}
    return rows.astype(DTYPES[name]), {}


@pytest.mark.parametrize("name", [*DTYPES, "int8"])
@pytest.mark.parametrize("query_name", DTYPES)
def test_pages(engine, rng, query_name, name):
    fast = has_shortcut(engine)
    q = stored(rng, 2, query_name)[0].repeat(2, 1)[:, :, :3].copy()
    (k, scales), (v, more) = stored(rng, 5, name), stored(rng, 5, name)
    options = {"key_scales": scales["scales"], "value_scales": more["scales"]} if scales else {}
    table, lengths = np.array([[4, 0, 1], [2, 1, 3]]), np.array([9, 24])
    options |= {"call": qkv_fast.paged_attention, "dtype": "bfloat16"}
    with without_shortcut(), contextlib.suppress(TypeError):
        # Resolves the choice of an engine.
        qkv_fast.paged_attention(q, k, v, table, lengths, dtype="bfloat16")
    mask = rng.random((2, 1, 3, 24)) < 0.7
    for arguments, more in (
        ((q, k, v, table, lengths), {}),
        ((q, k, v, table, lengths), {"is_causal": True, "return_lse": True, "scale": 0.2}),
        ((q, k, v, table, lengths, mask), {"is_causal": True}),
        ((q, k, v, table.astype(np.int32), lengths.astype(np.int32)), {"num_threads": 1}),
        ((q[:, :3], k, v, np.asfortranarray(table), lengths[:]), {"enable_gqa": False}),
        ((q, k, v[..., :5], table, np.array([0, 1])), {"return_lse": True}),
    ):
        assert both_ways(*arguments, **options, **more) == fast
    outside = table.copy()
    outside[0, 2] = -1  # no query sees this page
    for arguments, more in (
        ((q, k, v, outside, lengths), {}),
        ((q, k, v, table.tolist(), lengths), {}),
        ((q, k, v, table, lengths.tolist()), {}),
        ((q, k, v, table, lengths.astype(np.uint64)), {}),
        ((q, k, v, table, np.array([0, 0])), {}),
        ((q, k, v, table, lengths), {"query_offset": 3}),
        ((q, k, v, table, lengths), {"window": (2, 0)}),
    ):
        assert not both_ways(*arguments, **options, **more)


def test_same_refusals_of_pages(engine, rng):
    q, k, v = normal(rng, (2, 6, 1, 16)), normal(rng, (5, 3, 8, 16)), normal(rng, (5, 3, 8, 16))
    table, lengths = np.array([[4, 0, 1], [2, 1, 3]]), np.array([9, 24])
    small = (k * 40).astype(np.int8)
    scales = np.ones(k.shape[:3], np.float32)
    qkv_fast.paged_attention(q, k, v, table, lengths)
    for arguments, options in (
        ((q, k, v, table, lengths + 1), {}),
        ((q, k, v, table, -lengths), {}),
        ((q, k, v, table, lengths[:1].repeat(3)), {}),
        ((q, k, v, table, lengths * 1.0), {}),
        ((q, k, v, table + 1, lengths), {}),
        ((q, k, v, table - 1, lengths), {}),
        ((q, k, v, table[:1], lengths), {}),
        ((q, k, v, table[0], lengths), {}),
        ((q, k, v, table > 0, lengths), {}),
        ((q[:, :5], k, v, table, lengths), {}),
        ((q, k, v, table, lengths), {"enable_gqa": False}),
        ((q[0], k, v, table, lengths), {}),
        ((q[:1], k, v, table, lengths), {}),
        ((q, k[:4], v, table, lengths), {}),
        ((q, k[0], v, table, lengths), {}),
        ((q, k, v[:, :2], table, lengths), {}),
        ((q, k, v[:, :, :7], table, lengths), {}),
        ((q, k[:, :, :0], v[:, :, :0], table, lengths), {}),
        ((q[..., :15], k, v, table, lengths), {}),
        ((small[:2], k, v, table, lengths), {}),
        ((q > 0, k, v, table, lengths), {}),
        ((q, k > 0, v, table, lengths), {}),
        ((q, k.view(np.int32), v, table, lengths), {}),
        ((q, small, small, table, lengths), {}),
        ((q, small, small, table, lengths), {"key_scales": scales}),
        ((q, k, v, table, lengths), {"key_scales": scales, "value_scales": scales}),
        ((q, small, v, table, lengths), {"key_scales": scales[:4]}),
        ((q, small, v, table, lengths), {"key_scales": scales.astype(np.float64)}),
        ((q, small, v, table, lengths), {"key_scales": scales.tolist()}),
        ((q, k, v, table, lengths, np.ones((1, 23), bool)), {}),
        ((q, k, v, table, lengths), {"dtype": "int8"}),
        ((q, k, v, table, lengths), {"is_causal": None}),
        ((q, k, v, table, lengths), {"num_threads": 0}),
        ((q, k, v, table, lengths), {"out": np.empty((2, 6, 1, 15), np.float32)}),
        ((q, k, v, table, lengths), {"out": np.empty((2, 6, 1, 16), np.float64)}),
    ):
        with without_shortcut():
            expected = refusal(*arguments, call=qkv_fast.paged_attention, **options)
        assert refusal(*arguments, call=qkv_fast.paged_attention, **options) == expected


@pytest.mark.parametrize("name", [*DTYPES, "int8"])
@pytest.mark.parametrize("options", [{}, {"page_size": 8}, {"window": 4}], ids=str)
def test_caches(engine, rng, options, name):
    cache = qkv_fast.KVCache(2, 3, 24, 16, dtype=name, **options)
    rows = normal(rng, (2, 3, 20, 16))
    if name == "bfloat16":
        rows = (rows.view(np.uint32) >> 16).astype(np.uint16)
    cache.append(rows[:, :, :9], rows[:, :, 9:18])
    cache.append(rows[:1, :, 18:], rows[:1, :, 18:], sequences=[0])
    fast = has_shortcut(engine) and "window" not in options
    q = normal(rng, (2, 6, 2, 16))
    refused = refusal(q[:1], call=cache.attend), refusal(q > 0, call=cache.attend)
    for more in (
        {},
        {"is_causal": True, "return_lse": True},
        {"attn_mask": rng.random((2, 1, 2, 11)) < 0.7},
        {"num_threads": 1, "scale": -0.5},
        {"out": np.empty_like(q)},
    ):
        both_ways(q, call=cache.attend, **more)  # resolves the choice of an engine
        assert both_ways(q, call=cache.attend, **more) == fast
        with counted() as taken:
            cache.attend(q, sequences=[0, 1], **more)
        assert not taken
    with without_shortcut():
        assert refused == (refusal(q[:1], call=cache.attend), refusal(q > 0, call=cache.attend))


def test_out_that_overlaps_pages(engine, rng):
    memory = normal(rng, (5, 3, 8, 16))
    v, q = normal(rng, memory.shape), normal(rng, (2, 3, 1, 16))
    table, lengths = np.array([[4, 0, 1], [2, 1, 3]]), np.array([9, 24])
    expected = qkv_fast.paged_attention(q, memory.copy(), v, table, lengths)
    out = memory[1, :2].reshape(-1)[: q.size].reshape(q.shape)
    qkv_fast.paged_attention(q, memory, v, table, lengths, out=out)
    np.testing.assert_array_equal(out, expected)
    out = np.empty_like(q)
    with counted() as taken:
        assert qkv_fast.paged_attention(q, v, v, table, lengths, out=out) is out
    assert taken == [has_shortcut(engine)]


def test_calls_keep_no_reference(engine, rng):
    q, k, v = make(rng, (1, 2, 2, 4, 8, 8, 8))
    mask, out = np.ones((4, 8), bool), np.empty_like(q)
    huge = np.lib.stride_tricks.as_strided(q, (1, 1, 1, 1 << 41), (0, 0, 0, 0))
    one = np.ones((1, 1, 1, 4), np.float32)
    table, lengths = np.zeros((1, 2), int), np.array([9])
    given = (q, k, v, mask, out, huge, one, table, lengths)
    dtypes = (q.dtype, np.dtype(np.uint16))  # other code may drop references to these

    def calls() -> None:
        sdpa(q, k, v, mask, out=out, return_lse=True)
        sdpa(q, k, v, mask)
        qkv_fast.paged_attention(q, k, v, table, lengths, is_causal=True)
        sdpa(*(x.view(np.uint16) for x in (q, k, v)), dtype="bfloat16")
        with contextlib.suppress(MemoryError, ValueError):
            if engine.engine == "native":
                sdpa(huge, huge, one, out=one.copy())
        with contextlib.suppress(ValueError):
            sdpa(q, k, v, mask[:3])

    calls()
    gc.collect()
    before = [sys.getrefcount(x) for x in given]
    before_of_dtypes = [sys.getrefcount(x) for x in dtypes]
    for _ in range(10):
        calls()
    assert [sys.getrefcount(x) for x in given] == before
    for dtype, count in zip(dtypes, before_of_dtypes, strict=True):
        assert sys.getrefcount(dtype) < count + 10
    result, fresh = sdpa(q, k, v), np.empty(3)
    assert sys.getrefcount(result) == sys.getrefcount(fresh)
    assert result.base is None


def test_the_chosen_engine_and_threads_are_used(native, rng):
    q, k, v = make(rng, "small")
    with counted() as taken:
        sdpa(q, k, v)
        with qkv_fast.backend("python"):
            python = sdpa(q, k, v)
        with qkv_fast.backend("native", tiles="simd", isa="scalar"):
            sdpa(q, k, v)
            scalar = sdpa(q, k, v)
    is_fast = qkv_fast._select.current().tiles == "simd"
    assert [taken[0], taken[1], taken[3]] == [
        is_fast,
        False,
        True,
    ]  # the first call resolves the choice
    with qkv_fast.backend("native", tiles="simd", isa="scalar"), without_shortcut():
        assert_same(scalar, sdpa(q, k, v))
    with qkv_fast.backend("python"), without_shortcut():
        assert_same(python, sdpa(q, k, v))
    asked: list[int] = []
    q, k, v = make(rng, (1, 4, 4, 64, 64, 64, 64))
    with counted(), connected(_dispatch._runners, lambda: asked.append(1) or 1):
        sdpa(q, k, v)
        sdpa(q, k, v, num_threads=2)
        sdpa(q[:, :1, :1], k[:, :1], v[:, :1])  # too small for a second thread
    assert asked == [1] * is_fast


def test_concurrent_callers_and_signal_handlers(native, rng):
    inputs = [make(rng, shape) for shape in SHAPES]
    expected = [sdpa(*x, enable_gqa=True) for x in inputs]
    wrong: list[int] = []

    def check(times: int) -> None:
        for i in range(times):
            number = i % len(inputs)
            answer = sdpa(*inputs[number], enable_gqa=True)
            if not np.array_equal(answer, expected[number]):
                wrong.append(number)

    handled: list[int] = []
    done: list[int] = []

    def handle(*_: Any) -> None:
        check(len(inputs))
        handled.append(1)
        if not done:
            signal.setitimer(signal.ITIMER_REAL, 0.001)

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    try:
        threads = [threading.Thread(target=check, args=(300,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        check(300)
        for thread in threads:
            thread.join()
    finally:
        done.append(1)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert handled
    assert not wrong
