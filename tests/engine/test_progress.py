"""`progress`: what a function is told of a call, and how it ends one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import assert_same, normal

import qkv_fast
from qkv_fast import _loader, analysis
from qkv_fast._options import Progress

HUGE = (1, 8, 1 << 17, 64)  # a call of minutes on one broadcast element


def cache_call(rng: np.random.Generator) -> Callable[..., Any]:
    cache = qkv_fast.KVCache(2, 2, 300, 16)
    cache.append(normal(rng, (2, 2, 290, 16)), normal(rng, (2, 2, 290, 16)))
    query = normal(rng, (2, 4, 3, 16))
    return lambda **options: cache.attend(query, is_causal=True, **options)


def paged_call(rng: np.random.Generator) -> Callable[..., Any]:
    pages, query = normal(rng, (6, 2, 64, 16)), normal(rng, (2, 4, 1, 16))
    table = np.array([[4, 1], [0, 3]])
    lengths = np.array([100, 128])
    return lambda **options: qkv_fast.paged_attention(
        query, pages, pages, table, lengths, **options
    )


def varlen_call(rng: np.random.Generator) -> Callable[..., Any]:
    tokens = normal(rng, (500, 4, 16))
    return lambda **options: qkv_fast.varlen_attention(
        tokens, tokens, tokens, [0, 30, 30, 400, 500], **options
    )


def dense_call(function: Callable[..., Any], arrays: int) -> Callable[..., Callable[..., Any]]:
    def call(rng: np.random.Generator) -> Callable[..., Any]:
        x = [normal(rng, (2, 3, 300, 16)) for _ in range(arrays)]
        return lambda **options: function(*x, is_causal=True, **options)

    return call


CALLS: dict[str, Callable[..., Callable[..., Any]]] = {
    "dense": dense_call(qkv_fast.scaled_dot_product_attention, 3),
    "varlen": varlen_call,
    "paged": paged_call,
    "cache": cache_call,
    "weights": dense_call(qkv_fast.attention_weights, 2),
    "received": dense_call(analysis.attention_received, 2),
    "statistics": dense_call(analysis.attention_statistics, 2),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_short_call_says_that_it_is_done_and_changes_no_bit(engine, rng, call):
    attend = CALLS[call](rng)
    told: list[tuple[int, int]] = []
    expected = attend()
    answer = attend(progress=lambda done, total: told.append((done, total)))
    if call == "statistics":
        for one, other in zip(answer, expected, strict=True):
            np.testing.assert_array_equal(one, other)
    else:
        assert_same(answer, expected)
    done, total = told[-1]
    assert done == total > 0
    assert told == sorted(told)


class EnoughError(Exception):
    pass


def long_call(call: str, is_python: bool, progress: Progress) -> None:
    x = np.broadcast_to(np.float32(1), HUGE)
    if call == "dense":
        qkv_fast.scaled_dot_product_attention(x, x, x, progress=progress)
    elif call == "decoding":  # the Python engine computes a sequence's queries without a pause
        keys = np.broadcast_to(np.float32(1), (64, 8, 1 << 20 if is_python else 1 << 24, 64))
        qkv_fast.scaled_dot_product_attention(keys[:, :, :1], keys, keys, progress=progress)
    elif call == "weights":  # of many heads in turn: all of one call would exceed the memory
        x = x[:, :, : 1 << 14]
        for _ in range(100):
            qkv_fast.attention_weights(x, x, heads=[0], progress=progress)
    elif call == "received":
        analysis.attention_received(x, x, progress=progress)
    else:
        analysis.attention_statistics(x, x, progress=progress)


@pytest.mark.parametrize(
    ("call", "threads"),
    [("dense", 1), ("dense", 2), ("decoding", 2), ("weights", 1), ("received", 2),
     ("statistics", 1)],
)  # fmt: skip
def test_a_long_call_tells_how_far_it_is_and_can_be_ended(engine, many_cpus, call, threads):
    told: list[tuple[int, int]] = []
    caller = threading.get_ident()

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        assert threading.get_ident() == caller
        if len(told) == 3:
            raise EnoughError

    with qkv_fast.threads(threads), pytest.raises(EnoughError):
        long_call(call, engine.engine == "python", stop)
    assert len(told) == 3
    small = np.ones((1, 2, 9, 8), np.float32)
    np.testing.assert_array_equal(qkv_fast.scaled_dot_product_attention(small, small, small), 1)


def test_the_function_may_make_a_call_itself(engine, rng):
    x = normal(rng, (1, 2, 40, 16))
    sdpa = qkv_fast.scaled_dot_product_attention
    inner: list[np.ndarray] = []
    answer = sdpa(x, x, x, progress=lambda done, total: inner.append(sdpa(x, x, x)))
    np.testing.assert_array_equal(inner[-1], answer)


def test_the_function_is_let_go_of(engine):
    import sys

    def tell(done: int, total: int) -> None:
        pass

    x = np.ones((1, 2, 9, 8), np.float32)
    before = sys.getrefcount(tell)
    for _ in range(10):
        qkv_fast.scaled_dot_product_attention(x, x, x, progress=tell)
    assert sys.getrefcount(tell) == before


@pytest.mark.parametrize("shape", [(1, 2, 0, 8), (0, 2, 9, 8)])
def test_a_call_with_nothing_to_compute_tells_nothing(engine, shape):
    x = np.ones(shape, np.float32)
    told: list[int] = []
    qkv_fast.scaled_dot_product_attention(x, x, x, progress=lambda done, total: told.append(done))
    assert told == []


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_function_is_refused_before_any_work(engine, rng, call):
    with pytest.raises(TypeError, match="progress is 3: it must be a function of"):
        CALLS[call](rng)(progress=3)


def test_an_error_in_the_last_report_is_raised(engine):
    x = np.ones((1, 2, 9, 8), np.float32)

    def fail(done: int, total: int) -> None:
        raise EnoughError

    with pytest.raises(EnoughError):
        qkv_fast.scaled_dot_product_attention(x, x, x, progress=fail)
    np.testing.assert_array_equal(qkv_fast.scaled_dot_product_attention(x, x, x), 1)


@pytest.mark.parametrize("function", [*CALLS])
def test_each_engine_counts_all_parts(native, rng, function):
    """Threads count tasks at the same time: none is lost."""
    _loader.native_module().assume_cpus(8)
    try:
        attend = CALLS[function](rng)
        for _ in range(50):
            told: list[tuple[int, int]] = []
            attend(num_threads=8, progress=lambda done, total: told.append((done, total)))  # noqa: B023
            assert told[-1][0] == told[-1][1]
    finally:
        _loader.native_module().assume_cpus(0)
