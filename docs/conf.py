"""The documentation as a site: `make docs` builds it into docs/_build, with warnings as errors."""

import re
import sys

from pydantic import BaseModel
from sphinx.application import Sphinx

import scorelm
from scorelm.cli.process import let_waiting_threads_sleep

let_waiting_threads_sleep()  # in the notebooks' kernels too: beside other work they would take ten times as long

project = "scorelm"
author = "The scorelm authors"
version = release = scorelm.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_design",
]
exclude_patterns = ["_build"]
default_role = "code"
add_module_names = False
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!scorelm\.\w+\.\w+\.\w+).*")]  # only what pages link by its full name

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_class_signature = "separated"
autodoc_default_options = {"exclude-members": "__init__, __new__, model_config"}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Options", "params_style")]

html_theme = "furo"
html_title = f"scorelm {release}"
html_favicon = "../src/scorelm/serving/static/mark.svg"
html_copy_source = False
html_show_copyright = False

FLAG = re.compile(r"(?<!\S)--[a-z][\w-]+")
KEPT: dict[str, list[str]] = {}
LINKED = re.compile(r"\[`(\w+\.\w+\.[\w.]+)`\]\[\w+\]")


def link_functions(app: Sphinx, page: str, source: list[str]) -> None:
    """A function that a page links to its file is linked to its documentation here."""
    source[0] = LINKED.sub(r"{py:obj}`\1 <scorelm.\1>`", source[0])


def keep(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Remember the docstring of an attribute, where napoleon will take what stands before a colon for its type."""
    KEPT[name] = list(lines)


def describe(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """An attribute is described by its own docstring; an option has its default, and flags look like flags."""
    if what in ("attribute", "property"):
        lines[:] = KEPT[name]
        module, owner, attribute = name.rsplit(".", 2)
        field = getattr(getattr(sys.modules[module], owner), "model_fields", {}).get(attribute)
        if field is not None and not isinstance(field.default, BaseModel):
            lines += ["", f"Default: ``{field.default!r}``"]
    lines[:] = [line if "`" in line else FLAG.sub(r"``\g<0>``", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", link_functions)
    app.connect("autodoc-process-docstring", keep, priority=400)
    app.connect("autodoc-process-docstring", describe, priority=600)  # napoleon's has 500
