"""Python threads that call the library at the same time, with a GIL and without one.

QKV_FAST_THREAD_ROUNDS says how often each thread runs all jobs: 2 by default.
"""

from __future__ import annotations

import os
import sysconfig
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import make, normal, run_python

import qkv_fast
from qkv_fast import _loader, analysis
from qkv_fast.rotary import Rotary

THREADS = 16
ROUNDS = int(os.environ.get("QKV_FAST_THREAD_ROUNDS", "2"))
Job = Callable[[], Any]

sdpa = qkv_fast.scaled_dot_product_attention


# --- Jobs: each gives the same bits whenever it runs ----------------------------------------------


def attention_jobs(rng: np.random.Generator) -> list[Job]:
    one = normal(rng, (1, 1, 1, 64))
    q, k, v = make(rng, "grouped")
    long_q, long_k, long_v = make(rng, (1, 4, 2, 200, 500, 64, 64))
    query, keys = normal(rng, (2, 8, 1, 32)), normal(rng, (2, 2, 700, 32))
    mask = rng.random((2, 6, 35, 70)) < 0.8
    mask[..., 0] = True
    jobs: list[Job] = [
        lambda: sdpa(one, one, one),
        lambda: sdpa(q, k, v, mask, enable_gqa=True),
        lambda: sdpa(q, k, v, None, 0.0, True, enable_gqa=True, softcap=5.0, return_lse=True),
        lambda: sdpa(q, k, v, enable_gqa=True, window=(20, 3), alibi_slopes=np.arange(6) / 8),
        lambda: sdpa(long_q, long_k, long_v, enable_gqa=True, num_threads=3),
        lambda: sdpa(query, keys, keys, enable_gqa=True, num_threads=2),  # decode
        lambda: qkv_fast.attention_weights(q, k, enable_gqa=True, is_causal=True),
        lambda: analysis.attention_received(q, k, enable_gqa=True),
    ]
    for dtype in ("float64", "float16"):
        a, b, c = (x.astype(dtype) for x in (q, k, v))
        jobs.append(lambda a=a, b=b, c=c: sdpa(a, b, c, enable_gqa=True))
    a, b, c = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (q, k, v))
    jobs.append(lambda: sdpa(a, b, c, enable_gqa=True, dtype="bfloat16"))
    return jobs


def backend_jobs(rng: np.random.Generator) -> list[Job]:
    q, k, v = make(rng, "odd")

    def switched(choice: dict[str, str]) -> Any:
        with qkv_fast.backend(**choice), qkv_fast.threads(2):
            assert qkv_fast.get_num_threads() == 2
            return sdpa(q, k, v, is_causal=True)

    forced = any(os.environ.get(f"QKV_FAST_{name}") for name in ("BACKEND", "TILES", "ISA"))
    choices = [{}] if forced else qkv_fast.available_backends()
    return [lambda choice=choice: switched(choice) for choice in choices]


def stored_jobs(rng: np.random.Generator, shared: list[qkv_fast.KVCache]) -> list[Job]:
    q, k, v = (normal(rng, (60, heads, 24)) for heads in (6, 2, 2))
    starts = [0, 13, 13, 60]
    pages = normal(rng, (9, 2, 16, 24))
    table = np.array([[3, 1, 8], [0, 2, 7]])
    query = normal(rng, (2, 6, 3, 24))

    def own_cache(dtype: str, **options: Any) -> Any:
        cache = qkv_fast.KVCache(2, 2, 64, 24, dtype=dtype, **options)
        cache.append(pages[:2], pages[2:4])
        first = cache.attend(query, is_causal=True)
        cache.fork(0, 1, 10)
        cache.append(pages[4:6, :, :5], pages[6:8, :, :5], counts=[5, 3])
        cache.reorder([1, 0])
        second = cache.attend(query, is_causal=True, return_lse=True)
        cache.truncate(9)
        return first, second, cache.attend(query[:, :, :1], softcap=3.0)

    jobs: list[Job] = [
        lambda: qkv_fast.varlen_attention(q, k, v, starts, starts, is_causal=True, enable_gqa=True),
        lambda: qkv_fast.paged_attention(query, pages, pages, table, [40, 17], enable_gqa=True),
        lambda: own_cache("float32"),
        lambda: own_cache("bfloat16", page_size=4),
        lambda: own_cache("int8", page_size=16),
        lambda: own_cache("float32", window=40),
    ]
    for cache in shared:
        jobs.append(lambda cache=cache: cache.attend(query, is_causal=True))
        jobs.append(lambda cache=cache: cache.attend(query[:1], sequences=[1], softcap=2.0))
    return jobs


def other_jobs(rng: np.random.Generator) -> list[Job]:
    q, k, v = make(rng, "long")
    x = normal(rng, (2, 11, 48))
    rotary = Rotary(12)
    layer = qkv_fast.MultiHeadAttention(48, 4, rng=1)

    def merged() -> Any:
        parts = [sdpa(q, k[:, :, i], v[:, :, i], return_lse=True)
                 for i in (slice(0, 90), slice(90, 300))]  # fmt: skip
        return qkv_fast.merge_attention([p[0] for p in parts], [p[1] for p in parts])

    def released() -> Any:
        release = getattr(qkv_fast, "release_scratch", None)
        if release is not None:
            release()
        return sdpa(q, k, v)

    return [
        merged,
        released,
        lambda: layer(x, is_causal=True, rotary=rotary),
        lambda: [rotary(x[:, np.newaxis, :, :12], positions=i) for i in range(5)],
    ]


