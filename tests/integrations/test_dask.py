"""Attention on dask arrays and a cache on workers: the op judges, and a float64 oracle."""

from __future__ import annotations

import contextlib
import doctest
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import oracle
import pytest
from helpers import make, normal
from worker_tasks import peak_memory, received, slowly

import qkv_fast

dask = pytest.importorskip("dask", reason="dask is not installed")

import dask.array as da  # noqa: E402

import qkv_fast.integrations.dask as adapter  # noqa: E402
from qkv_fast.integrations import _dask_parts  # noqa: E402

attend = qkv_fast.scaled_dot_product_attention
SHAPE = (2, 4, 2, 37, 90, 8, 12)  # B, Hq, Hkv, Lq, Lk, D, Dv
CHUNKINGS = {  # of queries, of keys, of values
    "one": (-1, -1, -1),
    "keys": ((2, 4, 37, 8), (2, 2, 20, 8), (2, 2, 20, 12)),
    "all": ((1, 2, 10, 8), (2, 1, 13, 4), (1, 2, 45, 12)),
    "a head at a time": ((2, 1, 20, 4), (1, 2, 32, 8), (2, 2, 90, 5)),
}


def options_of(name: str, rng: np.random.Generator) -> dict[str, Any]:
    mask = rng.random((2, 1, 37, 90)) < 0.3
    mask[0, :, 5] = False  # a query that sees nothing
    begin = rng.integers(-5, 95, (2, 1, 37))
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "offsets": {"is_causal": True, "query_offset": [-9, 53]},
        "window": {"window": (11, 4), "query_offset": 30},
        "lengths": {"key_lengths": [0, 61], "is_causal": True, "query_offset": 40},
        "ranges": {"key_ranges": (begin, begin + rng.integers(-3, 40, (4, 37)))},
        "mask": {"attn_mask": mask},
        "padding": {"attn_mask": (np.arange(90) < [[33], [90]])[:, None, None]},
        "floating mask": {"attn_mask": np.where(mask, normal(rng, (4, 1, 90)), -np.inf)},
        "bias": {"attn_bias": normal(rng, (37, 90)), "attn_mask": mask},
        "alibi": {"alibi_slopes": [1, 0.5, 0.25, 0.125], "query_offset": [3, 50]},
        "softcap": {"softcap": 1.5, "scale": 0.7},
        "sinks": {"sinks": [1.0, -2.0, 0.0, 30.0], "is_causal": True, "query_offset": -3},
    }[name]


FEATURES = ["plain", "causal", "offsets", "window", "lengths", "ranges", "mask", "padding",
            "floating mask", "bias", "alibi", "softcap", "sinks"]  # fmt: skip


def chunked(arrays: Any, chunking: str) -> list[Any]:
    pairs = zip(arrays, CHUNKINGS[chunking], strict=True)
    return [da.from_array(x, chunks=chunks) for x, chunks in pairs]


def here(*arrays: Any) -> Any:
    return dask.compute(*arrays, scheduler="synchronous")


def parts_of(array: Any) -> list[Any]:
    return [key for key in array.dask.to_dict() if key[0].startswith("attention-part-")]


@pytest.mark.parametrize("chunking", CHUNKINGS)
@pytest.mark.parametrize("feature", FEATURES)
def test_it_is_the_op(rng, feature, chunking):
    arrays = make(rng, SHAPE)
    options = options_of(feature, rng) | {"enable_gqa": True}
    result = adapter.scaled_dot_product_attention(*chunked(arrays, chunking), return_lse=True,
                                                  **options)  # fmt: skip
    out, lse = here(*result)
    expected, expected_lse = attend(*arrays, return_lse=True, **options)
    assert [out.dtype, lse.dtype] == [x.dtype for x in result]
    assert [out.shape, lse.shape] == [x.shape for x in result]
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=2e-6)
    alone = adapter.scaled_dot_product_attention(*chunked(arrays, chunking), **options)
    np.testing.assert_array_equal(*here(alone, result[0]))
    judged = {name: x for name, x in options.items() if name != "enable_gqa"}
    oracle.assert_close(out, *arrays, **judged)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_element_types(rng, dtype):
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    arrays = make(rng, SHAPE, dtype)
    result = adapter.scaled_dot_product_attention(*chunked(arrays, "all"), enable_gqa=True,
                                                  return_lse=True)  # fmt: skip
    out, lse = here(*result)
    assert out.dtype == result[0].dtype == dtype
    assert lse.dtype == result[1].dtype == (np.float64 if dtype == np.float64 else np.float32)
    oracle.assert_close(out, *arrays)
    if dtype.name == "bfloat16":
        bits = [x.view(np.uint16) for x in arrays]
        same = adapter.scaled_dot_product_attention(*chunked(bits, "all"), enable_gqa=True,
                                                    dtype="bfloat16")  # fmt: skip
        np.testing.assert_array_equal(here(same)[0], out.view(np.uint16))


