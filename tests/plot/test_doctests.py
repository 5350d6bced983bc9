"""The examples in the docstrings of the pictures run."""

from __future__ import annotations

import doctest
import importlib

import numpy as np
import pytest

from qkv_fast import plot

needs_numpy_2 = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.0.0",
    reason="the examples print scalars as NumPy 2 does",
)


@needs_numpy_2
@pytest.mark.parametrize("name", ["inputs", "terminal", "heat_map", "view"])
def test_docstrings(name):
    if name == "heat_map":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    result = doctest.testmod(importlib.import_module(f"qkv_fast.plot.{name}"))
    assert result.failed == 0


@needs_numpy_2
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
