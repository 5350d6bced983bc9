"""Ctrl-C ends a call that would take minutes, and its threads stop."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from helpers import PATIENCE, count_of, run_python

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


INTERRUPTS = count_of("QKV_TEST_INTERRUPTS", 60)

# A child process sends SIGINT some time after it is told to; the calls go on until it comes.
OFTEN = """
import collections, faulthandler, os, random, signal, struct, subprocess, sys, time
import numpy as np, qkv_fast
from qkv_fast import analysis

SENDER = '''
import os, signal, struct, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
parent = os.getppid()
while data := sys.stdin.buffer.read(8):
    time.sleep(struct.unpack("d", data)[0])
    os.kill(parent, signal.SIGINT)
'''
faulthandler.dump_traceback_later({timeout} * {patience}, exit=True)
signal.signal(signal.SIGINT, signal.default_int_handler)
draw = random.Random({seed})
sdpa = qkv_fast.scaled_dot_product_attention
x = np.random.default_rng(0).standard_normal((1, 8, 700, 64), np.float32)
long = np.broadcast_to(np.float32(1), (1, 8, 1 << 17, 64))
keys = np.broadcast_to(np.float32(1), (64, 8, 1 << 22, 64))
tokens = x[0].swapaxes(0, 1).copy()
cache = qkv_fast.KVCache(1, 8, 700, 64)
cache.append(x, x)
pages = x.reshape(8, 10, 70, 64).swapaxes(0, 1).copy()
told = lambda done, total: None
calls = dict(
    dense=lambda: sdpa(x, x, x, is_causal=True),
    small=lambda: sdpa(x[:, :, :9], x[:, :, :9], x[:, :, :9]),
    double=lambda: sdpa(x.astype("f8"), x.astype("f8"), x.astype("f8")),
    half=lambda: sdpa(x.astype("f2"), x.astype("f2"), x.astype("f2"), return_lse=True)[0],
    decode=lambda: sdpa(x[:, :, :1], x, x),
    varlen=lambda: qkv_fast.varlen_attention(tokens, tokens, tokens, [0, 300, 700]),
    paged=lambda: qkv_fast.paged_attention(x, pages, pages, np.arange(10)[None],
                                           np.array([700])),
    cache=lambda: cache.attend(x[:, :, :3], is_causal=True),
    progress=lambda: sdpa(x, x, x, progress=told),
    weights=lambda: qkv_fast.attention_weights(x, x),
    received=lambda: analysis.attention_received(x, x),
    statistics=lambda: analysis.attention_statistics(x, x).entropy,
    merge=lambda: qkv_fast.merge_attention([x, x], [x[..., 0], x[..., 1]])[0],
)
expected = dict((name, call()) for name, call in calls.items())
endless = dict(
    prefill=lambda: sdpa(long, long, long),
    tokens=lambda: sdpa(keys[:, :, :1], keys, keys),
    told=lambda: sdpa(long, long, long, progress=told),
    sums=lambda: analysis.attention_received(long, long),
    rows=lambda: analysis.attention_statistics(long, long),
)
sender = subprocess.Popen([sys.executable, "-c", SENDER], stdin=subprocess.PIPE)
heard = lost = wrong = within = 0
kinds = collections.Counter()
for number in range({count}):
    name = draw.choice([*calls] * 4 + [*endless])
    call, is_endless, inside = (calls | endless)[name], name in endless, False
    data = struct.pack("d", draw.random() * 0.03)
    try:
        sender.stdin.write(data)
        sender.stdin.flush()
        until = time.process_time() + 60 * {patience}
        while time.process_time() < until:
            inside = True
            answer = call()
            inside = False
            if is_endless or not np.array_equal(answer, expected[name]):
                wrong += 1
        lost += 1
    except KeyboardInterrupt:
        heard += 1
        within += inside
        kinds[name] += 1
    for name in draw.sample([*calls], 2):
        if not np.array_equal(calls[name](), expected[name]):
            wrong += 1
sender.stdin.close()
sender.wait()
print(heard, lost, wrong, within > heard // 2, within, len(kinds))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise there")
def test_no_interrupt_is_lost_at_any_moment():
    """``QKV_TEST_INTERRUPTS=10000`` sends that many."""
    timeout = 100 + INTERRUPTS
    code = OFTEN.format(count=INTERRUPTS, timeout=timeout, patience=PATIENCE, seed=20261129)
    chosen = {k: os.environ[k] for k in _select.VARIABLES if k in os.environ}
    done = run_python(code, timeout=timeout + 20, **chosen)
    numbers = done.stdout.split()
    print(done.stdout)
    assert numbers[:4] == [str(INTERRUPTS), "0", "0", "True"], (done.stdout, done.stderr)
