"""examples/torch_patch.py in both of its dtypes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from helpers import load_example

torch = pytest.importorskip("torch", minversion="2.13", reason="torch 2.13 is not installed")


@pytest.fixture(autouse=True)
def fast_path_as_before() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize(("dtype", "least", "most"), [("float32", 0, 1e-4), ("bfloat16", -1, 0.1)])
def test_the_printed_output(capsys, dtype, least, most):
    load_example("torch_patch").main(["--length", "40", "--dtype", dtype])
    own, ours, difference = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"torch +\d+\.\d ms", own)
    assert re.fullmatch(r"qkv_fast +\d+\.\d ms", ours)
    assert least < float(difference.removeprefix("largest difference: ")) < most
    assert torch.nn.functional.scaled_dot_product_attention is (
        torch._C._nn.scaled_dot_product_attention
    )
