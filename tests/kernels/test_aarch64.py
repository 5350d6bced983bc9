"""The NEON kernels agree with the portable ones, cross-compiled and run under qemu."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "cross_aarch64.sh"
TOOLS = ("aarch64-linux-gnu-gcc", "qemu-aarch64")


@pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {' and '.join(TOOLS)}")
@pytest.mark.skipif(not (SCRIPT.parents[1] / "csrc").exists(), reason="needs csrc/")
def test_neon_kernels_agree_with_the_portable_ones(tmp_path: Path) -> None:
    done = subprocess.run([str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    tables = re.findall(r"^([-\w]+): (\d+) comparisons, 0 differ$", done.stdout, re.MULTILINE)
    assert [name for name, _ in tables] == ["neon-f32", "neon-f64", "neonbf16-bf16"]
    assert all(int(comparisons) > 10**6 for _, comparisons in tables)
