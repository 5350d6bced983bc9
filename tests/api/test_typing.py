"""Types of the public functions for mypy, and their signatures for help()."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qkv_fast

HERE = Path(__file__).parent
FUNCTIONS = (
    qkv_fast.scaled_dot_product_attention,
    qkv_fast.varlen_attention,
    qkv_fast.paged_attention,
    qkv_fast.KVCache.attend,
)


def test_mypy_infers_what_a_call_returns(tmp_path):
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", f"--cache-dir={tmp_path}"]
    done = subprocess.run(
        [*command, str(HERE / "typing_cases.py")],
        cwd=HERE.parents[1],
        env=os.environ | {"MYPYPATH": str(Path(qkv_fast.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_signatures_name_every_parameter(function):
    parameters = inspect.signature(function).parameters
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters.values())
    for name in ("scale", "softcap", "window", "return_lse", "num_threads"):
        assert parameters[name].default is not inspect.Parameter.empty
        assert name in function.__doc__
