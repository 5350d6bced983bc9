"""The examples in the documentation run."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import qkv_fast

ROOT = Path(__file__).parents[1]
MODULES = [
    "attention",
    "bench.shapes",
    "_backend",
    "_threads",
    "_config",
    "_problem",
    "_reference",
    "merge",
    "varlen",
    "paged",
    "cache",
]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"qkv_fast.{name}"))
    assert result.failed == 0


def test_readme_blocks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_every_public_name_is_documented():
    for name in qkv_fast.__all__:
        assert "Examples\n" in getattr(qkv_fast, name).__doc__, name
