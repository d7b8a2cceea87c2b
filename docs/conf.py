"""Sphinx: the documentation site. `make docs` builds it into docs/_build, offline, with warnings as errors."""

import os
import re
import subprocess
import sys

from docutils import nodes
from docutils.parsers.rst import Directive

import gsem

project = "gsem"
author = "The gsem developers"
copyright = "The gsem developers, MIT licence"
version = release = gsem.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = True

# --- Markdown: the pages are read on GitHub too ------------------------------------------------------------------
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline"]
# Sphinx's name of the lexer for `$ command` with its output is console; both spellings are highlighted alike.
highlight_language = "text"

# --- docstrings: single backticks are code, and a link where they name something public -----------------------------
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
maximum_signature_line_length = 72
add_module_names = False
python_use_unqualified_type_names = True
# Most code in backticks, and names of other projects, have no page here. What begins with gsem. must exist.
nitpick_ignore_regex = [(r"py:.*", r"(?!gsem\.[\w.]+$)[\s\S]*")]
# Types of arguments and fields that users do not make themselves.
nitpick_ignore = [
    ("py:class", f"gsem.{name}")
    for name in (
        "rng.Shard",
        "attacks.own.OwnAttack",
        "nn.folded.FoldedModel",
        "reporting.visuals.Shown",
        "reporting.visuals.Surface",
    )
]

# --- the look -------------------------------------------------------------------------------------------------------
html_theme = "furo"
html_title = f"gsem {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}


def readable_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """What napoleon and reStructuredText would misread in our docstrings. Runs before napoleon."""
    for number, line in enumerate(lines):
        line = re.sub(r"(`[^`\n]+`)(?=\w)", r"\1\\ ", line)  # `AttackSpec`s: a letter behind is no end of markup
        code = line.split("`")
        code[::2] = [re.sub(r"[|]|(?<=/)[*]", r"\\\g<0>", text) for text in code[::2]]  # |x|, CLASS/*
        lines[number] = "`".join(code)
    if what in ("property", "attribute") and lines:
        lines.insert(0, "")  # napoleon takes what stands before a colon in the first line for the type


class CommandHelp(Directive):
    """The help of a command, as this version prints it: a `gsem-help` block with the name of the command."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        words = [*self.arguments, "--help"]
        environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
        ran = subprocess.run(
            [sys.executable, "-m", "gsem", *words], capture_output=True, text=True, env=environment, check=True
        )
        text = f"$ gsem {' '.join(words)}\n{ran.stdout.rstrip()}"
        return [nodes.literal_block(text, text, language="console")]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", readable_docstring, priority=400)
    app.add_directive("gsem-help", CommandHelp)
