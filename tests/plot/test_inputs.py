"""What all pictures refuse, and in which words."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers import run_python

from qkv_fast import plot

PICTURES = [plot.terminal, plot.heat_map, plot.view]
SQUARE = np.full((3, 3), 1 / 3)
TOKENS = ["a", "b", "c"]


def raised(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


@pytest.fixture(params=PICTURES, ids=lambda f: f.__name__)
def picture(request):
    return request.param


def test_token_counts(picture):
    message = "tokens has 2 entries, but weights have 3 queries on axis -2: each query must have"
    with raised(ValueError, f"{message} one token"):
        picture(SQUARE, ["a", "b"])
    message = "context_tokens has 2 entries, but weights have 3 keys on axis -1: each key must have"
    with raised(ValueError, f"{message} one token"):
        picture(SQUARE, TOKENS, ["a", "b"])
    message = "tokens has 2 entries, but weights have 3 keys on axis -1: pass context_tokens, the"
    with raised(ValueError, f"{message} tokens of the keys"):
        picture(SQUARE[:2], ["a", "b"])


def test_tokens_are_strings(picture):
    rule = "a sequence of str is needed, one for each token"
    with raised(TypeError, f"tokens is 'abc': {rule}"):
        picture(SQUARE, "abc")
    with raised(TypeError, f"tokens is 3: {rule}"):
        picture(SQUARE, 3)
    with raised(TypeError, f"context_tokens holds 7 at 1: {rule}"):
        picture(SQUARE, TOKENS, ["a", 7, "c"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_are_finite(picture, value):
    weights = SQUARE.copy()
    weights[1, 2] = value
    with raised(ValueError, f"weights hold {value}: all must be finite"):
        picture(weights, TOKENS)


def test_weights_are_not_scores(picture):
    weights = SQUARE.copy()
    weights[1, 2] = -0.5
    message = "weights hold -0.5: none may be negative; of scores, take a softmax first"
    with raised(ValueError, message):
        picture(weights, TOKENS)


def test_shapes_and_types(picture):
    with pytest.raises(ValueError, match=r"^weights have shape \(3,\): they must be \(queries, ke"):
        picture(SQUARE[0], TOKENS)
    with pytest.raises(ValueError, match=r"^weights have shape \(3, 0\): no axis may be empty$"):
        picture(SQUARE[:, :0], TOKENS, [])
    with raised(TypeError, "weights have dtype complex128: real numbers are needed"):
        picture(SQUARE.astype(complex), TOKENS)
    with pytest.raises(TypeError, match=r"^weights is a MaskedArray"):
        picture(np.ma.masked_array(SQUARE), TOKENS)


def test_options_of_the_terminal():
    with raised(ValueError, "width is 39: it must be at least 40"):
        plot.terminal(SQUARE, TOKENS, width=39)
    with raised(TypeError, "color must be a bool, not str"):
        plot.terminal(SQUARE, TOKENS, color="red")


def test_options_of_the_view():
    with raised(ValueError, "height is 100: it must be at least 200"):
        plot.view(SQUARE, TOKENS, height=100)
    with raised(TypeError, "title must be a str, not int"):
        plot.view(SQUARE, TOKENS, title=3)


def test_lists_and_other_types_of_numbers_are_accepted():
    wanted = plot.view(SQUARE.astype(np.float32), TOKENS).html
    assert plot.view(SQUARE.tolist(), tuple(TOKENS)).html == wanted
    assert plot.view(SQUARE, np.array(TOKENS)).html == wanted
    assert plot.terminal(np.eye(3, dtype=bool).astype(int), TOKENS)


IMPORTED_ON_DEMAND = """
import sys
import qkv_fast
assert "plot" not in dir(qkv_fast)
assert not any(name.startswith("qkv_fast.plot") for name in sys.modules)
import qkv_fast.plot
assert "matplotlib" not in sys.modules
assert sorted(qkv_fast.plot.__all__) == ["View", "entropy_map", "heat_map", "terminal", "view"]
assert all(callable(getattr(qkv_fast.plot, name)) for name in qkv_fast.plot.__all__)
"""


def test_the_package_is_imported_on_demand_and_without_matplotlib():
    done = run_python(IMPORTED_ON_DEMAND)
    assert done.returncode == 0, done.stderr


WITHOUT_MATPLOTLIB = """
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
import numpy as np
import qkv_fast.plot
qkv_fast.plot.terminal(np.eye(1), ["a"])
qkv_fast.plot.view(np.eye(1), ["a"])
try:
    qkv_fast.plot.heat_map(np.eye(1), ["a"])
except ImportError as error:
    assert 'pip install "qkv-fast[plot]"' in str(error)
else:
    raise AssertionError
"""


def test_what_is_missing_without_matplotlib_is_said():
    done = run_python(WITHOUT_MATPLOTLIB)
    assert done.returncode == 0, done.stderr
