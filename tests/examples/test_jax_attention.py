"""examples/jax_attention.py in both of its dtypes."""

from __future__ import annotations

import re

import pytest
from helpers import load_example

pytest.importorskip("jax", minversion="0.10", reason="JAX 0.10 is not installed")


@pytest.mark.parametrize(("dtype", "least", "most"), [("float32", 0, 1e-4), ("bfloat16", -1, 0.2)])
def test_the_printed_output(capsys, dtype, least, most):
    load_example("jax_attention").main(["--length", "40", "--dtype", dtype])
    own, ours, difference = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"jax\.nn +\d+\.\d ms", own)
    assert re.fullmatch(r"qkv_fast +\d+\.\d ms", ours)
    assert least < float(difference.removeprefix("largest difference: ")) < most
