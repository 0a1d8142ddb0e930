"""The documentation site: `python -m sphinx -E -W -b html docs build/docs`, with the extra `docs` installed."""

from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from pygments.lexers import JsonLexer
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS))

import reference  # noqa: E402  (it lies beside this file)

from cofitune import __version__  # noqa: E402

project = "cofitune"
author = "the cofitune developers"
copyright = "the cofitune developers, Apache-2.0"
release = __version__
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # the generated references skip no level, but a page may begin with its comment
html_math_renderer = "mathml"  # as browsers know it: no script, and nothing from another host
html_theme = "furo"
html_title = "cofitune"
html_static_path = ["static"]
html_css_files = ["tables.css"]
html_theme_options = {"navigation_with_keys": True}
exclude_patterns = ["_build"]


def _fill_in(app: Sphinx, page: str, source: list[str]) -> None:
    source[0] = reference.fill_in(source[0])


def _inline(translator: HTML5Translator, node: nodes.math) -> None:
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block(translator: HTML5Translator, node: nodes.math_block) -> None:
    translator.body.append(tex2mathml(node.astext(), as_block=True))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Put the generated references into the pages that ask for them."""
    app.connect("source-read", _fill_in)
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.add_lexer("jsonl", JsonLexer)
