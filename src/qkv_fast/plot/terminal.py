"""Attention weights as text: a row for each query, a shade for each key."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Any

import numpy as np

from .._problem.arguments import flag
from .inputs import (
    Weights,
    checked_tokens,
    checked_weights,
    checked_width,
    clipped,
    columns_of,
    printable,
)

SHADES = " ░▒▓█"
ASCII_SHADES = " .:*#"
# The colours of xterm's 256 that are next to viridis at 0, 1/7, ... 1.
COLORS = (53, 54, 60, 30, 36, 71, 149, 220)
LABEL_COLUMNS = 14  # of a token, at most; a sixth of a narrow terminal


def terminal(
    weights: Any,
    tokens: Iterable[str],
    context_tokens: Iterable[str] | None = None,
    *,
    width: int | None = None,
    color: bool | None = None,
    ascii: bool | None = None,
) -> str:
    """Return attention weights as text for a terminal.

    Each row is a query, shaded relative to its largest weight; beside it stands the key that it
    looks at most. Keys that exceed the width are drawn several to a cell, which shows the largest
    of their weights.

    Parameters
    ----------
    weights : array of real numbers, (Lq, Lk) or (H, Lq, Lk)
        Attention weights, each at least 0. Heads are drawn one below the other.
    tokens : sequence of str, Lq
        The tokens of the queries. Control characters are shown as escapes.
    context_tokens : sequence of str, Lk, optional
        The tokens of the keys, if they are other ones. Default: `tokens`.
    width : int, optional
        Columns that a line may take, at least 40. Default: those of the terminal.
    color : bool, optional
        Whether cells are coloured by ANSI escape codes. Default: where standard output is a
        terminal, unless the environment variable NO_COLOR is set or TERM is "dumb".
    ascii : bool, optional
        Whether the text is pure ASCII. Default: where standard output can't encode the shades.

    Returns
    -------
    str
        Lines without a newline at the end. The last one says what the shades mean.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, shape or number of tokens, or a weight is negative,
        infinite or NaN.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast.plot
    >>> weights = np.array([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.0, 0.5, 0.5]])
    >>> tokens = ["The", "cat", "sat"]
    >>> print(qkv_fast.plot.terminal(weights, tokens, width=80, color=False, ascii=True))
         0 1 2  looks most at
    The ##       0 The 90%
    cat ..##     1 cat 70%
    sat   ####   1 cat 50%
    <BLANKLINE>
    each row relative to its largest weight: .. 20% :: 40% ** 60% ## 80% or more
    """
    array = checked_weights(weights, (2, 3))
    queries, keys = checked_tokens(array, tokens, context_tokens)
    plain = not _can_encode_shades() if ascii is None else flag("ascii", ascii)
    colored = _wants_color() if color is None else flag("color", color)
    columns = max(40, _terminal_columns()) if width is None else checked_width(width)
    queries, keys = ([_label(t, plain, columns) for t in names] for names in (queries, keys))
    parts = []
    for head, matrix in enumerate(array if array.ndim == 3 else array[np.newaxis]):
        lines = [f"head {head}"] if array.ndim == 3 else []
        lines += _rows(matrix, queries, keys, columns, plain, colored)
        parts.append("\n".join(lines))
    parts.append(_legend(plain, colored, columns))
    return "\n\n".join(parts)


def _rows(
    matrix: Weights, queries: list[str], keys: list[str], columns: int, plain: bool, colored: bool
) -> list[str]:
    label_columns = max(map(columns_of, queries))
    digits = max(2, len(str(len(keys) - 1)))
    name_columns = max(len("looks most at"), digits + 1 + max(map(columns_of, keys)) + len(" 100%"))
    room = columns - label_columns - len(" ") - len("  ") - name_columns
    cell = 2 if 2 * len(keys) <= room else 1
    pooled = -(-len(keys) * cell // room)  # keys in a cell
    starts = range(0, len(keys), pooled)
    cells = np.maximum.reduceat(matrix, list(starts), axis=1)
    lines = [" " * (label_columns + 1) + _positions(starts, cell) + "  looks most at"]
    largest = matrix.max(axis=1)
    safe = np.where(largest > 0, largest, 1)
    levels = len(COLORS) if colored else len(SHADES)
    steps = np.minimum(cells / safe[:, np.newaxis] * levels, levels - 1).astype(int)
    for label, row, row_steps in zip(queries, matrix, steps, strict=True):
        best = int(row.argmax())
        name = (
            f"{best:>{digits}} {keys[best]} {row[best]:.0%}"
            if row[best] > 0
            else f"{'-':>{digits}} nothing"
        )
        padding = " " * (label_columns - columns_of(label))
        lines.append(f"{padding}{label} {_cells(row_steps, cell, plain, colored)}  {name}")
    if pooled > 1:
        note = f"each cell is the largest weight of {pooled} keys; {len(keys)} keys in all"
        lines.append(textwrap.fill(note, columns))
    return lines


def _positions(starts: range, cell: int) -> str:
    """Return the positions above the cells: of each, of every second or of every tenth.

    >>> _positions(range(3), 2)
    ' 0 1 2'
    >>> _positions(range(13), 2)
    ' 0   2   4   6   8  10  12'
    >>> _positions(range(0, 40, 2), 1)
    '0         20        '
    """
    if cell == 1:
        text = "".join(f"{starts[j]:<10}" for j in range(0, len(starts), 10))
        return text[: len(starts)].ljust(len(starts))
    if len(starts) <= 10:
        return "".join(f"{j:>2}" for j in starts)
    text = f"{starts[0]:>2}" + "".join(f"{j:>4}" for j in starts[2::2])
    return text.ljust(2 * len(starts))


def _cells(steps: Any, cell: int, plain: bool, colored: bool) -> str:
    if not colored:
        shades = ASCII_SHADES if plain else SHADES
        return "".join(shades[s] * cell for s in steps)
    text, last = "", -1
    for step in steps:
        if step != last:
            text += f"\x1b[48;5;{COLORS[step]}m"
            last = step
        text += " " * cell
    return text + "\x1b[0m"


def _legend(plain: bool, colored: bool, columns: int) -> str:
    levels = len(COLORS) if colored else len(SHADES)
    shown = range(1, levels, 2 if colored else 1)
    steps = "".join(f" {_cells([s], 2, plain, colored)} {s / levels:.0%}" for s in shown)
    gap = "\n" if columns < 77 else ""  # both in one line take 76 columns
    return f"each row relative to its largest weight:{gap}{steps} or more"


def _label(token: str, plain: bool, columns: int) -> str:
    token = printable(token)
    if plain:
        token = token.encode("ascii", "backslashreplace").decode("ascii")
    return clipped(token, min(LABEL_COLUMNS, columns // 6), "..." if plain else "…")


def _terminal_columns() -> int:
    return shutil.get_terminal_size().columns


def _can_encode_shades() -> bool:
    try:
        (SHADES + "…").encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _wants_color() -> bool:
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    try:
        return sys.stdout.isatty()
    except (AttributeError, ValueError):  # no standard output, or a closed one
        return False
