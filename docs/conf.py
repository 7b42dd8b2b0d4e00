# Copyright (C) 2026 The anomalib-mvfa authors
# SPDX-License-Identifier: Apache-2.0

"""Configuration of the documentation: ``make docs`` builds it in ``docs/_build/html``."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import anomalib_mvfa

project = "anomalib-mvfa"
author = "The anomalib-mvfa authors"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx's name
release = version = anomalib_mvfa.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebook keeps its outputs; a test runs it

autodoc_default_options = {"show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False  # else the words before a colon of a result count as its type

html_math_renderer = "mathml"
html_theme = "sphinx_book_theme"
html_title = "anomalib-mvfa"
html_theme_options = {"show_toc_level": 2, "use_download_button": False, "home_page_in_toc": True}
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True


def write_mathml(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers draw without a network."""
    block = isinstance(node, nodes.math_block)
    mathml = tex2mathml(node.astext(), as_block=block)
    translator.body.append(f'<div style="overflow-x: auto; padding: 0.5em 0 1em">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Let Sphinx render formulas when it builds, in place of MathJax from a content network."""
    app.add_html_math_renderer("mathml", (write_mathml, None), (write_mathml, None))
