"""examples/transformers_model.py on its small random model and on one in a folder."""

from __future__ import annotations

import re

import pytest
from helpers import load_example

pytest.importorskip("torch")
hf = pytest.importorskip("transformers", minversion="5.24")


def test_the_printed_output(capsys):
    load_example("transformers_model").main(["--length", "40"])
    sdpa, ours, same = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"sdpa +\d+\.\d ms for 40 tokens, fastest of 3", sdpa)
    assert re.fullmatch(r"qkv_fast +\d+\.\d ms for 40 tokens, fastest of 3", ours)
    assert same == "The tokens that follow are the same."
