"""Settings of Sphinx. `make docs` builds a site from the pages of this folder and from the docstrings."""

import gc
import os
import re
import tomllib
from pathlib import Path

from sphinx.application import Sphinx

gc.disable()  # the build then takes a third less time
DOCS = Path(__file__).parent
# files outside of this folder, and the pages that include them
PAGES = {"../README.md": "index.md", "../benchmarks/results.md": "benchmarks.md", "../CHANGELOG.md": "changes.md"}

project = html_title = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]["name"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
nitpicky = True  # finds text of a docstring that is read as a type, because it has spaces
nitpick_ignore_regex = [("py:.*", r"\S+")]  # ignores names without spaces, as types of libraries have no page
smartquotes_action = "D"  # quotation marks stay straight
highlight_language = "none"  # of a block that names none, such as commands
myst_heading_anchors = 4  # the links to headings are those of GitHub

default_role = "code"  # `name` in a docstring
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True  # as written: their values may be paths of this machine
python_maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False


def relink(text: str, folder: Path) -> str:
    """Make the links of a page in `folder` relative to docs/. A link to an included file leads to its page.

    Sphinx copies files that are no pages, such as ../conf/train.yaml, and links the copies.
    """

    def link(match: re.Match[str]) -> str:
        path = os.path.relpath(folder / match[1], DOCS)
        return f"]({PAGES.get(path, path)}" if (folder / match[1]).is_file() else match[0]

    return re.sub(r"\]\(([^)#:\s]+)", link, text)


def read_page(app: Sphinx, name: str, content: list[str]) -> None:
    content[0] = relink(content[0], DOCS)


def read_included(app: Sphinx, path: Path, name: str, content: list[str]) -> None:
    content[0] = relink(content[0], (DOCS / path).parent)


def read_signature(
    app: Sphinx, what: str, name: str, it: object, options: object, signature: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """Replace the default of a dataclass's field, which Sphinx cannot parse."""
    return signature and signature.replace("<factory>", "..."), result


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", read_signature)
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