def test_partial_results_are_float32(rng):
    """16-bit parts would be rounded once more, each."""
    arrays = make(rng, SHAPE, np.float16)
    result = adapter.scaled_dot_product_attention(*chunked(arrays, "keys"), enable_gqa=True)
    parts = dask.get(result.dask.to_dict(), parts_of(result))
    assert len(parts) == 5
    assert {array.dtype for part in parts for array in part} == {np.dtype(np.float32)}


@pytest.mark.parametrize("which", ["queries in memory", "keys in memory", "all in memory"])
def test_arrays_in_memory(rng, which):
    arrays = make(rng, SHAPE)
    q, k, v = chunked(arrays, "all")
    given = {"queries": (arrays[0], k, v), "keys": (q, *arrays[1:]), "all": arrays}
    out = adapter.scaled_dot_product_attention(*given[which.split()[0]], enable_gqa=True)
    expected = attend(*arrays, enable_gqa=True)
    np.testing.assert_allclose(here(out)[0], expected, rtol=1e-5, atol=2e-6)


def test_axes_that_are_missing_or_broadcast(rng):
    q, k, v = normal(rng, (6, 8)), normal(rng, (2, 1, 3, 50, 8)), normal(rng, (5, 1, 50, 8))[:, :]
    k, v = k[:, :, :1], v
    out = adapter.scaled_dot_product_attention(
        da.from_array(q, chunks=(4, 8)),
        da.from_array(k, chunks=(1, 1, 1, 20, 8)),
        da.from_array(v, chunks=(3, 1, 30, 8)),
        attn_mask=da.ones((1, 50), dtype=bool, chunks=7),
    )
    assert out.shape == (2, 5, 1, 6, 8)
    np.testing.assert_allclose(here(out)[0], attend(q, k, v), rtol=1e-5, atol=2e-6)
    q, k = (da.from_array(x, chunks=3) for x in (q, k[0, 0, 0]))
    flat = adapter.scaled_dot_product_attention(q, k, k)
    assert flat.shape == (6, 8)
    np.testing.assert_allclose(
        *here(flat, da.from_array(attend(*here(q, k, k)))), rtol=1e-5, atol=2e-6
    )


def test_dask_arrays_of_masks_and_ranges(rng):
    arrays = make(rng, SHAPE)
    mask, bias = rng.random((2, 4, 37, 90)) < 0.5, normal(rng, (1, 1, 90))
    begin, end = rng.integers(0, 40, (37,)), rng.integers(30, 90, (2, 4, 37)).astype(np.uint8)
    lazy = [da.from_array(x, chunks=7) for x in (mask, bias, begin, end)]
    out = adapter.scaled_dot_product_attention(
        *chunked(arrays, "all"), lazy[0], attn_bias=lazy[1], key_ranges=(lazy[2], lazy[3]),
        enable_gqa=True)  # fmt: skip
    expected = attend(*arrays, mask, attn_bias=bias, key_ranges=(begin, end), enable_gqa=True)
    np.testing.assert_allclose(here(out)[0], expected, rtol=1e-5, atol=2e-6)


def test_excluded_keys_may_be_nan(rng):
    q, k, v = make(rng, (1, 1, 1, 8, 40, 8, 8))
    k[..., 25:, :] = v[..., 25:, :] = np.nan
    out = adapter.scaled_dot_product_attention(
        q, da.from_array(k, chunks=10), da.from_array(v, chunks=10), key_lengths=25
    )
    np.testing.assert_allclose(here(out)[0], attend(q, k, v, key_lengths=25), atol=2e-6)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_empty_axes(sizes):
    q, k = (da.zeros((2, n, 4), dtype=np.float32, chunks=3) for n in sizes)
    out, lse = here(*adapter.scaled_dot_product_attention(q, k, k, return_lse=True))
    np.testing.assert_array_equal(out, np.zeros((2, sizes[0], 4), np.float32))
    np.testing.assert_array_equal(lse, np.full((2, sizes[0]), 0 if sizes[1] else -np.inf))


