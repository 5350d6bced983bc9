"""The choice of an engine and of threads, by code and environment; imports; show_config."""

from __future__ import annotations

import contextvars
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers import make, run_python

import qkv_fast
from qkv_fast import __main__, _dtypes, _loader, _select, _threads
from qkv_fast import scaled_dot_product_attention as sdpa
from qkv_fast._problem.output import output
from qkv_fast._problem.problem import Problem
from qkv_fast._problem.scoring import scoring
from qkv_fast._problem.tensors import dense

WHICH = (
    "import qkv_fast as q; from qkv_fast._select import current as c; "
    "print(*c(), *c('float64'), *c('bfloat16'))"
)


def test_the_environment_chooses(native):
    engine = _loader.native_module()
    best, best16 = engine.best_isa(_dtypes.FLOAT32), engine.best_isa(_dtypes.BFLOAT16)
    for environment, expected in {
        ("QKV_FAST_BACKEND", "python"): ["python  "] * 3,
        ("QKV_FAST_TILES", "blas"): [f"native blas {best}"] * 3,
        ("QKV_FAST_TILES", "simd"): [f"native simd {isa}" for isa in (best, best, best16)],
        ("QKV_FAST_ISA", "scalar"): ["native simd scalar"] * 3,
        # Never BLAS: its kernels do not keep what test_determinism.py checks on many CPUs.
        ("QKV_FAST_ISA", "auto"): [f"native simd {isa}" for isa in (best, best, best16)],
    }.items():
        done = run_python(WHICH, **dict([environment]))
        assert done.stdout.rstrip("\n") == " ".join(expected), (environment, done.stderr)


def test_the_best_isa_is_one_of_those_that_run(native):
    engine = _loader.native_module()
    order = engine.isas()
    assert order[0] == "scalar"
    assert list(order) == [isa for isa in _select.ISAS if isa in order]
    single, double, half, brain = (engine.best_isa(code) for code in range(4))
    assert single == double == half  # float16 is computed by the float32 kernels
    assert single in ("scalar", "neon", "avx2", "avx512")
    assert order.index(brain) >= order.index(single)


@pytest.mark.parametrize("name", ["QKV_FAST_BACKEND", "QKV_FAST_TILES", "QKV_FAST_ISA"])
def test_wrong_environment_variables_raise(name):
    done = run_python(WHICH, **{name: "best"})
    assert done.returncode != 0
    assert f"{name} is 'best': it must be one of auto" in done.stderr


def test_an_isa_that_the_cpu_lacks_raises(native, monkeypatch):
    class Weak:
        @staticmethod
        def isas() -> tuple[str, ...]:
            return ("scalar",)

        @staticmethod
        def best_isa(code: int) -> str:
            return "scalar"

    monkeypatch.setattr(_loader, "_native", Weak)
    monkeypatch.setattr(_select, "_environment", ("auto", "auto", "auto"))
    with (
        pytest.raises(RuntimeError, match="'avx512' was asked for"),
        qkv_fast.backend(isa="avx512"),
    ):
        pass
    with qkv_fast.backend("native"):
        assert _select.current() == ("native", "simd", "scalar")


WITHOUT = """
import sys
sys.modules["qkv_fast._native"] = None
import warnings, numpy as np, qkv_fast
x = np.ones((2, 3), np.float32)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    {body}
print([str(w.message) for w in caught if w.category is RuntimeWarning])
"""
CALL = "qkv_fast.scaled_dot_product_attention(x, x, x)"


def test_one_warning_without_the_extension():
    done = run_python(WITHOUT.format(body=f"{CALL}; {CALL}"))
    assert done.stdout.count("the compiled engine is not available") == 1, done.stderr
    done = run_python(WITHOUT.format(body=CALL), QKV_FAST_BACKEND="python")
    assert done.stdout.strip() == "[]", done.stderr
    done = run_python(WITHOUT.format(body=f"with qkv_fast.backend('python'): {CALL}"))
    assert done.stdout.strip() == "[]", done.stderr


def test_forcing_what_was_not_built_raises():
    for environment in ({"QKV_FAST_BACKEND": "native"}, {"QKV_FAST_ISA": "avx2"}):
        done = run_python(WITHOUT.format(body=CALL), **environment)
        assert "the native engine was asked for, but it is not available" in done.stderr


