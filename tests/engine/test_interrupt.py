"""Ctrl-C ends a call that would take minutes, and its threads stop."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from helpers import run_python

from qkv_fast import _loader, _select

# (query shape, key shape) of calls that would take a minute or more, on one broadcast element.
CALLS = {
    "many tasks": ((1, 8, 1 << 17, 64), (1, 8, 1 << 17, 64)),
    "long tasks": ((1, 2, 256, 64), (1, 2, 1 << 24, 64)),
    "one task": ((1, 1, 16, 64), (1, 1, 1 << 27, 64)),
    "decoding": ((64, 8, 1, 64), (64, 8, 1 << 24, 64)),
    "many sequences": ((1 << 28, 1, 1, 1), (1 << 28, 1, 1, 1)),
}

INTERRUPTED = """
import os, signal, threading, time
import numpy as np, qkv_fast

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
query, key = (np.broadcast_to(np.{dtype}(1), shape) for shape in ({query}, {key}))
small = np.ones((1, 2, 9, 8), np.{dtype})
qkv_fast.scaled_dot_product_attention(small, small, small)
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
begin = time.perf_counter()
try:
    with qkv_fast.threads(2):
        qkv_fast.scaled_dot_product_attention(query, key, key)
except KeyboardInterrupt:
    waited = time.perf_counter() - begin - 0.3
    before = time.process_time()
    time.sleep(0.5)
    busy = time.process_time() - before
    out = qkv_fast.scaled_dot_product_attention(small, small, small)
    print("interrupted", waited < 10, busy < 0.25, (out == 1).all())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
@pytest.mark.parametrize("tiles", ["simd", "blas"])
@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_ends_a_native_call(native, call, tiles):
    openmp = _loader.native_module().info()["threading"].startswith("OpenMP")
    if openmp and call == "long tasks":
        pytest.skip("OpenMP's calling thread can't look for signals while it waits for others")
    query, key = CALLS[call]
    code = INTERRUPTED.format(query=query, key=key, dtype="float32")
    done = run_python(code, QKV_FAST_BACKEND="native", QKV_FAST_TILES=tiles)
    assert done.stdout.split() == ["interrupted", "True", "True", "True"], done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_ctrl_c_ends_a_call_of_the_python_engine():
    query, key = CALLS["many tasks"]
    code = INTERRUPTED.format(query=query, key=key, dtype="float32")
    done = run_python(code, QKV_FAST_BACKEND="python")
    assert done.stdout.split()[0] == "interrupted", done.stderr


HANDLED = """
import os, signal, threading
import numpy as np, qkv_fast

heard = []
x = np.random.default_rng(0).standard_normal((1, 8, 3000, 64), np.float32)
sdpa = qkv_fast.scaled_dot_product_attention
expected = sdpa(x, x, x)
signal.signal(signal.SIGUSR1, lambda *_: heard.append(sdpa(x[:, :1], x[:, :1], x[:, :1])))
threading.Timer(0.01, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
while not heard:
    out = sdpa(x, x, x)
    assert (out == expected).all()
assert np.allclose(heard[0], expected[:, :1], atol=1e-6)
print("right")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal here")
def test_a_handler_that_returns_lets_the_call_go_on():
    """The handler may make a call itself."""
    done = run_python(HANDLED, **{k: os.environ[k] for k in _select.VARIABLES if k in os.environ})
    assert done.stdout.strip() == "right", done.stderr