@pytest.fixture
def jobs(rng: np.random.Generator) -> list[Job]:
    shared = [qkv_fast.KVCache(2, 2, 80, 24), qkv_fast.KVCache(2, 2, 80, 24, page_size=8)]
    for cache in shared:
        cache.append(normal(rng, (2, 2, 50, 24)), normal(rng, (2, 2, 50, 24)), counts=[50, 31])
    return attention_jobs(rng) + backend_jobs(rng) + stored_jobs(rng, shared) + other_jobs(rng)


def bits(result: Any) -> Any:
    if isinstance(result, np.ndarray):
        return result.dtype.str, result.shape, result.tobytes()
    return tuple(map(bits, result))


def in_threads(function: Callable[[int], Any]) -> list[Any]:
    """Run the function with 0 to THREADS - 1, each in a thread of its own, all at once."""
    barrier = threading.Barrier(THREADS)

    def run(number: int) -> Any:
        barrier.wait()
        return function(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(run, range(THREADS)))


def test_threads_at_once_get_the_bits_that_each_gets_alone(jobs, many_cpus):
    alone = [bits(job()) for job in jobs]

    def run(number: int) -> list[int]:
        order = np.random.default_rng(number)
        return [
            int(i)
            for _ in range(ROUNDS)
            for i in order.permutation(len(jobs))
            if bits(jobs[i]()) != alone[i]
        ]

    assert in_threads(run) == [[]] * THREADS


FIRST = """
import threading, numpy as np, qkv_fast
sdpa = qkv_fast.scaled_dot_product_attention
x = np.random.default_rng(0).standard_normal((1, 4, 40, 32), np.float32)
wide = x.astype("f8")
choices = [{"backend": "auto"}, {"tiles": "blas"}, {"isa": "scalar"}, {"backend": "python"}]
barrier, answers = threading.Barrier(16), {}
def first(i):
    barrier.wait()
    if qkv_fast.available_backends()[1:] or choices[i % 4] in (choices[0], choices[3]):
        with qkv_fast.backend(**choices[i % 4]):
            answers[i] = sdpa(x, x, x), sdpa(wide, wide, wide)
threads = [threading.Thread(target=first, args=(i,)) for i in range(16)]
[t.start() for t in threads]
[t.join() for t in threads]
for i, answer in answers.items():
    with qkv_fast.backend(**choices[i % 4]):
        again = sdpa(x, x, x), sdpa(wide, wide, wide)
    assert all((a == b).all() for a, b in zip(answer, again)), i
print(len(answers) >= 8)
"""


@pytest.mark.parametrize("repeat", range(ROUNDS))
def test_the_first_calls_of_a_process_may_come_at_once(repeat):
    done = run_python(FIRST)
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to count threads")
def test_no_call_is_counted_twice_or_never(native):
    if _loader.native_module().info()["threading"].startswith("OpenMP"):
        pytest.skip("this build loops with OpenMP")
    code = """
import os, threading, time, numpy as np, qkv_fast
from qkv_fast import _native
sdpa = qkv_fast.scaled_dot_product_attention
one = np.ones((1, 1, 1, 64), np.float32)
q = np.ones((1, 8, 256, 64), np.float32)
count = lambda: len(os.listdir("/proc/self/task"))
def run():
    for _ in range(3000):
        sdpa(one, one, one)
before = count()
threads = [threading.Thread(target=run) for _ in range(16)]
[t.start() for t in threads]
[t.join() for t in threads]
while count() > before:  # the system's threads end some time after Python's
    time.sleep(0.01)
_native.assume_cpus(8)
sdpa(q, q, q, num_threads=4)
print(count() - before)
"""
    done = run_python(code, QKV_FAST_THREADING="pool")
    assert (done.stdout.strip(), done.returncode) == ("3", 0), done.stderr


CHANGING = """
import threading, numpy as np, qkv_fast
rng = np.random.default_rng(0)
k = rng.standard_normal((4, 2, 300, 16), np.float32)
q = rng.standard_normal((4, 4, 6, 16), np.float32)
cache = qkv_fast.KVCache(4, 2, 3000, 16, {options})
cache.append(k, k)
done, answers = threading.Event(), []
def read():
    while not done.is_set():
        try:
            answers.append(cache.attend(q, is_causal=True, num_threads=2).shape)
            answers.append(cache.attend(q[:, :, :1], softcap=2.0).shape)
        except ValueError:  # keys that a window has left behind
            pass
threads = [threading.Thread(target=read) for _ in range(4)]
[t.start() for t in threads]
for i in range(60):
    cache.append(k, k)
    cache.fork(i % 4, (i + 1) % 4, 200)
    cache.append(k[:, :, :1], k[:, :, :1], counts=[1, 0, 1, 0])
    cache.reset(sequences=[i % 4])
    cache.truncate(np.minimum(cache.lengths, 250))
done.set()
[t.join() for t in threads]
print(set(answers) <= {{(4, 4, 6, 16), (4, 4, 1, 16)}})
"""


@pytest.mark.parametrize("options", ["", "page_size=16", "page_size=16, dtype='int8'"])
def test_a_cache_that_changes_during_a_call_gives_some_answer(options):
    done = run_python(CHANGING.format(options=options))
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="needs a free-threaded CPython"
)
def test_the_gil_stays_off(native):
    code = """
import sys, warnings
warnings.simplefilter("error")
import numpy as np, qkv_fast
from qkv_fast import _native
x = np.ones((1, 2, 3, 4), np.float32)
qkv_fast.scaled_dot_product_attention(x, x, x)
with qkv_fast.backend(tiles="blas"):
    qkv_fast.scaled_dot_product_attention(x, x, x)
print(sys._is_gil_enabled())
"""
    done = run_python(code, PYTHON_GIL="")  # "0" would keep it off whatever is imported
    assert done.stdout.strip() == "False", done.stderr