def test_show_config_says_why_there_is_no_extension():
    done = run_python(WITHOUT.format(body="qkv_fast.show_config()"))
    assert "native engine" in done.stdout
    assert "not available" in done.stdout


def test_importing_loads_neither_scipy_nor_the_engine():
    modules = (
        "import sys, numpy; import qkv_fast; names = [m for m in sys.modules if "
        "m.split('.')[0] == 'scipy' or '_native' in m]; print(names)"
    )
    assert run_python(modules).stdout.strip() == "[]"


def test_float32_needs_no_scipy(native):
    code = (
        "import sys, numpy as np, qkv_fast; x = np.ones((9, 8), 'f4')\n"
        "with qkv_fast.backend('native', tiles='simd'):\n"
        "    qkv_fast.scaled_dot_product_attention(x, x, x)\n"
        "print('scipy' in sys.modules)"
    )
    assert run_python(code).stdout.strip() == "False"


def test_openmp_settings_of_the_environment_are_left_alone(native):
    code = (
        "import os; before = dict(os.environ); import qkv_fast._loader as b\n"
        "b.load_native(); print(before == dict(os.environ))"
    )
    assert run_python(code).stdout.strip() == "True"
    assert run_python(code, GOMP_SPINCOUNT="7").stdout.strip() == "True"


def test_show_config(capsys):
    facts = qkv_fast.show_config("dicts")
    assert facts["version"] == qkv_fast.__version__
    assert facts["engine"] == _select.current().engine
    __main__.main(["info"])
    shown = capsys.readouterr().out
    for name in ("version", "engine", "threads", "blas", "numpy", "platform"):
        assert f"{name} " in shown
    with pytest.raises(ValueError, match="mode is 'xml'"):
        qkv_fast.show_config("xml")


def test_the_number_of_threads():
    outside = qkv_fast.get_num_threads()
    qkv_fast.set_num_threads(3)
    assert qkv_fast.get_num_threads() == 3
    assert _threads.source() == "qkv_fast.set_num_threads"
    with qkv_fast.threads(5):
        assert qkv_fast.get_num_threads() == 5
        assert _threads.source() == "qkv_fast.threads"
        # Another thread's context does not have this number.
        assert contextvars.Context().run(qkv_fast.get_num_threads) == 3
    qkv_fast.set_num_threads(None)
    assert qkv_fast.get_num_threads() == outside
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="num_threads"):
            qkv_fast.set_num_threads(wrong)
    with pytest.raises(TypeError, match="num_threads"), qkv_fast.threads("2"):
        pass


def test_omp_num_threads_is_the_default():
    code = "import qkv_fast; print(qkv_fast.get_num_threads())"
    assert run_python(code, OMP_NUM_THREADS="7,2").stdout.strip() == "7"
    without = run_python(code).stdout
    assert run_python(code, OMP_NUM_THREADS="many").stdout == without
    assert run_python(code, OMP_NUM_THREADS="0").stdout == without


def test_cgroup_quotas(tmp_path: Path):
    member = tmp_path / "member"

    def quota() -> float | None:
        return _threads.cgroup_quota(str(tmp_path), str(member))

    assert quota() is None
    member.write_text("0::/a/b\n")
    assert quota() is None
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert quota() is None
    (tmp_path / "a" / "cpu.max").write_text("250000 100000\n")
    assert quota() == 2.5
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    member.write_text("3:cpu,cpuacct:/gone\n2:memory:/x\n")
    assert quota() == 1.5


