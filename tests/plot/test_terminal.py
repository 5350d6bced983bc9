"""qkv_fast.plot.terminal: text that fits, with and without colours and Unicode."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest

from qkv_fast import plot
from qkv_fast.plot.inputs import columns_of

ANSI = re.compile(r"\x1b\[[0-9;]*m")
WORDS = ["the", "cat", "characterizations", "猫", "$", "e\u0301te\u0301"]


def softmax_weights(*shape):
    weights = np.exp(3 * np.random.default_rng(0).standard_normal(shape))
    return weights / weights.sum(axis=-1, keepdims=True)


def words(count):
    return [WORDS[i % len(WORDS)] for i in range(count)]


@pytest.mark.parametrize("color", [False, True])
@pytest.mark.parametrize("ascii", [False, True])
@pytest.mark.parametrize("width", [40, 80, 133])
@pytest.mark.parametrize("length", [1, 5, 50, 500])
def test_no_line_exceeds_the_width(length, width, ascii, color):
    text = plot.terminal(
        softmax_weights(length, length), words(length), width=width, color=color, ascii=ascii
    )
    lines = [ANSI.sub("", line) for line in text.splitlines()]
    assert max(map(columns_of, lines)) <= width
    assert text.isascii() or not ascii
    assert bool(ANSI.search(text)) == color
    assert len(lines) >= length + 2


def test_each_row_names_its_query_and_best_key():
    weights = softmax_weights(5, 5)
    header, *rows = plot.terminal(weights, list("abcde"), width=80, color=False).splitlines()[:6]
    assert header == "   0 1 2 3 4  looks most at"
    for i, row in enumerate(rows):
        best = int(weights[i].argmax())
        assert row.startswith("abcde"[i] + " ")
        assert row.endswith(f" {best} {'abcde'[best]} {weights[i, best]:.0%}")
        assert row[2 + 2 * best : 4 + 2 * best] == "██"


def test_the_legend_says_what_the_shades_mean():
    weights = [[0.01, 0.04, 0.02], [0.9, 0.0, 0.3], [0.1, 0.79, 0.8]]
    text = plot.terminal(weights, ["a", "b", "c"], width=80, color=False, ascii=False)
    *rows, _, legend = text.splitlines()
    assert legend == (
        "each row relative to its largest weight: ░░ 20% ▒▒ 40% ▓▓ 60% ██ 80% or more"
    )
    assert [row[2:8] for row in rows] == [" 0 1 2", "░░██▒▒", "██  ░░", "  ████"]


def test_keys_beyond_the_width_share_cells():
    weights = np.zeros((1, 300))
    weights[0, 299] = 1
    text = plot.terminal(weights, ["now"], words(300), width=80, color=False)
    assert re.search(r"each cell is the largest weight of \d+ keys; 300 keys in all", text)
    row = text.splitlines()[1]
    assert row.count("█") == 1
    assert "299 e" in row


def test_heads_stand_one_below_the_other():
    text = plot.terminal(softmax_weights(3, 4, 4), words(4), width=80)
    assert [line for line in text.splitlines() if line.startswith("head")] == [
        "head 0",
        "head 1",
        "head 2",
    ]
    assert text.count("each row relative") == 1


def test_a_row_without_weights_says_so():
    row = plot.terminal(np.zeros((1, 3)), ["q"], words(3), color=False).splitlines()[1]
    assert row.endswith(" - nothing")


def test_control_characters_never_reach_the_terminal():
    text = plot.terminal(np.eye(3), ["\x1b[31m", "a\nb", "\u202eevil"], color=False)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"\x1b[31m" in text
    assert r"a\nb" in text


def test_ascii_is_drawn_where_the_output_has_no_blocks(monkeypatch):
    for encoding, wanted in (("ascii", True), ("latin-1", True), ("utf-8", False)):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        text = plot.terminal(np.eye(2), ["é", "b"])
        assert text.isascii() == wanted
        assert ("█" in text) != wanted
        assert (r"\xe9" in text) == wanted


@pytest.mark.parametrize(
    ("environment", "is_terminal", "wanted"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),  # as no-color.org says: when not empty
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_colour_is_for_terminals_that_want_it(monkeypatch, environment, is_terminal, wanted):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8")
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stdout", stream)
    assert ("\x1b[" in plot.terminal(np.eye(2), ["a", "b"])) == wanted


def test_the_width_is_that_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    weights = softmax_weights(90, 90)
    assert plot.terminal(weights, words(90)) == plot.terminal(weights, words(90), width=60)
