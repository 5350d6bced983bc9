"""examples/onnx_attention.py on its own model and on one in a file."""

from __future__ import annotations

import re

import pytest
from helpers import load_example

onnx = pytest.importorskip("onnx", minversion="1.23", reason="onnx 1.23 is not installed")


@pytest.mark.parametrize("from_file", [False, True])
def test_the_printed_output(capsys, tmp_path, from_file):
    example = load_example("onnx_attention")
    arguments = []
    if from_file:
        onnx.save(example.small_model(heads=3, length=20, size=48), tmp_path / "model.onnx")
        arguments = [str(tmp_path / "model.onnx")]
    example.main(arguments)
    count, reference, ours, difference = capsys.readouterr().out.splitlines()
    assert count == "1 Attention node"
    assert re.fullmatch(r"onnx +\d+\.\d ms", reference)
    assert re.fullmatch(r"qkv_fast +\d+\.\d ms", ours)
    assert 0 < float(difference.removeprefix("largest difference: ")) < 1e-5
