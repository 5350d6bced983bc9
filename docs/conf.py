"""Sphinx's settings for the documentation, which is built without a network.

sphinx-build -W --keep-going -b html docs build/docs
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

import qkv_fast

project = "qkv_fast"
author = "the qkv_fast authors"
version = release = qkv_fast.__version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
nitpicky = False  # types in docstrings are prose: "array, shape (..., Hq, Lq, D)"
default_role = "py:obj"  # `name` is a link where there is such a name, else code

myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "none"  # docstrings say more: shapes, dtypes and units
numpydoc_show_class_members = False  # the reference lists them by task
numpydoc_class_members_toctree = False

html_theme = "furo"
html_title = f"qkv_fast {release}"
html_static_path = ["_static"]
html_css_files = ["extra.css"]
html_copy_source = False
html_show_sphinx = html_show_copyright = False
pygments_dark_style = "github-dark"
html_theme_options = {"navigation_with_keys": True}
html_math_renderer = "mathml"  # MathJax would be loaded from a network


def link_outside_files(app: Sphinx, docname: str, source: list[str]) -> None:
    """Make a link to a file outside docs/ a download of that file.

    MyST does so itself, with a warning if the file is not there, but takes each `.md`
    for a page. Pages have plain relative links, which work in the repository too.
    """
    folder = Path(app.env.doc2path(docname)).parent

    def link(match: re.Match[str]) -> str:
        target = (folder / match[1]).resolve()
        return match[0] if target.is_relative_to(app.srcdir) else f"](path:{match[1]})"

    source[0] = re.sub(r"\]\((\.\./[^()#\s]+\.md)\)", link, source[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the above, and a renderer of formulas."""
    app.connect("source-read", link_outside_files)

    def inline(writer: Any, node: nodes.math) -> None:
        writer.body.append(tex2mathml(node.astext(), as_block=False))
        raise nodes.SkipNode

    def block(writer: Any, node: nodes.math_block) -> None:
        writer.body.append(tex2mathml(node.astext(), as_block=True))
        raise nodes.SkipNode

    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True}
