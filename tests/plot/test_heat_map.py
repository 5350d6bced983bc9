"""qkv_fast.plot.heat_map and entropy_map: figures whose text can be read."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from qkv_fast import plot

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WORDS = ["the", "$", "##ization", "$x_$", "W" * 13, "characterizations", r"$\nope{$", "a\nb"]


def softmax_weights(*shape):
    weights = np.exp(2 * np.random.default_rng(0).standard_normal(shape))
    return weights / weights.sum(axis=-1, keepdims=True)


def words(count):
    return [WORDS[i % len(WORDS)] for i in range(count)]


def maps(figure):
    return [axis for axis in figure.axes if axis.images]


def drawn(figure):
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    return figure


def assert_legible(figure):
    """No two labels of an axis overlap, none is tiny, and nothing is cut off."""
    drawn(figure)
    boxes = []
    for axis in maps(figure):
        for side, low, high in ((axis.xaxis, "x0", "x1"), (axis.yaxis, "y0", "y1")):
            labels = side.get_ticklabels()
            assert min(label.get_fontsize() for label in labels) >= 7
            extents = sorted(
                (label.get_window_extent() for label in labels),
                key=lambda box, low=low: getattr(box, low),
            )
            for a, b in itertools.pairwise(extents):
                assert getattr(b, low) > getattr(a, high)
        boxes.append(axis.get_tightbbox())
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    box = figure.get_tightbbox()
    assert min(box.min) >= 0
    assert all(box.max <= figure.get_size_inches())


@pytest.mark.parametrize("heads", [None, 1, 5])
@pytest.mark.parametrize("length", [1, 5, 50, 500])
def test_labels_are_legible(length, heads):
    shape = (length, length) if heads is None else (heads, length, length)
    figure = plot.heat_map(softmax_weights(*shape), words(length), title="a text " * 8)
    assert_legible(figure)
    assert len(maps(figure)) == (heads or 1)
    for axis in maps(figure):
        places = [int(x) for x in axis.get_xticks()]
        assert places[0] == 0
        assert places[-1] == length - 1
        if length <= (40 if heads == 5 else 50):
            assert len(places) == length
        else:
            assert 20 <= len(places) <= 64
            for place, label in zip(places, axis.get_xticklabels(), strict=True):
                assert label.get_text().startswith(f"{place} ")
        assert {label.get_rotation() for label in axis.get_xticklabels()} == {90}


@pytest.mark.parametrize("shape", [(1, 5), (1, 300), (3, 40), (300, 4), (2, 6, 90), (9, 1, 500)])
def test_other_keys_than_queries(shape):
    queries, keys = shape[-2:]
    context = [f"key{i}" for i in range(keys)]
    figure = plot.heat_map(softmax_weights(*shape), words(queries), context, title="cross")
    assert_legible(figure)
    axis = maps(figure)[0]
    assert "key0" in axis.get_xticklabels()[0].get_text()
    assert "the" in axis.get_yticklabels()[0].get_text()


def test_heads_share_one_colour_scale_that_is_explained():
    weights = softmax_weights(3, 20, 20)
    figure = plot.heat_map(weights, words(20))
    largest = np.percentile(weights.astype(np.float32), 99)
    assert {axis.images[0].get_clim() for axis in maps(figure)} == {(0, largest)}
    (bar,) = [axis for axis in figure.axes if axis.get_ylabel().startswith("attention weight")]
    assert bar.get_ylabel() == f"attention weight (1 % are above {largest:.2g})"
    assert figure.get_supxlabel() == "key token"
    assert figure.get_supylabel() == "query token"
    figure = plot.heat_map(weights, words(20), vmax=1.0, cmap="cividis")
    assert maps(figure)[0].images[0].get_clim() == (0, 1)
    assert maps(figure)[0].images[0].get_cmap().name == "cividis"


@pytest.mark.parametrize("value", [0, 1])
def test_sparse_weights_have_a_colour_scale(value):
    weights = np.zeros((20, 20))
    weights[3, 4] = value
    figure = drawn(plot.heat_map(weights, words(20)))
    assert maps(figure)[0].images[0].get_clim() == (0, 1)


def test_axes_that_are_given_are_used():
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    weights = softmax_weights(2, 100, 100)
    assert plot.heat_map(weights[0], words(100), ax=left, title="costs $5") is figure
    assert left.get_title() == "costs $5"
    assert len(figure.axes) == 2
    assert plot.heat_map(weights, words(100), ax=np.array([left, right])) is figure
    assert right.get_title() == "head 1"
    drawn(figure)
    for axis in (left, right):
        assert 5 <= len(axis.get_xticks()) <= 30
    with pytest.raises(TypeError, match=r"^ax is a list: one head needs one Axes of matplotlib$"):
        plot.heat_map(weights[0], words(100), ax=[left])
    with pytest.raises(TypeError, match=r"^ax is a Axes: a sequence of Axes is needed, one"):
        plot.heat_map(weights, words(100), ax=left)
    with pytest.raises(ValueError, match=r"^ax has 1 Axes, but weights have 2 heads on axis 0: ea"):
        plot.heat_map(weights, words(100), ax=[left])


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"; of several layers, pass weights\[layer\], or call en"):
        plot.heat_map(np.ones((2, 2, 3, 3)), words(3))
    for vmax in (0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match=f"^vmax is {vmax}: it must be a positive number$"):
            plot.heat_map(np.ones((3, 3)), words(3), vmax=vmax)
    with pytest.raises(ValueError, match=r"they must be \(layers, heads, queries, keys\)$"):
        plot.entropy_map(np.ones((2, 3, 3)))


def test_entropy_by_layer_and_head():
    weights = np.zeros((2, 3, 8, 8))
    weights[0] = 1 / 8  # 3 bits
    weights[1, 0] = np.eye(8)  # 0 bits
    weights[1, 1, :, :2] = 7.0  # 1 bit: rows are divided by their sums
    figure = drawn(plot.entropy_map(weights, title="entropy"))
    (axis,) = maps(figure)
    shown = np.asarray(axis.images[0].get_array().filled(np.nan))
    np.testing.assert_allclose(shown[:, :2], [[3, 3], [0, 1]], atol=1e-6)
    assert np.isnan(shown[1, 2])  # no weight at all
    assert sorted(text.get_text() for text in axis.texts) == ["0.0", "1.0", "3.0", "3.0", "3.0"]
    assert axis.get_title() == "entropy"
    assert any(other.get_ylabel() == "mean entropy (bits)" for other in figure.axes)


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (6, 12, 5, 5), (12, 12, 3, 3), (80, 64, 2, 2)])
def test_entropy_maps_are_legible(shape):
    figure = plot.entropy_map(softmax_weights(*shape))
    assert_legible(figure)
    (axis,) = maps(figure)
    extents = [text.get_window_extent() for text in axis.texts]
    assert len(extents) in (0, shape[0] * shape[1])
    for a, b in itertools.combinations(extents, 2):
        assert not a.overlaps(b)
    figure = Figure()
    axis = figure.subplots()
    assert plot.entropy_map(softmax_weights(*shape), ax=axis) is figure


def test_tokens_are_no_formulas_and_no_line_breaks():
    figure = drawn(plot.heat_map(softmax_weights(8, 8), words(8)))
    texts = [label.get_text() for label in maps(figure)[0].get_yticklabels()]
    assert texts[1] == "$"
    assert texts[7] == r"a\nb"
    assert re.fullmatch(r"characterizat…", texts[5])
