"""How many threads a call starts, and the OpenMP team of another library."""

from __future__ import annotations

import ctypes.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import PATIENCE, run_python

from qkv_fast import _loader

ROOT = Path(__file__).parents[2]
POOL = {"QKV_FAST_THREADING": "pool"}
GOMP = ctypes.util.find_library("gomp")
has_tasks = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="needs /proc to count threads"
)
has_gomp = pytest.mark.skipif(
    GOMP is None or not sys.platform.startswith("linux"), reason="no libgomp on this system"
)


@pytest.fixture
def own_pool(native):
    if _loader.native_module().info()["threading"].startswith("OpenMP"):
        pytest.skip("this build loops with OpenMP")


START = """
import os, sys, numpy as np, qkv_fast
from qkv_fast import _native
sdpa = qkv_fast.scaled_dot_product_attention
q = np.random.default_rng(0).standard_normal((1, 8, 256, 64), np.float32)
threads = lambda: len(os.listdir("/proc/self/task"))
expected = sdpa(q, q, q, num_threads=1)
"""


@has_tasks
@pytest.mark.parametrize("wanted", [2, 64, 100_000])
def test_a_call_gets_no_more_threads_than_there_are_cpus(own_pool, wanted):
    code = f"""
before = threads()
for _ in range(20):
    assert (sdpa(q, q, q, num_threads={wanted}) == expected).all()
print(threads() - before)
"""
    started = int(run_python(START + code, **POOL).stdout)
    assert started == min(wanted, len(os.sched_getaffinity(0))) - 1


@has_tasks
def test_affinity_limits_a_call(own_pool):
    code = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
before = threads()
assert (sdpa(q, q, q, num_threads=8) == expected).all()
print(threads() - before)
"""
    assert run_python(START + code, **POOL).stdout.strip() == "0"


@has_tasks
def test_a_quota_of_cpu_time_limits_a_call(own_pool):
    code = """
_native.assume_cpus(8)
_native.limit_cpus(3)
before = threads()
assert (sdpa(q, q, q, num_threads=8) == expected).all()
print(threads() - before)
"""
    assert run_python(START + code, **POOL).stdout.strip() == "2"


@has_gomp
def test_calls_run_on_an_existing_team(own_pool):
    code = """
_native.assume_cpus(4)
sdpa(q, q, q, num_threads=4)  # makes the team
before = threads()
for _ in range(50):
    assert (sdpa(q, q, q, num_threads=4) == expected).all()
print(_native.team_calls(), threads() - before, threads() >= 4)
"""
    settings = {"LD_PRELOAD": GOMP, "QKV_FAST_THREADING": "openmp", "OMP_NUM_THREADS": "4"}
    assert run_python(START + code, **settings).stdout.split() == ["51", "0", "True"]


@has_gomp
def test_a_call_keeps_to_the_limit_of_the_team(own_pool):
    code = """
_native.assume_cpus(8)
sdpa(q, q, q, num_threads=8)
print(_native.team_calls(), threads())
"""
    settings = {"LD_PRELOAD": GOMP, "QKV_FAST_THREADING": "openmp", "OPENBLAS_NUM_THREADS": "1"}
    three = run_python(START + code, OMP_NUM_THREADS="3", **settings).stdout.split()
    assert three == ["1", "3"]
    alone = run_python(START + code, OMP_NUM_THREADS="1", **settings).stdout.split()
    assert alone[0] == "0"


@has_gomp
def test_calls_do_not_use_a_team_that_nobody_else_uses(own_pool):
    code = """
import time
for _ in range(200):
    assert (sdpa(q, q, q, num_threads=2) == expected).all()
    time.sleep(0.001)
print(_native.team_calls())
"""
    assert int(run_python(START + code, LD_PRELOAD=GOMP).stdout) <= 5


COMPANY = """
#include <omp.h>
void region(double seconds) {
    #pragma omp parallel
    { double end = omp_get_wtime() + seconds; while (omp_get_wtime() < end); }
}
void call_within(void (*call)(void)) {
    #pragma omp parallel
    #pragma omp master
    call();
}
"""


@pytest.fixture(scope="module")
def company(tmp_path_factory) -> Path:
    """Return a library that has OpenMP regions."""
    compiler = shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("no gcc to build a library that uses OpenMP")
    folder = tmp_path_factory.mktemp("company")
    (folder / "company.c").write_text(COMPANY)
    command = [compiler, "-fopenmp", "-shared", "-fPIC", "company.c", "-o", "company.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"gcc can't build a library that uses OpenMP: {done.stderr[:200]}")
    return folder / "company.so"


def with_company(library: Path) -> str:
    return f"{START}\nimport ctypes\nother = ctypes.CDLL({str(library)!r})\n"


def test_calls_join_a_team_that_others_keep_awake(own_pool, company):
    code = """
other.region.argtypes = [ctypes.c_double]
_native.assume_cpus(2)
for _ in range(400):
    other.region(0.0005)
    assert (sdpa(q, q, q, num_threads=2) == expected).all()
