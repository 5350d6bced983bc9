"""The C part works elsewhere: cross-compiled for Windows and run under Wine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "cross_windows.sh"
WINE = any(map(shutil.which, ("wine64", "/usr/lib/wine/wine64", "wine")))
COMPILER = "x86_64-w64-mingw32-gcc"
needs_compiler = pytest.mark.skipif(
    not (shutil.which(COMPILER) and (SCRIPT.parents[1] / "csrc").exists()),
    reason=f"needs {COMPILER} and csrc/",
)


def cross_build(folder: Path, part: str) -> str:
    """Return what the script prints for a part."""
    done = subprocess.run(
        [str(SCRIPT), str(folder)],
        env=os.environ | {"PARTS": part},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_compiler
def test_the_thread_pool_links_and_runs_on_windows(tmp_path: Path) -> None:
    printed = cross_build(tmp_path, "pool").splitlines()
    assert printed[0] == "linked pool"
    if not WINE:
        pytest.skip("linked, but not run: no Wine")
    assert printed[1:] == ["0 wrong"]


@needs_compiler
@pytest.mark.skipif(
    not os.environ.get("QKV_FAST_TEST_WINDOWS_KERNELS"),
    reason="takes minutes: QKV_FAST_TEST_WINDOWS_KERNELS=1 runs it",
)
@pytest.mark.skipif(not WINE, reason="needs Wine")
def test_kernels_agree_with_the_portable_ones_on_windows(tmp_path: Path) -> None:
    printed = cross_build(tmp_path, "kernels")
    tables = re.findall(r"^(\w+)-f\d+: (\d+) comparisons, 0 differ$", printed, re.MULTILINE)
    assert {isa for isa, _ in tables} >= {"avx2"}
    assert all(int(comparisons) > 10**5 for _, comparisons in tables)
