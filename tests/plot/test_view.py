"""qkv_fast.plot.view: the page as a document, and the weights and tokens in it."""

from __future__ import annotations

import base64
import html
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest

from qkv_fast import plot

ODD = [
    "</script><script>alert(1)</script>",
    "<!--",
    "\"double\" and 'single'",
    "שלום",
    "👩\u200d👧🎉",
    "",
    "\n",
    "&amp;",
    "\u2028",
    "\ud800",
    "__DATA__",
    "__TITLE__",
]


def softmax_weights(*shape):
    weights = np.exp(3 * np.random.default_rng(0).standard_normal(shape))
    return weights / weights.sum(axis=-1, keepdims=True)


class Page(HTMLParser):
    """The elements of a page, its scripts and its title."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.texts = {}
        self.ids = []
        self.open = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open = (tag, dict(attrs).get("id"))

    def handle_data(self, text):
        self.texts[self.open] = self.texts.get(self.open, "") + text

    def handle_endtag(self, tag):
        self.open = None

    @property
    def data(self):
        return json.loads(self.texts["script", "data"])


def weights_of(data):
    """The weights as the page's script reads them."""
    steps = np.frombuffer(zlib.decompress(base64.b64decode(data["weights"])), np.uint8)
    return (data["scale"] * (steps / data["steps"]) ** 2).reshape(data["shape"])


@pytest.mark.parametrize("shape", [(6, 12, 50, 50), (12, 30, 30), (5, 5), (2, 3, 4, 9)])
@pytest.mark.parametrize("scale", [1, 1e-4, 300])
def test_weights_come_back_within_the_stated_error(shape, scale):
    given = softmax_weights(*shape) * scale
    given[..., 0, 0] = 0
    page = plot.view(given, ["t"] * shape[-2], ["t"] * shape[-1])
    data = Page(page.html).data
    shown = weights_of(data)
    given = given.reshape(shown.shape)
    largest = given.max()
    error = np.abs(shown - given)
    assert error.max() <= page.max_error * 1.0001 + 1e-7 * largest
    assert data["error"] == page.max_error
    rounding = 1e-6 * largest  # of float32
    assert (error <= np.sqrt(given * largest) / 255 + largest / 260100 + rounding).all()
    assert page.max_error <= 0.00394 * largest
    assert shown[..., 0, 0].max() == 0


def test_all_zero_weights():
    data = Page(plot.view(np.zeros((2, 2)), ["a", "b"]).html).data
    assert weights_of(data).max() == 0
    assert data["error"] == 0


@pytest.mark.parametrize("length", [5, 50, 200])
def test_the_page_is_one_file_that_needs_no_network(length):
    page = plot.view(softmax_weights(6, 12, length, length), ["token"] * length)
    assert not re.search(r"(https?:)?//[a-z0-9]+\.", page.html)
    assert "http:" not in page.html
    assert "https:" not in page.html
    parsed = Page(page.html)
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "href", "srcset", "data"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    (policy,) = [a["content"] for _, a in parsed.elements if "http-equiv" in a]
    assert policy.startswith("default-src 'none';")
    data_size = len(parsed.texts["script", "data"])
    assert len(page.html) - data_size < 100_000
    assert data_size < 1.4 * 6 * 12 * length**2 + 20 * length + 2000
    assert page.html.isascii()


def test_no_token_leaves_its_place():
    title = "</title><script>alert(2)</script>"
    page = plot.view(np.full((2, 12, 12), 1 / 12), ODD, title=title)
    parsed = Page(page.html)
    plain = Page(plot.view(np.full((2, 12, 12), 1 / 12), ["t"] * 12, title="t").html)
    assert [tag for tag, _ in parsed.elements] == [tag for tag, _ in plain.elements]
    assert parsed.data["tokens"] == ODD
    assert parsed.data["title"] == title
    assert parsed.texts["title", None] == title
    assert "<" not in parsed.texts["script", "data"]
    assert "alert(1)</script>" not in page.html


def test_context_tokens_name_the_keys():
    data = Page(plot.view(np.full((2, 3), 1 / 3), ["a", "b"], ["x", "y", "z"]).html).data
    assert data["tokens"] == ["a", "b"]
    assert data["context"] == ["x", "y", "z"]
    assert Page(plot.view(np.eye(2), ["a", "b"]).html).data["context"] is None


def test_the_saved_file_is_the_page(tmp_path):
    page = plot.view(np.eye(2), ["é", "\ud800"])
    page.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes().decode("utf-8") == page.html
    page.save(str(tmp_path / "page.html"))
    assert re.fullmatch(r"<qkv_fast\.plot\.View: an HTML page of \d+ KB; .*>", repr(page))


def test_jupyter_shows_the_page_in_a_frame():
    page = plot.view(np.eye(2), ['"', "</iframe>"], height=400)
    (frame,) = Page(page._repr_html_()).elements
    tag, attributes = frame
    assert tag == "iframe"
    assert attributes["srcdoc"] == page.html
    assert attributes["sandbox"] == "allow-scripts"
    assert "height:400px" in attributes["style"]
    assert html.unescape(page._repr_html_()).count("</iframe>") == 1
