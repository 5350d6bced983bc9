"""Documentation: its examples run, and each public name has one and is listed."""

from __future__ import annotations

import doctest
import importlib
import pickle
import pydoc
import re

import numpy as np
import pytest
from helpers import run_python

import qkv_fast

MODULES = [
    "bench.shapes",
    "_attention",
    "_config",
    "_kv_cache",
    "_dispatch",
    "_dtypes",
    "_loader",
    "_merge",
    "_page_pool",
    "_paged",
    "_problem.arguments",
    "_problem.output",
    "_problem.problem",
    "_problem.scoring",
    "_problem.tensors",
    "_python_engine",
    "_select",
    "_threads",
    "_layer",
    "_varlen",
    "_weights",
    "decoder",
    "rotary",
]


needs_numpy_2 = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.0.0",
    reason="the examples print scalars as NumPy 2 does",
)


@needs_numpy_2
@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"qkv_fast.{name}"))
    assert result.failed == 0


@needs_numpy_2
@pytest.mark.parametrize("name", qkv_fast.__all__)
def test_docstrings_of_public_names(name):
    """Methods too: `testmod` skips a class whose `__module__` is the package."""
    tests = doctest.DocTestFinder(exclude_empty=True).find(
        getattr(qkv_fast, name), name, module=False, globs={}
    )
    examples = [test for test in tests if test.examples]
    assert examples
    for test in examples:
        assert doctest.DocTestRunner().run(test).failed == 0, test.name


def test_every_public_name_is_documented():
    for name in qkv_fast.__all__:
        assert "Examples\n" in getattr(qkv_fast, name).__doc__, name


NAMES = """
import qkv_fast
assert [x for x in dir(qkv_fast) if x[0] != "_"] == sorted(qkv_fast.__all__), dir(qkv_fast)
import qkv_fast.bench
assert [x for x in dir(qkv_fast) if x[0] != "_"] == sorted([*qkv_fast.__all__, "bench"])
"""


def test_dir_lists_public_names_only():
    done = run_python(NAMES)
    assert done.returncode == 0, done.stderr


def test_help_begins_with_the_main_function():
    text = pydoc.render_doc(qkv_fast, renderer=pydoc.plaintext)
    places = {name: re.search(rf"\b{name}\b", text) for name in qkv_fast.__all__}
    assert all(places.values())
    first = min(places, key=lambda name: places[name].start())
    assert first == "scaled_dot_product_attention"


def test_public_names_belong_to_the_package():
    for name in qkv_fast.__all__:
        public = getattr(qkv_fast, name)
        assert public.__module__ == "qkv_fast", name
        assert pickle.loads(pickle.dumps(public)) is public
    assert repr(qkv_fast.KVCache) == "<class 'qkv_fast.KVCache'>"