# --- The tasks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, 100),
        ({"is_causal": True}, 55),
        ({"window": (0, 0)}, 10),
        ({"is_causal": True, "query_offset": -40}, 21),
        ({"is_causal": True, "window": (10, None)}, 19),
        ({"key_lengths": 31}, 40),
        ({"key_ranges": (20, 40)}, 20),
        # a row in ten sees the first keys and the others the last: nothing between
        ({"key_ranges": (np.arange(100) % 10 // 9 * 95, np.arange(100) % 10 // 9 * 95 + 5)}, 20),
    ],
)
def test_only_seen_chunks_are_tasks(options, seen):
    x = da.zeros((100, 4), dtype=np.float32, chunks=(10, 4))
    result = adapter.scaled_dot_product_attention(x, x, x, **options)
    tasks = result.dask.to_dict()
    functions = (getattr(task, "func", None) for task in tasks.values())
    computing = [x for x in functions if getattr(x, "func", None) is _dask_parts.attend_part]
    assert len(computing) == seen
    names = {key[0].rsplit("-", 1)[0] for key in tasks if key[0].startswith("attention")}
    assert names <= {"attention", "attention-part", "attention-merge"}


def test_one_chunk_of_keys_needs_no_merge(rng):
    q, k, v = make(rng, SHAPE, np.float16)
    lazy = (da.from_array(q, chunks=(2, 4, 10, 8)), da.from_array(k), da.from_array(v))
    out = adapter.scaled_dot_product_attention(*lazy, enable_gqa=True)
    assert not parts_of(out)
    rows = [attend(q[:, :, i : i + 10], k, v, enable_gqa=True) for i in range(0, 37, 10)]
    np.testing.assert_array_equal(here(out)[0], np.concatenate(rows, axis=2))


def test_schedulers_give_the_same_bits(rng):
    arrays = make(rng, (1, 4, 2, 70, 300, 16, 16))
    out = adapter.scaled_dot_product_attention(
        *(da.from_array(x, chunks=(1, 2, 23, 16)) for x in arrays), is_causal=True,
        query_offset=230, enable_gqa=True)  # fmt: skip
    first = out.compute(scheduler="synchronous")
    for workers in (1, 2, 5):
        again = out.compute(scheduler="threads", num_workers=workers)
        np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_tasks_share_the_cpus(workers, monkeypatch):
    seen: list[int] = []

    def spy(*arguments: Any, num_threads: int, **options: Any) -> Any:
        seen.append(num_threads)
        return attend(*arguments, num_threads=num_threads, **options)

    monkeypatch.setattr(qkv_fast, "scaled_dot_product_attention", spy)
    x = da.zeros((40, 4), dtype=np.float32, chunks=(10, 4))
    out = adapter.scaled_dot_product_attention(x, x, x)
    with qkv_fast.threads(6):
        out.compute(scheduler="threads", num_workers=workers)
        assert seen == [6 // workers] * 16
        seen.clear()
        out.compute(scheduler="synchronous")
        assert seen == [6] * 16
    seen.clear()
    fixed = adapter.scaled_dot_product_attention(x, x, x, num_threads=3)
    fixed.compute(scheduler="threads", num_workers=workers)
    assert seen == [3] * 16


UNKNOWN = da.zeros((4, 5, 6), dtype=np.float32)
UNKNOWN = UNKNOWN[UNKNOWN[:, 0, 0] == 0]  # of a number of heads that only its tasks find


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": da.zeros((4, 9, 5), dtype=np.float32)}, ValueError, "key has length 5 on axis -1"),
        ({"value": da.zeros((4, 8, 6), dtype=np.float32)}, ValueError, "value has length 8 on axis -2"),  # noqa: E501
        ({"key": da.zeros((4, 9, 6), dtype=np.float64)}, TypeError, "query, key and value have"),
        ({"query": da.zeros((8, 5, 6), dtype=np.float32)}, ValueError, "query has 8 heads"),
        ({"attn_mask": da.zeros((3, 9), dtype=bool)}, ValueError, "attn_mask has shape"),
        ({"attn_mask": da.zeros((5, 9), dtype=int)}, TypeError, "attn_mask has dtype int64"),
        ({"sinks": [1.0]}, ValueError, "sinks has shape"),
        ({"dropout_p": 0.5}, ValueError, "dropout_p is 0.5"),
        ({"window": 3}, TypeError, "window is 3"),
        ({"key_ranges": 3}, TypeError, "key_ranges is 3"),
        ({"key_ranges": (da.zeros(3, dtype=int), None)}, ValueError, r"key_ranges\[0\] has shape"),
        ({"key_ranges": (None, da.zeros(5))}, TypeError, r"key_ranges\[1\] must be an int"),
        ({"query_offset": da.zeros((), dtype=int)}, TypeError, "query_offset is a Array of Dask"),
        ({"key_lengths": 10}, ValueError, "key_lengths holds 10"),
        ({"num_threads": 0}, ValueError, "num_threads is 0"),
        ({"query": UNKNOWN}, ValueError,
         r"query.compute_chunk_sizes\(\) first"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_task(change, error, message):
    given = {name: da.zeros((4, n, 6), dtype=np.float32) for name, n in
             (("query", 5), ("key", 9), ("value", 9))}  # fmt: skip
    with pytest.raises(error, match=message):
        adapter.scaled_dot_product_attention(**given | change)


# --- Clusters -------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster(workers: int, **options: Any) -> Iterator[Any]:
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    with (
        dask.config.set({"distributed.scheduler.work-stealing": False}),
        distributed.LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None,
                                 memory_limit=0, **options) as local,
        distributed.Client(local) as client,
    ):  # fmt: skip
        yield client


@pytest.fixture(scope="module")
def inputs() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(5)
    return make(rng, (1, 2, 2, 64, 2048, 32, 32))


def on_dask(inputs: Any, **options: Any) -> Any:
    q, k, v = inputs
    keys = (da.from_array(x, chunks=(1, 2, 256, 32)) for x in (k, v))
    return adapter.scaled_dot_product_attention(q, *keys, **options)


def test_workers_give_the_same_bits(inputs):
    out = on_dask(inputs)
    first = out.compute(scheduler="synchronous")
    np.testing.assert_allclose(first, attend(*inputs), rtol=1e-5, atol=2e-6)
    for workers in (1, 2, 3):
        with cluster(workers):
            np.testing.assert_array_equal(out.compute(), first)


def on_workers(client: Any, array: np.ndarray, size: int) -> da.Array:
    """Return an array whose chunks of keys lie on the workers in turn."""
    workers = sorted(client.scheduler_info(n_workers=-1)["workers"])
    name = f"held-{dask.base.tokenize(array)}"
    starts = range(0, array.shape[2], size)
    futures = {
        (name, 0, 0, i, 0): client.scatter(
            array[:, :, start : start + size], workers=[workers[i % len(workers)]], hash=False)
        for i, start in enumerate(starts)
    }  # fmt: skip
    chunks = (*((n,) for n in array.shape[:2]), (size,) * len(starts), (array.shape[3],))
    return da.Array(futures, name, chunks, dtype=array.dtype)


def test_only_queries_and_partial_results_cross_the_network(inputs):
    q, k, v = inputs
    with cluster(2) as client:
        key, value = (on_workers(client, x, 256) for x in (k, v))
        out = adapter.scaled_dot_product_attention(q, key, value)
        result = out.compute(optimize_graph=False)
        np.testing.assert_allclose(result, attend(*inputs), rtol=1e-5, atol=2e-6)
        moved = [x for each in client.run(received).values() for x in each]
    kinds = {name for name, _ in moved}
    assert (
        {"attention-part"} <= kinds <= {"array", "attention-part", "attention-merge", "attention"}
    )
    part = 4 * 2 * 64 * (32 + 1)  # (out, lse) of 2 heads and 64 queries, in float32
    sizes = [size for name, size in moved if name.startswith("attention-")]
    assert len(sizes) <= 7  # 8 parts become one
    assert all(part <= size <= part + 1000 for size in sizes)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="not Linux")
def test_memory_beyond_the_chunks(rng):
    """A score for each query and key of a chunk would take 128 MiB."""
    q, k, v = make(rng, (1, 2, 2, 1024, 32768, 16, 16))
    with cluster(2) as client:
        key, value = (on_workers(client, x, 16384) for x in (k, v))
        out = adapter.scaled_dot_product_attention(q, key, value)
        out.compute(optimize_graph=False)
        before = client.run(peak_memory, reset=True)
        out.compute(optimize_graph=False)
        after = client.run(peak_memory, reset=False)
    assert all(after[name] - before[name] < 32 << 20 for name in after)


def test_a_worker_that_dies_in_the_middle(inputs):
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    q, k, v = inputs
    with cluster(2) as client:
        k, v = (da.from_array(x, chunks=(1, 2, 128, 32)) for x in (k, v))
        k = k.map_blocks(slowly, 0.1, dtype=k.dtype)
        future = client.compute(adapter.scaled_dot_product_attention(q, k, v))
        pids = client.run(os.getpid)
        time.sleep(0.4)
        assert not future.done()
        os.kill(next(iter(pids.values())), signal.SIGKILL)
        distributed.wait(future, timeout=60)
        np.testing.assert_allclose(future.result(), attend(*inputs), atol=2e-6)


# --- The cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_the_cache_is_a_kv_cache(rng, dtype):
    local = qkv_fast.KVCache(2, 2, 100, 8, 12, dtype=dtype)
    with cluster(2, processes=False) as client:
        cache = adapter.DistributedKVCache(client, 2, 2, 16, 8, 12, dtype=dtype)
        with cache:
            for count in (0, 41, 1, 1, 30):
                _, k, v = make(rng, (2, 4, 2, 0, count, 8, 12))
                for each in (local, cache):
                    each.append(k, v)
                assert cache.length == local.lengths[0]
            length = cache.length
            for q_len, options in (
                (1, {}),
                (5, {"is_causal": True, "return_lse": True}),
                (2, {"window": (20, 0)}),
                (2, {"attn_mask": rng.random((2, 1, 1, length)) < 0.4, "softcap": 2.0}),
                (3, {"attn_bias": normal(rng, (3, length)), "sinks": [1.0, 2.0, -1.0, 0.0]}),
                (2, {"key_ranges": (7, [[30, 70]]), "alibi_slopes": [0.5, 0.25, 0.1, 0.05]}),
                (1, {"key_ranges": (0, 0), "return_lse": True}),
            ):
                q = normal(rng, (2, 4, q_len, 8))
                got, expected = cache.attend(q, **options), local.attend(q, **options)
                assert type(got) is type(expected)
                if not isinstance(got, tuple):
                    got, expected = (got,), (expected,)
                for a, b in zip(got, expected, strict=True):
                    assert a.dtype == b.dtype
                    np.testing.assert_allclose(a, b, rtol=1e-5, atol=3e-6)
            half = cache.attend(q.astype(np.float16))
            assert half.dtype == np.float16
            assert repr(cache) == (
                "<DistributedKVCache batch=2, num_kv_heads=2, chunk_size=16, head_dim=8, v_dim=12, "
                "length=73, workers=2>"
            )
            with pytest.raises(ValueError, match=r"key has shape \(2, 1, 3, 8\): it must be"):
                cache.append(np.zeros((2, 1, 3, 8), "f4"), np.zeros((2, 2, 3, 12), "f4"))
            with pytest.raises(ValueError, match="head size"):
                cache.attend(np.zeros((2, 4, 1, 9), "f4"))
            with pytest.raises(TypeError, match="query"):
                cache.attend(np.zeros((2, 4, 1, 8), int))


def attend_for_a_while(cache: Any, query: np.ndarray) -> None:
    for _ in range(100):
        cache.attend(query)
        time.sleep(0.05)


def test_a_cache_whose_worker_dies_says_so(rng):
    with cluster(2) as client:
        _, k, v = make(rng, (1, 1, 1, 0, 40, 8, 8))
        with adapter.DistributedKVCache(client, 1, 1, 16, 8) as cache:
            cache.append(k, v)
            assert cache.attend(k[:, :, :1]).shape == (1, 1, 1, 8)
            pids = client.run(os.getpid)
            os.kill(pids[cache._workers[1]], signal.SIGKILL)
            lost = "the tokens from 16 to 31, is lost: make a new"
            with pytest.raises(RuntimeError, match=lost):
                attend_for_a_while(cache, k[:, :, :1])


def test_the_examples_of_docstrings():
    result = doctest.testmod(adapter)
    assert result.attempted
    assert result.failed == 0
