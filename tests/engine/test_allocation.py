"""Allocations that fail, the scratch that is kept between calls, and leaks.

``QKV_TEST_SHAPES=100000 pytest tests/engine/test_allocation.py`` looks for leaks over that many
calls.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import count_of, normal, run_python

import qkv_fast
from qkv_fast import _loader, _select, analysis

SHAPES = count_of("QKV_TEST_SHAPES", 6000)
KEPT = {k: os.environ[k] for k in _select.VARIABLES if k in os.environ}
KEPT_BYTES = 32 << 20  # of _native/tuning.pxd
is_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")

SETUP = """
import ctypes, os
import numpy as np, qkv_fast
from qkv_fast import analysis

sdpa = qkv_fast.scaled_dot_product_attention
x = np.random.default_rng(0).standard_normal((1, 8, 300, 64), np.float32)
half, double = x.astype("f2"), x.astype("f8")
slopes = np.linspace(0.1, 1, 8)
tokens = x[0].swapaxes(0, 1).copy()
cache = qkv_fast.KVCache(1, 8, 300, 64)
cache.append(x, x)
pages = x.reshape(8, 10, 30, 64).swapaxes(0, 1).copy()
table, lengths = np.arange(10)[None], np.array([300])
layer = qkv_fast.MultiHeadAttention(512, 8)
calls = dict(
    dense=lambda: sdpa(x, x, x, num_threads=2),
    modified=lambda: sdpa(x, x, x, alibi_slopes=slopes, softcap=5.0, return_lse=True)[0],
    double=lambda: sdpa(double, double, double, is_causal=True),
    half=lambda: sdpa(half, half, half),
    in_place=lambda: sdpa(x, x, x, out=x.copy().swapaxes(1, 2).copy().swapaxes(1, 2)),
    decode=lambda: sdpa(x[:, :, :1], x, x, num_threads=2),
    varlen=lambda: qkv_fast.varlen_attention(tokens, tokens, tokens, [0, 100, 300]),
    paged=lambda: qkv_fast.paged_attention(x, pages, pages, table, lengths),
    cache=lambda: cache.attend(x[:, :, :3], is_causal=True),
    weights=lambda: qkv_fast.attention_weights(x, x),
    received=lambda: analysis.attention_received(x, x),
    statistics=lambda: analysis.attention_statistics(x, x).entropy,
    merge=lambda: qkv_fast.merge_attention([half, half], [x[..., 0], x[..., 1]])[0],
    layer=lambda: layer(tokens.reshape(1, 300, 512)),
)
"""

FAILING = (
    SETUP
    + """
shim = ctypes.CDLL(None)
shim.fail_allocation.argtypes = [ctypes.c_long, ctypes.c_size_t]
shim.stop_failing.restype = ctypes.c_long
expected = dict((name, call()) for name, call in calls.items())
failed = 0
for name, call in calls.items():
    messages = []
    for number in range(0, 3000, {step}):
        qkv_fast.release_scratch()
        raised = False
        shim.fail_allocation(number, {large})
        try:
            call()
        except MemoryError as error:
            raised = True
            messages.append(str(error))
        failures = shim.stop_failing()
        assert raised == (failures > 0), (name, number, raised, failures)
        if not failures:
            break
        failed += 1
        if failed % 4 == 0:
            assert np.array_equal(call(), expected[name]), (name, number)
    assert np.array_equal(call(), expected[name]), name
    assert any("scratch" in message for message in messages) == {has_scratch}, (name, messages)
