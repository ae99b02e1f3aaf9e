"""The site: `make docs` builds it into build/docs and takes warnings for errors.

Pages are Markdown (MyST). The reference in `api/` is taken from the docstrings. Nothing is fetched while it is built.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project, version, release = PROJECT["name"], PROJECT["version"], PROJECT["version"]
author = "The hybrimoe-jax authors"
copyright = author
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

# Pages
myst_heading_anchors = 3
highlight_language = "none"  # of blocks that name none: commands and what they print
html_theme = "sphinx_book_theme"
html_title = "hybrimoe-jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "show_toc_level": 2,
    "home_page_in_toc": True,
    "use_download_button": False,
    "navbar_persistent": [],  # the search of the side bar is enough
}
copybutton_exclude = ".linenos, .gp, .go"

# Reference
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_param = False  # a list of names, since several may share a line
napoleon_custom_sections = [("Attributes", "params_style"), ("Attribute", "params_style")]
napoleon_use_rtype = False
default_role = "py:obj"  # a name in backticks links to its entry where there is one

# Every type in a signature has an entry, or is of another library, of which there is no index here.
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:class", r"(collections|flax|jax|np|numpy|os|pathlib)\..*"),
    ("py:class", r"\w+"),  # where a signature names what is imported for type checkers only
    # not for callers
    ("py:class", r"hybrimoe_jax\.(decide\.cache\.echo\.Memory|machine\.origin\.Machine|models\.registry\.Config)"),
    ("py:class", r"hybrimoe_jax\.(decide\.cache_state\.Facts|simulate\.runs\.Folder|simulate\.synthetic\.Knobs)"),
]


def whole(app, what, name, obj, options, lines):
    """Keeps napoleon from taking what stands before a colon in a property's docstring for its type."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def readable(app, what, name, obj, options, signature, returns):
    """A default that a factory makes, as Python can parse it."""
    return (signature and signature.replace("<factory>", "..."), returns)


def setup(app):
    app.connect("autodoc-process-docstring", whole, priority=400)
    app.connect("autodoc-process-signature", readable)
