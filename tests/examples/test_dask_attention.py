"""examples/dask_attention.py: what it prints."""

from __future__ import annotations

import re

import pytest
from helpers import load_example

pytest.importorskip("dask", reason="dask is not installed")
pytest.importorskip("distributed", reason="distributed is not installed")


def test_the_printed_output(capsys):
    load_example("dask_attention").main(["--keys", "1024"])
    parts, whole, token = capsys.readouterr().out.splitlines()
    assert parts == "8 parts"
    assert re.fullmatch(r"largest difference: \d\.\de-0[6-9]", whole)
    assert re.fullmatch(r"decoding a token:   \d\.\de-0[6-9]", token)
