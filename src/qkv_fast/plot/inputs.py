"""What the pictures were given: weights and tokens, checked before any drawing."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from .._given_weights import real_weights
from .._problem.arguments import integer, shown

Weights = npt.NDArray[np.float32]

SHAPES = {
    2: "(queries, keys)",
    3: "(heads, queries, keys)",
    4: "(layers, heads, queries, keys)",
}


def checked_weights(given: Any, dimensions: tuple[int, ...], cure: str = "") -> Weights:
    """Return the weights as float32; `dimensions` are the numbers of axes that are accepted.

    `cure` ends the message of a wrong number of axes.
    """
    accepted = " or ".join(SHAPES[n] for n in dimensions)
    return real_weights(given, dimensions, accepted + cure, np.float32)


def checked_tokens(
    weights: Weights, tokens: Iterable[str], context_tokens: Iterable[str] | None
) -> tuple[list[str], list[str]]:
    """Return the tokens of the queries and those of the keys."""
    queries, keys = weights.shape[-2:]
    query_tokens = _strings("tokens", tokens)
    if len(query_tokens) != queries:
        raise ValueError(
            f"tokens has {len(query_tokens)} entries, but weights have {queries} queries on axis "
            "-2: each query must have one token"
        )
    if context_tokens is None:
        if keys != queries:
            raise ValueError(
                f"tokens has {queries} entries, but weights have {keys} keys on axis -1: pass "
                "context_tokens, the tokens of the keys"
            )
        return query_tokens, query_tokens
    key_tokens = _strings("context_tokens", context_tokens)
    if len(key_tokens) != keys:
        raise ValueError(
            f"context_tokens has {len(key_tokens)} entries, but weights have {keys} keys on axis "
            "-1: each key must have one token"
        )
    return query_tokens, key_tokens


def _strings(name: str, given: Any) -> list[str]:
    rule = "a sequence of str is needed, one for each token"
    if isinstance(given, str | bytes):
        raise TypeError(f"{name} is {shown(given)}: {rule}")
    try:
        tokens = list(given)
    except TypeError:
        raise TypeError(f"{name} is {shown(given)}: {rule}") from None
    for i, token in enumerate(tokens):
        if not isinstance(token, str):
            raise TypeError(f"{name} holds {shown(token)} at {i}: {rule}")
    return [str(token) for token in tokens]


def checked_width(given: int) -> int:
    """Return a width of at least 40 columns."""
    return integer("width", given, 40, what="an int or None")


def printable(token: str) -> str:
    r"""Return the token on one line, with control and format characters as escapes.

    >>> printable("a\x1b[31m\n")
    'a\\x1b[31m\\n'
    """
    if token.isprintable():
        return token
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in token)


def columns_of(text: str) -> int:
    """Return how many columns of a terminal the text takes.

    >>> columns_of("cat"), columns_of("猫"), columns_of("e\u0301")
    (3, 2, 1)
    """
    return sum(map(_columns_of_character, text))


def _columns_of_character(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def clipped(text: str, columns: int, ellipsis: str = "…") -> str:
    """Return the text, or as much of it as fits in `columns` with an ellipsis.

    >>> clipped("characterization", 8)
    'charact…'
    """
    if columns_of(text) <= columns:
        return text
    left = columns - len(ellipsis)
    kept = ""
    for character in text:
        left -= _columns_of_character(character)
        if left < 0:
            break
        kept += character
    return kept + ellipsis


def thinned(count: int, most: int) -> list[int]:
    """Return the positions that have labels: all of `count`, or every n-th and the last.

    >>> thinned(3, 10), thinned(10, 4)
    ([0, 1, 2], [0, 3, 6, 9])
    """
    step = -(-count // max(1, most))
    if step == 1:
        return list(range(count))
    return [*range(0, count - step, step), count - 1]