print(_native.team_calls())
"""
    settings = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "active"}
    joined = int(run_python(with_company(company) + code, **settings).stdout)
    # Not all calls: other processes may occupy the second CPU.
    assert joined >= 20
    settings["QKV_FAST_THREADING"] = "pool"
    assert run_python(with_company(company) + code, **settings).stdout.strip() == "0"


def test_calls_within_a_region_of_another_library(own_pool, company):
    code = """
answers = []
CALL = ctypes.CFUNCTYPE(None)
call = CALL(lambda: answers.append(sdpa(q, q, q, num_threads=2)))
for _ in range(20):
    other.call_within(call)
print(len(answers), all((x == expected).all() for x in answers), _native.team_calls())
"""
    settings = {"OMP_NUM_THREADS": "2", "QKV_FAST_THREADING": "openmp"}
    done = run_python(with_company(company) + code, **settings)
    assert done.stdout.split() == ["20", "True", "0"], done.stderr


@has_gomp
def test_forked_children_of_a_process_with_a_team(own_pool):
    code = """
for _ in range(10):
    assert (sdpa(q, q, q, num_threads=2) == expected).all()
    child = os.fork()
    if child == 0:
        os._exit(0 if (sdpa(q, q, q, num_threads=2) == expected).all() else 3)
    assert os.waitpid(child, 0)[1] == 0
print("right")
"""
    settings = {"LD_PRELOAD": GOMP, "QKV_FAST_THREADING": "openmp"}
    done = run_python("import warnings; warnings.simplefilter('ignore')" + START + code, **settings)
    assert done.stdout.strip() == "right", done.stderr


def test_a_wrong_threading_variable_is_refused_by_name(native):
    done = run_python("import qkv_fast; qkv_fast.show_config()", QKV_FAST_THREADING="fast")
    assert done.returncode != 0
    assert "QKV_FAST_THREADING is 'fast': it must be one of auto, pool, openmp" in done.stderr


REFUSES = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

/* Set to how many more threads may start; below 0: any number. */
int qkv_test_threads_left = -1;

int pthread_create(pthread_t *id, const pthread_attr_t *attributes, void *(*run)(void *), void *x)
{
    int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (qkv_test_threads_left == 0) return EAGAIN;
    if (qkv_test_threads_left > 0) qkv_test_threads_left--;
    *(void **)&real = dlsym(RTLD_NEXT, "pthread_create");
    return real(id, attributes, run, x);
}
"""


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """Return a library that, preloaded, refuses threads from a given one on."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("refusing")
    (folder / "refuses.c").write_text(REFUSES)
    library = folder / "refuses.so"
    command = [compiler, "-shared", "-fPIC", str(folder / "refuses.c"), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return str(library)


@has_tasks
@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_threads_that_the_system_refuses_are_done_without(own_pool, refusing, allowed):
    code = f"""
import ctypes
_native.assume_cpus(4)
left = ctypes.c_int.in_dll(ctypes.CDLL(None), "qkv_test_threads_left")
before = threads()
left.value = {allowed}
for _ in range(5):
    assert (sdpa(q, q, q, num_threads=4) == expected).all()
print(threads() - before)
left.value = -1  # the next call starts those that are missing
assert (sdpa(q, q, q, num_threads=4) == expected).all()
print(threads() - before)
"""
    done = run_python(START + code, LD_PRELOAD=refusing, **POOL)
    assert done.stdout.split() == [str(allowed), "3"], done.stderr


@has_gomp
@has_tasks
def test_no_team_is_made_where_the_system_refuses_its_threads(own_pool, refusing):
    code = """
import ctypes
_native.assume_cpus(4)
left = ctypes.c_int.in_dll(ctypes.CDLL(None), "qkv_test_threads_left")
before = threads()
left.value = 2
assert (sdpa(q, q, q, num_threads=4) == expected).all()
print(threads() - before <= 2, _native.team_calls())
"""
    settings = {"LD_PRELOAD": f"{refusing}:{GOMP}", "OMP_NUM_THREADS": "4"}
    done = run_python(START + code, OPENBLAS_NUM_THREADS="1", **settings)
    assert done.stdout.split() == ["True", "0"], done.stderr


@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_pool_with_many_callers_under_a_sanitizer(tmp_path, sanitizer):
    compiler, sources = shutil.which("gcc"), ROOT / "csrc" / "runtime"
    if compiler is None or not sources.is_dir():
        pytest.skip("no gcc, or no C sources beside the tests")
    program = tmp_path / "stress"
    command = [compiler, "-O1", "-g", "-std=gnu11", f"-fsanitize={sanitizer}", f"-I{ROOT}/csrc"]
    command += [str(Path(__file__).with_name("thread_pool_stress.c")), "-pthread", "-ldl"]
    command += [
        str(sources / f"{name}.c")
        for name in ("job", "openmp_team", "thread_pool", "threads_posix")
    ]
    built = subprocess.run(
        [*command, "-o", str(program)], capture_output=True, text=True, check=False
    )
    if built.returncode:
        pytest.skip(f"gcc can't build with -fsanitize={sanitizer}: {built.stderr[:200]}")
    plain = {
        k: v for k, v in os.environ.items() if k != "LD_PRELOAD"
    }  # a sanitizer must be the first library
    done = subprocess.run(
        [str(program), "16", "300"],
        env=plain, capture_output=True, text=True, timeout=300 * PATIENCE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "0 wrong", "")
