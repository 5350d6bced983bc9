"""The examples in the docstrings of the pictures run."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
from tiny_bert import needs_minilm

import qkv_fast
from qkv_fast import plot


@pytest.mark.parametrize("name", ["inputs", "terminal", "heat_map", "view"])
def test_docstrings(name):
    if name == "heat_map":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    result = doctest.testmod(importlib.import_module(f"qkv_fast.plot.{name}"))
    assert result.failed == 0


@pytest.mark.parametrize("name", plot.__all__)
def test_docstrings_of_public_names(name):
    if name.endswith("_map"):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    tests = doctest.DocTestFinder(exclude_empty=True).find(
        getattr(plot, name), name, module=False, globs={}
    )
    examples = [test for test in tests if test.examples]
    assert examples
    for test in examples:
        assert doctest.DocTestRunner().run(test).failed == 0, test.name


def blocks_of_the_guide(of_minilm):
    guide = (Path(__file__).parents[2] / "docs" / "pictures.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    return "".join(block for block in blocks if ("find_minilm" in block) == of_minilm)


@needs_minilm
def test_the_guide_to_the_encoder_runs():
    names = {"qkv_fast": qkv_fast}
    exec(compile(blocks_of_the_guide(True), "pictures.md", "exec"), names)
    assert names["weights_of_text"].shape == (6, 12, 9, 9)


def test_the_guide_runs(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks_of_the_guide(False), "pictures.md", "exec"), {})
    assert {path.name for path in tmp_path.iterdir()} == {
        "attention.html",
        "entropy.png",
        "layer0.png",
    }
