"""Attention weights as one HTML page: view.html with the weights in it."""

from __future__ import annotations

import base64
import html
import json
import os
import zlib
from collections.abc import Iterable
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt

from .._problem.arguments import integer
from .inputs import Weights, checked_tokens, checked_weights

STEPS = 255  # of the square root of a weight: one byte each
PLACEHOLDERS = "__TITLE__", "__DATA__"


class View:
    """A page that shows attention weights, as `view` returns it; Jupyter displays it inline.

    Attributes
    ----------
    html : str
        The page: one document that needs no network.
    height : int
        The height in pixels of the frame in which Jupyter shows it.
    max_error : float
        The largest difference between a weight on the page and the one given.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast.plot
    >>> page = qkv_fast.plot.view(np.eye(3), ["The", "cat", "sat"])
    >>> page.html[:15], page.max_error
    ('<!doctype html>', 0.0)
    """

    def __init__(self, page: str, max_error: float, height: int) -> None:
        self.html = page
        self.max_error = max_error
        self.height = height

    def __repr__(self) -> str:
        size = len(self.html)  # all ASCII
        return f"<qkv_fast.plot.View: an HTML page of {size / 1000:.0f} KB; save it by .save(path)>"

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" sandbox="allow-scripts" '
            f'title="attention weights" loading="lazy" '
            f'style="width:100%;height:{self.height}px;border:0;border-radius:8px"></iframe>'
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file, which any browser opens."""
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write(self.html)


def view(
    weights: Any,
    tokens: Iterable[str],
    context_tokens: Iterable[str] | None = None,
    *,
    title: str = "Attention",
    height: int = 680,
) -> View:
    """Return one HTML page to explore attention weights.

    It shows lines from token to token with the weights of the token under the pointer, thumbnails
    of all heads of all layers, and the matrix with zoom. It needs no network and no packages.

    Parameters
    ----------
    weights : array of real numbers, (layers, H, Lq, Lk), (H, Lq, Lk) or (Lq, Lk)
        Attention weights, each at least 0.
    tokens : sequence of str, Lq
        The tokens of the queries.
    context_tokens : sequence of str, Lk, optional
        The tokens of the keys, if they are other ones. Default: `tokens`.
    title : str, default "Attention"
        The page's title.
    height : int, default 680
        The height in pixels of the frame in which Jupyter shows the page.

    Returns
    -------
    View
        The page: `.html`, `.save(path)`, and shown inline by Jupyter.

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type, shape or number of tokens, or a weight is negative,
        infinite or NaN.

    Notes
    -----
    The page holds a byte for each weight, compressed: the square root of its share of the largest
    weight m, in 255 steps. A weight w differs from the one given by at most
    sqrt(w * m) / 255 + m / 260100, which is 0.004 of m at most, and 0.0002 for w = 0.002 and m = 1;
    a byte of w / m itself would err by 0.002 everywhere. The page and `View.max_error` state the
    largest difference.

    Examples
    --------
    >>> import numpy as np
    >>> import qkv_fast.plot
    >>> weights = np.full((6, 12, 3, 3), 1 / 3)  # 6 layers, 12 heads
    >>> page = qkv_fast.plot.view(weights, ["The", "cat", "sat"])
    >>> page.save("attention.html")  # doctest: +SKIP
    """
    array = checked_weights(weights, (2, 3, 4))
    queries, keys = checked_tokens(array, tokens, context_tokens)
    if not isinstance(title, str):
        raise TypeError(f"title must be a str, not {type(title).__name__}")
    height = integer("height", height, 200, what="an int")
    array = array.reshape((1,) * (4 - array.ndim) + array.shape)
    scale = float(array.max()) or 1.0
    steps, max_error = quantised(array, scale)
    data = {
        "title": title,
        "tokens": queries,
        "context": keys if context_tokens is not None else None,
        "shape": list(array.shape),
        "scale": scale,
        "steps": STEPS,
        "error": max_error,
        "weights": base64.b64encode(zlib.compress(steps.tobytes(), 6)).decode("ascii"),
    }
    begin, middle, end = _template_parts()
    name = html.escape(title).encode("ascii", "xmlcharrefreplace").decode("ascii")
    return View(f"{begin}{name}{middle}{_script_safe(data)}{end}", max_error, height)


def quantised(weights: Weights, scale: float) -> tuple[npt.NDArray[np.uint8], float]:
    """Return round(255 sqrt(w / scale)) as bytes, and the largest error of the weights they mean.

    >>> steps, error = quantised(np.array([[0, 0.25, 1]], np.float32), 1.0)
    >>> steps, round(error, 4)
    (array([[  0, 128, 255]], dtype=uint8), 0.002)
    """
    steps = np.empty(weights.shape, np.uint8)
    meant = (scale * (np.arange(STEPS + 1) / STEPS) ** 2).astype(np.float32)
    max_error = 0.0
    for part, result in zip(weights, steps, strict=True):  # a layer at a time: less memory
        result[...] = np.rint(np.sqrt(part / np.float32(scale)) * STEPS)
        max_error = max(max_error, float(np.abs(meant[result] - part).max()))
    return steps, max_error


def _script_safe(data: dict[str, Any]) -> str:
    """Return JSON in ASCII that no token can end or leave: <, > and & are escapes."""
    text = json.dumps(data)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _template_parts() -> tuple[str, str, str]:
    template = resources.files(__package__).joinpath("view.html").read_text(encoding="utf-8")
    begin, rest = template.split(PLACEHOLDERS[0])
    middle, end = rest.split(PLACEHOLDERS[1])
    return begin, middle, end