print("right", failed)
"""
)


@pytest.fixture(scope="module")
def failing_malloc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of a library in which one large allocation fails."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler to build the library, or not Linux")
    library = tmp_path_factory.mktemp("shim") / "failing_malloc.so"
    source = Path(__file__).with_name("failing_malloc.c")
    command = [compiler, "-O1", "-std=gnu11", "-shared", "-fPIC", str(source), "-o", str(library),
               "-Wl,-z,defs"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the library needs glibc: {done.stderr[:200]}")
    return str(library)


# OpenBLAS ends the process itself where it finds no memory for a product on threads of its own.
ON_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}


@pytest.mark.parametrize("tiles", ["simd", "blas"])
def test_each_allocation_that_fails_raises(native, failing_malloc, tiles):
    code = FAILING.format(large=1 << 13, step=1, has_scratch="True")
    settings = KEPT | ON_ONE_THREAD | {"LD_PRELOAD": failing_malloc, "QKV_FAST_TILES": tiles}
    done = run_python(code, **settings)
    assert done.stdout.startswith("right"), done.stdout + done.stderr
    print(done.stdout)
    assert int(done.stdout.split()[1]) >= 28  # scratch and result of each call


def test_each_allocation_of_the_python_engine_that_fails_raises(failing_malloc):
    # NumPy's sums read through a NULL pointer where there is no memory for their buffers of 2^16
    # bytes or so. Arrays are larger.
    code = FAILING.format(large=1 << 18, step=5, has_scratch="False")
    settings = ON_ONE_THREAD | {"LD_PRELOAD": failing_malloc, "QKV_FAST_BACKEND": "python"}
    done = run_python(code, **settings)
    assert done.stdout.startswith("right"), done.stdout + done.stderr
    print(done.stdout)
    assert int(done.stdout.split()[1]) >= 14


def test_buffers_of_blas_that_do_not_fit_raise(native, failing_malloc):
    code = """
import ctypes, numpy as np, qkv_fast
shim = ctypes.CDLL(None)
shim.fail_allocation.argtypes = [ctypes.c_long, ctypes.c_size_t]
x = np.ones((1, 2, 300, 64))
shim.fail_allocation(0, 48 << 20)
try:
    qkv_fast.scaled_dot_product_attention(x, x, x)
except MemoryError as error:
    print(error)
assert shim.stop_failing() == 1
assert (qkv_fast.scaled_dot_product_attention(x, x, x) == 1).all()
"""
    done = run_python(code, LD_PRELOAD=failing_malloc, QKV_FAST_TILES="blas")
    assert done.stdout.startswith("no memory for the buffers of BLAS"), done.stderr


class EnoughError(Exception):
    pass


def hold_scratch(calls: int) -> int:
    """Make calls within each other that take 16 MiB of scratch each; return how many began."""
    q = np.broadcast_to(np.float32(1), (8, 1 << 18, 16))
    k = np.broadcast_to(np.float32(1), (8, 1 << 12, 16))
    begun = 1

    def tell(done: int, total: int) -> None:
        nonlocal begun
        assert done < total
        begun += hold_scratch(calls - 1) if calls > 1 else 0
        raise EnoughError

    with contextlib.suppress(EnoughError):
        analysis.attention_received(q, k, progress=tell)
    return begun


def test_kept_scratch_is_bounded_and_can_be_released(native, rng):
    native_engine = _loader.native_module()
    qkv_fast.release_scratch()
    assert native_engine.kept_scratch() == 0
    assert hold_scratch(4) == 4  # 64 MiB at once
    kept = native_engine.kept_scratch()
    assert 16 << 20 <= kept <= KEPT_BYTES
    qkv_fast.release_scratch()
    assert native_engine.kept_scratch() == 0
    x = normal(rng, (1, 2, 70, 16))
    answer = qkv_fast.scaled_dot_product_attention(x, x, x)
    assert 0 < native_engine.kept_scratch() <= KEPT_BYTES
    qkv_fast.release_scratch()
    np.testing.assert_array_equal(qkv_fast.scaled_dot_product_attention(x, x, x), answer)


RELEASED = """
import numpy as np, qkv_fast
from qkv_fast import _loader, analysis

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

q = np.broadcast_to(np.float32(1), (8, 1 << 18, 16))
for _ in range(3):  # the C library then takes such pieces from its heap, not from the system
    analysis.attention_received(q, q[:, :16])
