"""The page of qkv_fast.plot.view in headless Chromium: what it shows, and that nothing fails.

A script at the end of the page points, clicks and types; what it saw is read from the DOM.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from qkv_fast import plot

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
if CHROMIUM is None:
    pytest.skip("chromium is not installed", allow_module_level=True)

ERRORS = """<script>
const seen = { errors: [] };
addEventListener("error", (event) => seen.errors.push(event.message));
addEventListener("unhandledrejection", (event) => seen.errors.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => seen.errors.push(event.blockedURI));
console.error = console.warn = (...all) => seen.errors.push(all.join(" "));
window.requestAnimationFrame = (draw) => setTimeout(draw, 5); // virtual time draws no frames
window.alert = () => seen.errors.push("alert");
</script>"""
DRIVER = """<script>
const all = (selector) => [...document.querySelectorAll(selector)];
const texts = (selector) => all(selector).map((node) => node.textContent);
const over = (node) => node.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
const press = (key, node = document.activeElement) =>
  node.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const frame = () => new Promise((done) => setTimeout(done, 60));
const inked = (canvas) => canvas.width > 0 && canvas.getContext("2d")
  .getImageData(0, 0, canvas.width, canvas.height).data.some((byte) => byte > 0);
(async () => {
  try {
    while (document.documentElement.dataset.ready !== "true") await frame();
    await frame();
    STEPS
  } catch (error) { seen.errors.push(String(error)); }
  const result = document.createElement("pre");
  result.id = "seen";
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
})();
</script>"""


def softmax_weights(*shape):
    weights = np.exp(2 * np.random.default_rng(0).standard_normal(shape))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.fixture
def browse(tmp_path):
    def run(page, steps):
        text = page.html.replace("<head>", "<head>" + ERRORS, 1)
        text = text.replace("</body>", DRIVER.replace("STEPS", steps) + "</body>")
        path = tmp_path / "page.html"
        path.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [
                CHROMIUM,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                f"--user-data-dir={tmp_path / 'profile'}",
                "--window-size=1200,800",
                "--virtual-time-budget=20000",
                "--dump-dom",
                path.as_uri(),
            ],
            capture_output=True,
            timeout=120,
            check=True,
        )
        dom = done.stdout.decode("utf-8", "replace")
        found = re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)
        assert found, dom[-2000:]
        seen = json.loads(html.unescape(found[1]))
        assert seen.pop("errors") == []
        return seen

    return run


def percent(text):
    return float(text.strip("%")) / 100


HOVER = """
    over(all("#queries .token")[2]);
    await frame();
    seen.title = texts("#trace h2")[0];
    seen.first = [texts("#trace .bar bdi")[0], texts("#trace .bar .value")[0]];
    seen.weights = texts("#keys .weight");
    seen.inked = inked(document.getElementById("web"));
    over(all("#keys .token")[1]);
    await frame();
    seen.back = [texts("#trace h2")[0], texts("#queries .weight")];
"""


@pytest.mark.parametrize("length", [5, 50, 200])
def test_pointing_at_a_token_shows_its_weights(browse, length):
    weights = softmax_weights(2, 3, length, length)
    page = plot.view(weights, [f"t{i}" for i in range(length)])
    seen = browse(page, HOVER)
    row = weights[0].mean(axis=0)[2]
    assert seen["title"] == "t2 2 looks at"
    assert seen["first"][0] == f"t{row.argmax()}"
    tolerance = page.max_error + 0.005
    assert percent(seen["first"][1]) == pytest.approx(row.max(), abs=tolerance)
    for text, weight in zip(seen["weights"], row, strict=True):
        assert percent(text or "0") == pytest.approx(weight, abs=tolerance)
    assert seen["inked"]
    title, texts = seen["back"]
    assert title == "t1 1 is looked at by"
    column = weights[0].mean(axis=0)[:, 1]
    for text, weight in zip(texts, column, strict=True):
        assert percent(text or "0") == pytest.approx(weight, abs=tolerance)


VIEWS = """
    press("2", document.body);
    await frame();
    seen.thumbs = all(".thumb canvas").map(inked);
    seen.hidden = all("section").map((node) => node.hidden);
    all(".thumb")[4].click();
    await frame();
    seen.matrix = inked(document.getElementById("map"));
    seen.layer = document.getElementById("layer").value;
    seen.heads = all(".chip").map((chip) => chip.getAttribute("aria-pressed"));
    const map = document.getElementById("map");
    map.focus();
    for (const way of ["Down", "Right", "Down", "Right", "Right"]) press(`Arrow${way}`, map);
    press("+", map);
    await frame();
    seen.cell = document.getElementById("cell").textContent;
    for (const id of ["in", "out", "fit"]) document.getElementById(id).click();
    await frame();
    press("]", document.body);
    press("[", document.body);
    press(".", document.body);
    seen.next = all(".chip").findIndex((chip) => chip.getAttribute("aria-pressed") === "true");
    press("a", document.body);
    press("1", document.body);
    await frame();
    all("#queries .token")[0].focus();
    press("ArrowDown");
    press("ArrowRight");
    press("Enter");
    seen.focus = texts("#trace h2")[0];
    press("Escape");
    seen.free = texts("#trace h2")[0];
    document.getElementById("floor").value = 30;
    document.getElementById("floor").dispatchEvent(new Event("input"));
"""


@pytest.mark.parametrize("length", [5, 50, 200])
def test_all_heads_matrix_and_keys(browse, length):
    weights = softmax_weights(2, 3, length, length)
    page = plot.view(weights, [f"t{i}" for i in range(length)])
    seen = browse(page, VIEWS)
    assert seen["thumbs"] == [True] * 6
    assert seen["hidden"] == [True, False, True]
    assert seen["matrix"]
    assert seen["layer"] == "1"
    assert seen["heads"] == ["false", "true", "false"]
    assert seen["cell"].startswith("query t1")
    query, weight = re.fullmatch(r"query t(\d) .*: (.*)", seen["cell"]).groups()
    assert query == "1"
    assert "key t3" in seen["cell"]
    assert percent(weight.strip("<")) == pytest.approx(
        weights[1, 1, 1, 3], abs=page.max_error + 0.005
    )
    assert seen["next"] == 2
    assert seen["focus"] == "t1 1 is looked at by"
    assert seen["free"] == "Strongest in layer 1"


ODD = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "שלום", "🎉", "", "\n"]
TOKENS = """
    seen.tokens = texts("#queries .text");
    over(all("#queries .token")[1]);
    seen.title = texts("#trace h2")[0];
    seen.images = all("img").length;
    press("3", document.body);
    await frame();
"""


def test_tokens_are_text(browse):
    page = plot.view(softmax_weights(6, 4), ODD, ["a", "b", "c", "d"], title=ODD[0])
    seen = browse(page, TOKENS)
    assert seen["tokens"] == [*ODD[:4], "(empty)", "⏎"]
    assert seen["title"] == f"{ODD[1]} 1 looks at"
    assert seen["images"] == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (3, 1), (20, 2, 1, 30), (1, 40, 6, 6)])
def test_other_shapes(browse, shape):
    page = plot.view(softmax_weights(*shape), ["q"] * shape[-2], ["k"] * shape[-1])
    steps = """
        for (const key of "2313") { press(key, document.body); await frame(); }
        seen.matrix = inked(document.getElementById("map"));
    """
    assert browse(page, steps)["matrix"]
