"""Processes that a computing one starts, and other libraries in the same process.

``QKV_TEST_FORKS=1000 pytest tests/engine/test_processes.py`` forks that often.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import count_of, run_python

from qkv_fast import _loader, _select

TESTS = Path(__file__).parents[1]
FORKS = count_of("QKV_TEST_FORKS", 40)
KEPT = {k: os.environ[k] for k in _select.VARIABLES if k in os.environ}
USES_BLAS = (
    bool(_loader.why_not_native())
    or KEPT.get("QKV_FAST_BACKEND") == "python"
    or KEPT.get("QKV_FAST_TILES") == "blas"
)
has_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

FORKED = """
import os, signal, threading, warnings
warnings.simplefilter("ignore")  # Python warns of forks beside threads
import numpy as np, qkv_fast

sdpa = qkv_fast.scaled_dot_product_attention
rng = np.random.default_rng(0)
x = rng.standard_normal((1, 8, 300, 64), np.float32)
calls = [
    lambda: sdpa(x, x, x, is_causal=True, num_threads=2),
    lambda: sdpa(x[:, :, :1], x, x, num_threads=2),
    lambda: sdpa(x.astype("f8"), x.astype("f8"), x.astype("f8"), num_threads=2),
    lambda: qkv_fast.attention_weights(x, x, num_threads=2),
]
expected = [call() for call in calls]
wrong, computed, stop = [], [0, 0], threading.Event()

def is_right(i):
    return bool((calls[i]() == expected[i]).all())

def keep_computing(number):
    i = number
    while not stop.is_set():
        if not is_right(i % len(calls)):
            wrong.append(i)
        computed[number] += 1
        i += 1

threads = [threading.Thread(target=keep_computing, args=(number,)) for number in range(2)]
for thread in threads:
    thread.start()
right = 0
for fork in range({forks}):
    child = os.fork()
    if child == 0:
        signal.alarm(600)  # ends a child that hangs
        os._exit(0 if all(is_right((fork + i) % len(calls)) for i in range(2)) else 3)
    if not is_right(fork % len(calls)):
        wrong.append(fork)
    right += os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
print(right, len(wrong), min(computed) > 0)
"""


@has_fork
def test_forks_from_a_parent_that_keeps_computing():
    """OpenBLAS with threads of its own hangs in a fork during a product, NumPy's alone too."""
    one_thread = {"OPENBLAS_NUM_THREADS": "1"} if USES_BLAS else {}
    done = run_python(FORKED.format(forks=FORKS), timeout=120 + FORKS, **KEPT, **one_thread)
    assert done.stdout.split() == [str(FORKS), "0", "True"], done.stderr


STARTED = """
import multiprocessing, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
import worker_tasks

expected = [worker_tasks.attended(seed) for seed in range(8)]
context = multiprocessing.get_context({method!r})
with context.Pool(2) as pool:
    answers = pool.map(worker_tasks.attended, range(8), chunksize=1)
ours = expected[0][0]
print([bits for _, bits in answers] == [bits for _, bits in expected],
      all(process != ours for process, _ in answers))
"""


@has_fork
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_of_each_start_method(method):
    done = run_python(STARTED.format(tests=str(TESTS), method=method), **KEPT)
    assert done.stdout.split() == ["True", "True"], done.stderr


APP = """
import os
import numpy as np, qkv_fast

x = np.random.default_rng(0).standard_normal((1, 8, 300, 64), np.float32)
sdpa = qkv_fast.scaled_dot_product_attention
expected, parent = sdpa(x, x, x, num_threads=2), os.getpid()

def app(environ, start_response):
    right = (sdpa(x, x, x, num_threads=2) == expected).all()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{os.getpid()} {os.getppid() == parent} {right}".encode()]
"""


@pytest.fixture(params=["sync", "gthread"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Yield the socket of a server whose parent process has loaded and used the app."""
    pytest.importorskip("gunicorn")
    (tmp_path / "served.py").write_text(APP)
    folder = tempfile.TemporaryDirectory()  # a socket's path must be short
    path = Path(folder.name) / "s"
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "3", "--bind",
               f"unix:{path}", "--worker-class", request.param, "--threads", "2",
               "--chdir", str(tmp_path), "--no-control-socket", "served:app"]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | KEPT)
    try:
        until = time.monotonic() + 60
        while not path.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert path.exists(), log.read_text()
        yield path
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        folder.cleanup()


def answer_of(path: Path) -> list[str]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while data := client.recv(4096):
            answer += data
    return answer.decode().rpartition("\r\n\r\n")[2].split()


@has_fork
def test_workers_of_a_server_that_preloads_the_app(server):
    workers = set()
    for _ in range(200):
        process, is_child, is_right = answer_of(server)
        assert (is_child, is_right) == ("True", "True")
        workers.add(process)
        if len(workers) == 3:
            break
    assert len(workers) >= 2  # the system chooses which worker gets a request


OTHERS = {
    "torch": """
import torch
a = torch.ones(300, 300)
def other():
    assert torch.equal(a @ a, torch.full((300, 300), 300.0))
    t = torch.from_numpy(x)
    ours = torch.from_numpy(expected)
    theirs = torch.nn.functional.scaled_dot_product_attention(t, t, t)
    assert torch.allclose(ours, theirs, atol=1e-5)
""",
    "onnxruntime": """
import onnxruntime
from onnx import TensorProto, helper
shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [300, 300]) for n in "ab"]
graph = helper.make_graph([helper.make_node("MatMul", ["a", "a"], ["b"])], "g", shapes[:1],
                          shapes[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
session = onnxruntime.InferenceSession(model.SerializeToString(),
                                       providers=["CPUExecutionProvider"])
def other():
    one = np.ones((300, 300), np.float32)
    assert (session.run(None, {"a": one})[0] == 300).all()
""",
    "sklearn": """
from sklearn.cluster import KMeans
points = np.repeat([[0.0, 0.0], [9.0, 9.0]], 300, axis=0)
def other():
    labels = KMeans(2, n_init=1, random_state=0).fit(points).labels_
    assert len(set(labels[:300])) == 1 and labels[0] != labels[-1]
""",
}

TOGETHER = """
def compute():
    for _ in range(10):
        for threads in (1, 2):
            assert (sdpa(x, x, x, num_threads=threads) == expected).all()
            assert (sdpa(x[:, :, :1], x, x, num_threads=threads) == decoded).all()
import numpy as np
x = np.random.default_rng(0).standard_normal((1, 8, 300, 64), np.float32)
others = []
"""
OURS = """
import qkv_fast
sdpa = qkv_fast.scaled_dot_product_attention
expected, decoded = sdpa(x, x, x, num_threads=2), sdpa(x[:, :, :1], x, x, num_threads=2)
"""
IN_TURN = """
for _ in range(3):
    for other in others:
        compute()
        other()
print("right")
"""


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours first", "ours last"])
@pytest.mark.parametrize("names", [["torch"], ["onnxruntime"], ["sklearn"], [*OTHERS]],
                         ids=["torch", "onnxruntime", "sklearn", "all"])  # fmt: skip
def test_other_libraries_in_one_process_in_both_orders(names, ours_first):
    for name in names:
        pytest.importorskip(name)
        if name == "onnxruntime":
            pytest.importorskip("onnx")
    theirs = "".join(OTHERS[name] + "others.append(other)\n" for name in names)
    code = TOGETHER + (OURS + theirs if ours_first else theirs + OURS) + IN_TURN
    done = run_python(code, timeout=300, **KEPT)
    assert done.stdout.strip() == "right", done.stderr
