"""docs/architecture.md lists files that exist. It judges our files only: a file that you add need not be listed."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs/architecture.md").read_text()
LISTED = re.findall(r"^- `([\w/.]+)` ", PAGE, re.M)
(DRAWING,) = (block for block in re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S) if "VERB" in block)


def place_of(name: str) -> Path:
    """Return the path of a file as the page names it."""
    return ROOT / "src" / name if name.startswith("hydra_plugins/") else ROOT / "src/alexlab" / name


def test_the_page_lists_each_file_once() -> None:
    assert len(LISTED) > 80
    assert len(LISTED) == len(set(LISTED))


@pytest.mark.parametrize("name", LISTED)
def test_a_listed_file_exists(name: str) -> None:
    assert place_of(name).is_file()


def test_the_folders_and_commands_of_the_drawing_exist() -> None:
    folders = re.findall(r"\b[\w/]+/(?=\s)", DRAWING)
    assert len(folders) >= 8
    assert all((ROOT / "src/alexlab" / folder).is_dir() for folder in folders)
    assert all((ROOT / script).is_file() for script in re.findall(r"\w+\.py", DRAWING))


def test_the_files_of_the_two_walks_exist() -> None:
    walks = PAGE[PAGE.index("## One image") : PAGE.index("# Design decisions")]
    names = re.findall(r"`(\w+/\w+)`", walks)
    assert len(names) > 12
    assert {f"{name}.py" for name in names} <= set(LISTED)
