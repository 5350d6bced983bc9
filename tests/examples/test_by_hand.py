"""examples/by_hand.py: what it prints, against sums and exponentials in plain Python."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from helpers import load_example

# What a reader would compute with pencil and paper: a token's own query, key and value.
HEAD = {
    "The": ([1, 1, 0], [0, 0, 0], [0, 0, 0]),
    "cat": ([0, 0, 2], [2, 0, 0], [1, 0, 0]),
    "sat": ([2, 1, 0], [0, 0, 2], [0, 0, 1]),
    "on": ([1, 1, 1], [0, 2, 0], [0, 1, 0]),
    "mat": ([0, 0, 1], [0, 2, 0], [0, 1, 0]),
}


def printed_matrices(text: str) -> dict[int, list[list[float]]]:
    """Return the numbers of each numbered step."""
    found: dict[int, list[list[float]]] = {}
    for line in text.splitlines():
        if step := re.match(r"(\d)\. ", line):
            rows = found[int(step[1])] = []
        elif line.split() and line.split()[0] in HEAD and len(line.split()) > 1:
            numbers = line.split()[1:]
            if re.fullmatch(r"[\d.]+", numbers[0]):
                rows.append([float(number) for number in numbers])
    return found


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def expected() -> dict[int, list[list[float]]]:
    steps: dict[int, list[list[float]]] = {i: [] for i in range(2, 9)}
    for query, key, value in HEAD.values():
        for step, row in ((2, query), (3, key), (4, value)):
            steps[step].append([float(x) for x in row])
        scores = [dot(query, other) for _, other, _ in HEAD.values()]
        scaled = [score / 3**0.5 for score in scores]
        powers = [math.exp(score) for score in scaled]
        weights = [power / math.fsum(powers) for power in powers]
        values = [v for _, _, v in HEAD.values()]
        mixed = [dot(weights, column) for column in map(list, zip(*values, strict=True))]
        for step, row in ((5, scores), (6, scaled), (7, weights), (8, mixed)):
            steps[step].append(row)
    return steps


def test_each_printed_matrix_is_right(engine, capsys):
    result = load_example("by_hand").main()
    text = capsys.readouterr().out
    got, wanted = printed_matrices(text), expected()
    assert [len(got[step]) for step in range(1, 9)] == [5] * 8
    for step, rows in wanted.items():
        np.testing.assert_allclose(got[step], rows, rtol=0, atol=0.00501, err_msg=f"step {step}")
    np.testing.assert_allclose(result, wanted[8], rtol=1e-12)
    share = math.exp(4 / 3**0.5) / math.fsum(math.exp(x / 3**0.5) for x in (0, 4, 0, 2, 2))
    assert f'"sat" looks at "cat" most, with {share:.0%} of its weight' in text


def test_a_difference_from_the_op_fails(monkeypatch):
    example = load_example("by_hand")
    monkeypatch.setattr(
        example.qkv_fast, "scaled_dot_product_attention", lambda q, k, v: np.zeros((5, 3))
    )
    with pytest.raises(AssertionError, match="Not equal"):
        example.main()
