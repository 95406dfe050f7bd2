"""The site: guides in Markdown, reference pages from the docstrings. `make docs` builds it into build/docs/."""

import ensdistill

project = "ensdistill"
copyright = "the ensdistill authors"
version = release = ensdistill.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
root_doc = "index"
nitpicky = True  # a name in a signature that leads nowhere is a warning, and a warning fails
nitpick_ignore_regex = [("py:.*", r"(torch|nn|collections|pathlib|numpy)\..*|Tensor|.*\.(Tensor|Module)|Path|optional")]

# [a heading](page.md#its-anchor), as code hosts make anchors; links to code are those of the checkout
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_class_signature = "separated"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Returns"]  # text: types are in the annotations

default_role = "code"  # what docstrings have in single quotes

highlight_language = "none"  # a block says its language

html_theme = "furo"
html_title = "ensdistill"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}


_kept = {}


def _keep(app, what, name, obj, options, lines):
    """Keep the docstring of an attribute: napoleon takes the words before its first colon for a type."""
    if what in ("attribute", "property"):
        _kept[name] = list(lines)


def _give_back(app, what, name, obj, options, lines):
    lines[:] = _kept.pop(name, lines)


def setup(app):
    """Stand on both sides of napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", _keep, priority=400)
    app.connect("autodoc-process-docstring", _give_back, priority=600)