def test_a_quota_lowers_the_default(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(_threads, "cgroup_quota", lambda: 0.5)
    assert _threads._find_default() == (1, "cgroup CPU quota")


def test_concurrent_callers(engine, rng, many_cpus):
    q, k, v = make(rng, (1, 4, 4, 130, 200, 32, 32))
    expected = sdpa(q, k, v, is_causal=True)
    context = contextvars.copy_context()

    def call(_: int) -> np.ndarray:
        return context.copy().run(sdpa, q, k, v, is_causal=True)

    with ThreadPoolExecutor(8) as pool:
        for out in pool.map(call, range(100)):
            np.testing.assert_array_equal(out, expected)


BLAS_THREADS = """
import resource, numpy as np, qkv_fast
rng = np.random.default_rng(0)
x = rng.standard_normal((1, 64, 64, 64))
small = np.ones((1, 1, 8, 8))
with qkv_fast.backend("native", tiles="blas"):
    qkv_fast.scaled_dot_product_attention(small, small, small, num_threads=1)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ({megabytes} << 20),) * 2)
    try:
        qkv_fast.scaled_dot_product_attention(x, x, x, num_threads={threads})
        print("done")
    except MemoryError:
        print("MemoryError")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("megabytes", [6, 20, 50, 1 << 20])
def test_blas_without_memory_for_its_buffers_raises(native, megabytes):
    """Without the engine's check OpenBLAS prints a warning and waits for a buffer for ever."""
    done = run_python(BLAS_THREADS.format(megabytes=megabytes, threads=256))
    assert done.stdout.strip() in ("done", "MemoryError"), done.stderr
    assert done.stderr == ""
    if megabytes > 1000:
        assert done.stdout.strip() == "done"


def test_blas_gets_no_more_threads_than_there_are_cpus(native, monkeypatch):
    q, k, v = np.random.default_rng(0).standard_normal((3, 64, 1, 64, 8))
    problem = Problem()
    dense(problem, q, k, v, False, None)
    scoring(problem)
    output(problem, None, False, 4)
    busy = np.zeros(4)
    monkeypatch.setattr(_threads, "cpus", lambda: 1)
    _loader.native_module().Runner(problem.code, "blas", "scalar")(problem, busy)
    assert busy[0] > 0
    assert not busy[1:].any()


def test_every_call_notifies_the_threads_before_it_is_checked(native, monkeypatch):
    x = np.ones((1, 2, 3, 8), np.float32)
    cache = qkv_fast.KVCache.from_arrays(x, x, 3)
    calls = (
        lambda q: sdpa(q, x, x, query_offset=[0]),  # none of these takes the shortcut
        lambda q: qkv_fast.varlen_attention(q[0], x[0], x[0], [0, 2]),
        lambda q: qkv_fast.paged_attention(q, x, x, [[0]], 3),
        lambda q: cache.attend(q, sequences=[0]),
    )
    for call in calls:
        heard: list[str] = []
        monkeypatch.setattr(_loader, "_notify", lambda heard=heard: heard.append("call"))
        call(x)
        assert heard == ["call"]
        with pytest.raises((TypeError, ValueError)):
            call(x.astype(complex))
        assert heard == ["call"] * 2
    monkeypatch.undo()
    _loader.notify_call_start()  # without work after it: the next call must still run
    sdpa(x, x, x)


def test_the_gil_is_released(native, rng):
    q, k, v = make(rng, (1, 8, 8, 2000, 2000, 64, 64))
    beats, done = [], threading.Event()

    def beat() -> None:
        while not done.wait(0.001):
            beats.append(time.perf_counter())

    beating = threading.Thread(target=beat)
    beating.start()
    most = 0
    for _ in range(20):  # other work may have the CPU during one of them
        begin = time.perf_counter()
        sdpa(q, k, v, num_threads=1)
        end = time.perf_counter()
        most = max(most, sum(begin < t < end for t in beats))
        if most >= 3:
            break
    done.set()
    beating.join()
    assert most >= 3


FORKS = """
import os, numpy as np, qkv_fast
sdpa = qkv_fast.scaled_dot_product_attention
rng = np.random.default_rng(0)
q = rng.standard_normal((1, 12, 128, 64), np.float32)
expected = sdpa(q, q, q, num_threads=2)
for _ in range(30):
    child = os.fork()
    if child == 0:
        os._exit(0 if (sdpa(q, q, q, num_threads=2) == expected).all() else 3)
    assert os.waitpid(child, 0)[1] == 0
    assert (sdpa(q, q, q, num_threads=2) == expected).all()
print("right")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_children_give_right_answers():
    done = run_python("import warnings; warnings.simplefilter('ignore')\n" + FORKS)
    assert done.stdout.strip() == "right", done.stderr