kept, before = _loader.native_module().kept_scratch(), resident()
qkv_fast.release_scratch()
print(kept, before - resident())
"""


@is_linux
def test_released_scratch_goes_back_to_the_system(native):
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not the C library of GNU")
    kept, freed = map(int, run_python(RELEASED, **KEPT).stdout.split())
    assert kept >= 16 << 20
    assert freed >= kept * 0.9


def test_releasing_needs_no_native_engine():
    code = "import qkv_fast; qkv_fast.release_scratch(); print('released')"
    assert run_python(code).stdout.strip() == "released"
    assert run_python(code, QKV_FAST_BACKEND="python").stdout.strip() == "released"


LEAKS = """
import random, sys
import numpy as np, qkv_fast
from qkv_fast import analysis

draw = random.Random(20261129)
rng = np.random.default_rng(0)
numbers = rng.standard_normal(1 << 20)
store = dict((dtype, numbers.astype(dtype)) for dtype in ("f4", "f8", "f2"))

def take(dtype, *shape):
    return store[dtype][: int(np.prod(shape))].reshape(shape)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def call():
    dtype = draw.choice(["f4", "f4", "f4", "f8", "f2"])
    batch, kv_heads, group = draw.choice([1, 1, 2, 3]), draw.choice([1, 2, 4]), draw.choice([1, 3])
    heads = kv_heads * group
    q_len, kv_len = (int(2 ** draw.uniform(0, 8)) for _ in range(2))
    size, v_size = draw.choice([8, 16, 33, 64]), draw.choice([8, 16, 40, 64])
    q = take(dtype, batch, heads, q_len, size)
    k = take(dtype, batch, kv_heads, kv_len, size)
    v = take(dtype, batch, kv_heads, kv_len, v_size)
    options = dict(enable_gqa=True, is_causal=draw.random() < 0.3)
    if draw.random() < 0.2:
        options["softcap"] = 3.0
    kind = draw.randrange(10)
    if kind < 4:
        if draw.random() < 0.3:
            options["progress"] = lambda done, total: None
        qkv_fast.scaled_dot_product_attention(q, k, v, return_lse=draw.random() < 0.3, **options)
    elif kind == 4:
        tokens = take(dtype, q_len + 1, heads, size)
        cut = draw.randrange(q_len + 1)
        qkv_fast.varlen_attention(tokens, tokens, tokens, [0, cut, q_len + 1])
    elif kind == 5:
        cache = qkv_fast.KVCache(batch, kv_heads, kv_len, size, page_size=draw.choice([None, 16]))
        cache.append(k[:, :, :kv_len], k)
        cache.attend(q)
    elif kind == 6:
        qkv_fast.attention_weights(q, k, **options)
    elif kind == 7:
        analysis.attention_received(q, k, **options)
    elif kind == 8:
        analysis.attention_statistics(q, k, **options)
    else:
        try:
            qkv_fast.scaled_dot_product_attention(q, k[..., :-1], v)
        except ValueError:
            pass

def most(calls):
    found = 0
    for number in range(calls):
        call()
        if number % 100 == 0:
            found = max(found, resident())
    return max(found, resident())

count = {count}
most(count // 2)
blocks = sys.getallocatedblocks()
before = most(count // 4)
after = most(count - count // 2 - count // 4)
print(after - before, sys.getallocatedblocks() - blocks, after)
"""


@is_linux
def test_calls_of_changing_shapes_leak_nothing():
    done = run_python(LEAKS.format(count=SHAPES), timeout=120 + SHAPES / 20, **KEPT)
    assert done.returncode == 0, done.stderr
    grown, blocks, most = map(int, done.stdout.split())
    print(f"{SHAPES} calls: {grown / 1024:.0f} KiB more, {blocks} blocks, {most >> 20} MiB at most")
    assert grown < 4 << 20
    assert blocks < max(1500, SHAPES // 20)  # NumPy and Python keep up to a thousand themselves
