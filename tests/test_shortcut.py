"""_native/shortcut.pyx against the stages that it saves: same answers, same refusals.

Every test runs calls twice, with the shortcut and without it.
"""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers import assert_same, make, normal

import qkv_fast
from qkv_fast import _dispatch, _loader
from qkv_fast import scaled_dot_product_attention as sdpa

DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16,
          "bfloat16": np.uint16}  # fmt: skip
SHAPES = [
    (1, 1, 1, 1, 1, 64, 64),  # B, Hq, Hkv, Lq, Lk, D, Dv
    (1, 9, 3, 1, 32, 64, 64),
    (3, 4, 2, 5, 70, 8, 24),
    (2, 2, 2, 131, 67, 33, 33),
]


@contextlib.contextmanager
def connected(runners: Any, thread_count: Any = _dispatch.get_num_threads) -> Iterator[None]:
    """Let the shortcut know these runners: with none of them it recognises no call."""
    if not _loader.why_not_native():
        one = np.ones((1, 1, 1), np.float32)
        sdpa(one, one, one)  # the first call connects it
        native = _loader.native_module()
        native.connect(_dispatch.requested, runners, thread_count)
    try:
        yield
    finally:
        if not _loader.why_not_native():
            native.connect(_dispatch.requested, _dispatch._runners, _dispatch.get_num_threads)


def without_shortcut() -> contextlib.AbstractContextManager[None]:
    return connected({})


@contextlib.contextmanager
def counted() -> Iterator[list[bool]]:
    """Note for each call whether the shortcut computed it."""
    with connected(_dispatch._runners):
        pass
    taken: list[bool] = []
    shortcut = _dispatch.shortcut

    def count(*arguments: Any) -> Any:
        answer = shortcut(*arguments)
        taken.append(answer is not None)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "shortcut", count)
        yield taken


def has_shortcut(engine: Any) -> bool:
    return engine.engine == "native" and engine.tiles == "simd"


def tensors(rng: np.random.Generator, shape: Any, name: str) -> tuple[list[np.ndarray], dict]:
    """Return query, key and value, and the options that go with their element type."""
    arrays = list(make(rng, shape, np.float32 if name == "bfloat16" else DTYPES[name]))
    if name == "bfloat16":
        return [(x.view(np.uint32) >> 16).astype(np.uint16) for x in arrays], {"dtype": name}
    return arrays, {}


def both_ways(*arguments: Any, **options: Any) -> bool:
    """Compare a call with and without the shortcut; return whether it was taken."""
    with without_shortcut():
        expected = sdpa(*arguments, **options)
    with counted() as taken:
        assert_same(sdpa(*arguments, **options), expected)
    return taken[0]


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


def test_what_is_left_to_the_stages(engine, rng):
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
        ((q, k, v), {"query_offset": 3, "is_causal": True}),
        ((q, k, v), {"window": (2, 2)}),
        ((q, k, v), {"softcap": 2.0}),
        ((q, k, v), {"sinks": [0.0, 1.0]}),
        ((q, k, v), {"alibi_slopes": 0.5}),
        ((q, k, v), {"key_lengths": 4}),
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


def refusal(*arguments: Any, **options: Any) -> tuple[type, str]:
    with pytest.raises((TypeError, ValueError, MemoryError)) as caught:
        sdpa(*arguments, **options)
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


def test_no_reference_is_kept(engine, rng):
    q, k, v = make(rng, (1, 2, 2, 4, 8, 8, 8))
    mask, out = np.ones((4, 8), bool), np.empty_like(q)
    huge = np.lib.stride_tricks.as_strided(q, (1, 1, 1, 1 << 41), (0, 0, 0, 0))
    one = np.ones((1, 1, 1, 4), np.float32)
    given = (q, k, v, mask, out, huge, one)
    dtypes = (q.dtype, np.dtype(np.uint16))  # others may drop references to these

    def calls() -> None:
        sdpa(q, k, v, mask, out=out, return_lse=True)
        sdpa(q, k, v, mask)
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
    result = sdpa(q, k, v)
    assert sys.getrefcount(result) == 2
    assert result.base is None


def test_the_choice_and_the_threads_in_force_hold(native, rng):
    q, k, v = make(rng, "small")
    with counted() as taken:
        sdpa(q, k, v)
        with qkv_fast.backend("python"):
            python = sdpa(q, k, v)
        with qkv_fast.backend("native", tiles="simd", isa="scalar"):
            sdpa(q, k, v)
            scalar = sdpa(q, k, v)
    is_fast = qkv_fast._select.current().tiles == "simd"
    assert [taken[0], taken[1], taken[3]] == [is_fast, False, True]  # the stages resolve a choice
    with qkv_fast.backend("native", tiles="simd", isa="scalar"), without_shortcut():
        assert_same(scalar, sdpa(q, k, v))
    with qkv_fast.backend("python"), without_shortcut():
        assert_same(python, sdpa(q, k, v))
    asked: list[int] = []
    q, k, v = make(rng, (1, 4, 4, 64, 64, 64, 64))
    with counted(), connected(_dispatch._runners, lambda: asked.append(1) or 1):
        sdpa(q, k, v)
        sdpa(q, k, v, num_threads=2)
        sdpa(q[:, :1, :1], k[:, :1], v[:, :1])  # on one thread in any case
    assert asked == [1] * is_fast


def test_callers_at_once_and_in_signal_handlers(native, rng):
    inputs = [make(rng, shape) for shape in SHAPES]
    expected = [sdpa(*x, enable_gqa=True) for x in inputs]
    wrong: list[int] = []

    def check(times: int) -> None:
        for i in range(times):
            number = i % len(inputs)
            answer = sdpa(*inputs[number], enable_gqa=True)
            if not np.array_equal(answer, expected[number]):
                wrong.append(number)

    handled = []

    def handle(*_: Any) -> None:
        check(len(inputs))
        handled.append(1)

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        threads = [threading.Thread(target=check, args=(300,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        check(300)
        for thread in threads:
            thread.join()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert handled
    assert not wrong
