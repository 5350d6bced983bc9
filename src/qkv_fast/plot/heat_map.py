"""Attention weights as figures of matplotlib, which is imported by the calls only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .inputs import Weights, checked_tokens, checked_weights, clipped, printable, thinned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABEL_CHARACTERS = 14  # of a token
INCHES_A_LABEL = 0.125  # at least: labels of 7.5 points don't overlap
MIN_SIDE = 3.0  # inches of one head
MAX_SIDE, MAX_SIDE_ALONE = 5.0, 8.0  # in a grid, and of a single head
EM_WIDTH = 0.62 / 72  # inches of a character, on average, for each point of its size
COLUMNS = 4  # heads side by side
ANNOTATED_CELLS = 256  # at most, of an entropy map: more numbers would overlap


def heat_map(
    weights: Any,
    tokens: Iterable[str],
    context_tokens: Iterable[str] | None = None,
    *,
    ax: Any = None,
    title: str | None = None,
    cmap: str = "viridis",
    vmax: float | None = None,
) -> Figure:
    """Return a figure of attention weights: a row a query, a column a key.

    All heads share one colour scale from 0 to `vmax`. Where tokens are too many for their labels,
    every n-th and the last have one, with its position. Needs matplotlib (``qkv-fast[plot]``).

    Parameters
    ----------
    weights : array of real numbers, (Lq, Lk) or (H, Lq, Lk)
        Attention weights, each at least 0: one head, or the heads of a grid.
    tokens : sequence of str, Lq
        The tokens of the queries.
    context_tokens : sequence of str, Lk, optional
        The tokens of the keys, if they are other ones. Default: `tokens`.
    ax : matplotlib Axes, or a sequence of H Axes, optional
        Where to draw, without a colour bar. Default: a new figure with one, outside of pyplot.
    title : str, optional
        The title of the figure, or of the single Axes given. "$" starts no formula.
    cmap : str, default "viridis"
        A colour map of matplotlib; "viridis" and "cividis" suit colour-blind readers.
    vmax : float, optional
        The weight at the end of the colour scale. Default: the 99th percentile, since a few
        weights near 1 would leave most heads dark (the colour bar says so), or the largest
        weight where that is hardly larger.

    Returns
    -------
    matplotlib.figure.Figure
        The new figure, or that of `ax`.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    TypeError, ValueError
        If an argument has the wrong type, shape or number of tokens, or a weight is negative,
        infinite or NaN.

    Examples
    --------
    >>> import io
    >>> import numpy as np
    >>> import qkv_fast.plot
    >>> weights = np.full((2, 3, 3), 1 / 3)  # 2 heads
    >>> figure = qkv_fast.plot.heat_map(weights, ["The", "cat", "sat"])
    >>> figure.savefig(io.BytesIO())
    """
    array = checked_weights(weights, (2, 3), _cure_for_layers(weights))
    queries, keys = checked_tokens(array, tokens, context_tokens)
    heads = array if array.ndim == 3 else array[np.newaxis]
    largest = _largest_shown(array) if vmax is None else float(vmax)
    if not largest > 0 or not np.isfinite(largest):
        raise ValueError(f"vmax is {vmax}: it must be a positive number")
    if ax is not None:
        return _draw_on_axes(_axes_list(ax, array), heads, queries, keys, title, cmap, largest)
    return _new_figure(array, queries, keys, title, cmap, largest, vmax is None)


def entropy_map(
    weights: Any, *, ax: Any = None, title: str | None = None, cmap: str = "viridis"
) -> Figure:
    """Return a figure of the mean entropy of each head of each layer, in bits.

    A head of 0 bits looks at one key; one of log2(n) bits spreads evenly over n keys. Queries
    without any weight don't count. Needs matplotlib (``qkv-fast[plot]``).

    Parameters
    ----------
    weights : array of real numbers, (layers, H, Lq, Lk)
        Attention weights, each at least 0. Each row is divided by its sum.
    ax : matplotlib Axes, optional
        Where to draw, without a colour bar. Default: a new figure with one, outside of pyplot.
    title : str, optional
        The title of the Axes.
    cmap : str, default "viridis"
        A colour map of matplotlib.

    Returns
    -------
    matplotlib.figure.Figure
        The new figure, or that of `ax`.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    TypeError, ValueError
        If `weights` has the wrong type or shape, or a weight is negative, infinite or NaN.

    Examples
    --------
    >>> import io
    >>> import numpy as np
    >>> import qkv_fast.plot
    >>> weights = np.full((6, 12, 8, 8), 1 / 8)  # every head spreads over 8 keys: 3 bits
    >>> figure = qkv_fast.plot.entropy_map(weights)
    >>> figure.savefig(io.BytesIO())
    """
    bits = mean_entropy(checked_weights(weights, (4,)))
    layers, heads = bits.shape
    if ax is not None:
        figure, axis = ax.figure, ax
    else:
        size = 0.5 * heads + 2.2, 0.42 * layers + 1.6
        figure = _figure_class()(
            figsize=(max(4.0, size[0]), max(2.2, size[1])), layout="constrained"
        )
        axis = figure.subplots()
    top = float(np.nanmax(bits)) if np.isfinite(bits).any() else 1.0
    image = axis.imshow(bits, cmap=cmap, vmin=0, vmax=top or 1.0, aspect="auto")
    for side, count in ((axis.xaxis, heads), (axis.yaxis, layers)):
        side.set_ticks(thinned(count, 32))
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    if title is not None:
        axis.set_title(title, parse_math=False)
    if bits.size <= ANNOTATED_CELLS:
        for (layer, head), value in np.ndenumerate(bits):
            if np.isfinite(value):
                color = "black" if value > 0.6 * top else "white"
                axis.text(
                    head, layer, f"{value:.1f}", ha="center", va="center", color=color, fontsize=8
                )
    if ax is None:
        figure.colorbar(image, ax=axis).set_label("mean entropy (bits)")
    result: Figure = figure
    return result


def mean_entropy(weights: Weights) -> Any:
    """Return the mean entropy of the rows in bits, NaN for a head without any weight.

    >>> import numpy as np
    >>> mean_entropy(np.full((1, 1, 2, 8), 0.125, np.float32))
    array([[3.]])
    """
    layers, heads = weights.shape[:2]
    bits = np.full((layers, heads), np.nan)
    for layer in range(layers):
        for head in range(heads):
            rows = weights[layer, head].astype(np.float64)
            sums = rows.sum(axis=-1, keepdims=True)
            seen = sums[:, 0] > 0
            if seen.any():
                p = rows[seen] / sums[seen]
                logs = np.log2(p, out=np.zeros_like(p), where=p > 0)
                bits[layer, head] = -(p * logs).sum(axis=-1).mean() + 0.0
    return bits


def _new_figure(
    array: Weights,
    queries: list[str],
    keys: list[str],
    title: str | None,
    cmap: str,
    largest: float,
    is_percentile: bool,
) -> Figure:
    heads = array if array.ndim == 3 else array[np.newaxis]
    most = MAX_SIDE if len(heads) > 1 else MAX_SIDE_ALONE
    width, height = (min(max(MIN_SIDE, INCHES_A_LABEL * len(t)), most) for t in (keys, queries))
    if len(queries) < len(keys):  # few queries over many keys: rows of up to 0.4 inches
        height = min(height, max(0.4 * len(queries), 0.5))
    most_labels = int(most / INCHES_A_LABEL)
    margins = [0.55 + 0.075 * _longest(_labels(t, most_labels)) for t in (queries, keys)]
    columns = min(COLUMNS, len(heads))
    rows = -(-len(heads) // columns)
    size = 4 * min(max(width, height), MAX_SIDE if len(heads) > 1 else 3.5)  # points
    title_width = 0.0 if title is None else EM_WIDTH * size * len(title)
    figure = _figure_class()(
        figsize=(
            max(columns * (width + margins[0]) + 1.4, title_width),
            rows * (height + margins[1]) + 0.9,
        ),
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    large = {"fontsize": size, "parse_math": False}
    for head, axis in enumerate(axes):
        if head >= len(heads):
            axis.set_axis_off()
            continue
        image = _draw(axis, heads[head], queries, keys, cmap, largest, (width, height))
        if array.ndim == 3:
            axis.set_title(f"head {head}", fontsize=0.875 * size)
    if title is not None:
        figure.suptitle(title, **large)
    figure.supxlabel("key token", **large)
    figure.supylabel("query token", **large)
    beyond = bool((array > largest).any())
    low = rows * height < 2  # no room for a label along an upright bar
    bar = figure.colorbar(
        image,
        ax=axes,
        extend="max" if beyond else "neither",
        location="bottom" if low else "right",
        aspect=40 if low or rows * height > 4 else 20,
        shrink=0.8,
    )
    note = f" (1 % are above {largest:.2g})" if is_percentile and beyond else ""
    label = f"attention weight{note}"
    along = figure.get_size_inches()[0 if low else 1]
    size = min(size, 0.9 * along / (EM_WIDTH * len(label)))
    bar.set_label(label, fontsize=size, parse_math=False)
    bar.ax.tick_params(labelsize=0.875 * size)
    result: Figure = figure
    return result


def _draw_on_axes(
    axes: list[Any],
    heads: Weights,
    queries: list[str],
    keys: list[str],
    title: str | None,
    cmap: str,
    largest: float,
) -> Figure:
    for head, (axis, matrix) in enumerate(zip(axes, heads, strict=True)):
        box = axis.get_window_extent().transformed(axis.figure.dpi_scale_trans.inverted())
        _draw(axis, matrix, queries, keys, cmap, largest, (box.width, box.height))
        if len(axes) > 1:
            axis.set_title(f"head {head}")
        elif title is not None:
            axis.set_title(title, parse_math=False)
    figure: Figure = axes[0].figure
    if len(axes) > 1 and title is not None:
        figure.suptitle(title, parse_math=False)
    return figure


def _draw(
    axis: Any,
    matrix: Weights,
    queries: list[str],
    keys: list[str],
    cmap: str,
    largest: float,
    inches: tuple[float, float],
) -> Any:
    """Draw one head, with as many labels as fit on sides of `inches` (width, height)."""
    aspect = "equal" if len(queries) == len(keys) else "auto"
    image = axis.imshow(
        matrix, cmap=cmap, vmin=0, vmax=largest, interpolation="nearest", aspect=aspect
    )
    if aspect == "equal":
        inches = min(inches), min(inches)
    for side, tokens, length, turn in (
        (axis.xaxis, keys, inches[0], 90),
        (axis.yaxis, queries, inches[1], 0),
    ):
        labels = _labels(tokens, int(length / INCHES_A_LABEL + 1e-6))
        size = min(9.0, 60 * length / len(labels))
        side.set_ticks(
            list(labels), list(labels.values()), rotation=turn, fontsize=size, parse_math=False
        )
    return image


def _labels(tokens: list[str], most: int) -> dict[int, str]:
    """Return the labels of an axis by position; each has its position where some are left out."""
    positions = thinned(len(tokens), most)
    names = {i: clipped(printable(tokens[i]), LABEL_CHARACTERS) for i in positions}
    if len(positions) == len(tokens):
        return names
    return {i: f"{i} {name}" for i, name in names.items()}


def _longest(labels: dict[int, str]) -> int:
    return max(map(len, labels.values()))


def _largest_shown(weights: Weights) -> float:
    """Return the 99th percentile, or the largest weight if hardly larger or if that is 0; or 1."""
    percentile, most = float(np.percentile(weights, 99)), float(weights.max())
    return percentile if 0 < percentile < 0.9 * most else most or 1.0


def _axes_list(ax: Any, weights: Weights) -> list[Any]:
    if weights.ndim == 2:
        if not hasattr(ax, "imshow"):
            raise TypeError(f"ax is a {type(ax).__name__}: one head needs one Axes of matplotlib")
        return [ax]
    if isinstance(ax, np.ndarray):
        ax = list(ax.flat)
    if not isinstance(ax, Sequence) or not all(hasattr(axis, "imshow") for axis in ax):
        raise TypeError(f"ax is a {type(ax).__name__}: a sequence of Axes is needed, one a head")
    if len(ax) != len(weights):
        raise ValueError(
            f"ax has {len(ax)} Axes, but weights have {len(weights)} heads on axis 0: each head "
            "must have one"
        )
    return list(ax)


def _cure_for_layers(weights: Any) -> str:
    if np.ndim(weights) != 4:
        return ""
    return "; of several layers, pass weights[layer], or call entropy_map or view"


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'matplotlib is missing: pip install "qkv-fast[plot]"; terminal and view need nothing'
        ) from error
    return Figure
