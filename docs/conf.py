"""Sphinx settings of the documentation: ``sphinx-build -W --keep-going -b html docs build/docs``.

Nothing is fetched while it builds, and the pages ask nothing of other hosts: no intersphinx, no MathJax, system fonts.
"""

import sys
from pathlib import Path

from docutils.nodes import Node, SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

from captum_lnstat import __version__

sys.path.insert(0, str(Path(__file__).parent))

from _repository import address

project = "captum-lnstat"
copyright = "the captum-lnstat maintainers, BSD-3-Clause"  # noqa: A001  Sphinx reads this name
version = release = __version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "myst_nb", "sphinx_copybutton"]
exclude_patterns = ["_build", "package", "**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"captum-lnstat {release}"
html_extra_path = ["llms.txt"]
html_static_path = ["_static"]
repository = address(Path(__file__).parent)
# In the footer of every page, once the clone that the pages are built from has an address on the web.
_link = {"name": "Repository", "url": repository, "html": "<span>Repository</span>", "class": ""}
html_theme_options = {"footer_icons": [_link] if repository else []}
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_js_files = [("rows.js", {"defer": "defer"})]
html_show_sourcelink = False
html_math_renderer = "mathml"

myst_heading_anchors = 3

# The notebooks are run anew for every build, and a cell that raises fails it.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented"
python_use_unqualified_type_names = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "  # of doctests and sessions: what is copied runs
copybutton_prompt_is_regexp = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def formula(translator: HTML5Translator, node: Node) -> None:
    """Write a formula as MathML, which browsers show without a script."""
    translator.body.append(tex2mathml(node.astext(), as_block=node.tagname == "math_block"))
    raise SkipNode


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
