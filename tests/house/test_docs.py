"""`make docs`: the site has no warnings, and what is broken is one. Modules and pages that you add are left out."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, clean_env
from test_architecture import LISTED

TEMPLATE = ("models", "data", "tasks", "callbacks", "loggers")
BROKEN = """---
orphan: true
---
# Broken links

[a page](nowhere.md)

[a heading of another page](usage.md#nowhere)

[a heading of this page](#nowhere)

[a file](../conf/nowhere.yaml)

![a picture](nowhere.png)

"""
WORKING = """
[a page](usage.md), [a heading of another page](data.md#a-table), [a heading of this page](#broken-links),
[the README](../README.md#commands), [another page](../benchmarks/results.md), [a file](../conf/train.yaml)
"""
MODULE = '''"""A module."""


def fails() -> None:
    """Fail for *x."""


class Works:
    """Work."""

    @property
    def kind(self) -> str:
        """What it is: a text before a colon, which is read as a type."""
'''
Built = tuple[Path, "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Build the site of a copy of this project, with a page and a docstring that are broken."""
    copy = tmp_path_factory.mktemp("docs") / "project"
    for name in ("docs", "src", "conf", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("_build", "__pycache__", "*.egg-info"))
    shutil.rmtree(copy / "docs/api", ignore_errors=True)  # what `make docs` has written
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    package = copy / "src/alexlab"
    for folder in TEMPLATE:
        for path in (package / folder).glob("*.py"):
            if path.name != "__init__.py" and f"{folder}/{path.name}" not in LISTED:
                path.unlink()
    listed = (copy / "docs/index.md").read_text().splitlines()
    for path in (copy / "docs").glob("*.md"):
        if path.stem not in [*listed, "index"]:
            path.unlink()
    (copy / "docs/broken.md").write_text(BROKEN + WORKING)
    (package / "models/broken.py").write_text(MODULE)
    words = [sys.executable, "-m", "sphinx", "--no-color", "--quiet", "--fail-on-warning", "docs", "html"]
    env = clean_env({"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"})
    return copy, subprocess.run(words, cwd=copy, env=env, capture_output=True, text=True, check=False, timeout=240)


def test_only_what_is_broken_is_a_warning_and_fails(built: Built) -> None:
    copy, done = built
    broken = [f"docs/broken.md:{number}" for number, line in enumerate(BROKEN.splitlines(), 1) if "](" in line]
    docstrings = [
        f"src/alexlab/models/broken.py:docstring of alexlab.models.broken.{at}" for at in ("Works.kind:3", "fails:1")
    ]
    warned = [line.split(": WARNING: ")[0] for line in done.stderr.replace(f"{copy}/", "").splitlines()]
    assert sorted(warned) == sorted([*broken, *docstrings]), done.stderr
    assert done.returncode == 1


def test_links_lead_to_pages_headings_and_copies(built: Built) -> None:
    html = built[0] / "html"
    page, index = (html / "broken.html").read_text(), (html / "index.html").read_text()
    for link in ("usage.html", "data.html#a-table", "#broken-links", "index.html#commands", "benchmarks.html"):
        name, _, anchor = link.partition("#")
        assert f'internal" href="{link}"' in page
        assert f'id="{anchor}"' in (html / (name or "broken.html")).read_text() or not anchor
    (copied,) = re.findall(r'href="(_downloads/[^"]+)"', page)
    assert (html / copied).read_text() == (ROOT / "conf/train.yaml").read_text()
    assert 'href="extending.html#scheduler"' in index
    assert {"alexnet.py", "alexnet.yaml"} <= {
        Path(copied).name for copied in re.findall(r'href="(_downl[^"]+)"', index)
    }
    assert 'src="_images/run.svg"' in index
    assert (html / "_images/run.svg").is_file()


def test_the_reference_has_the_notebook_functions_and_each_template_file(built: Built) -> None:
    copy, _ = built
    entrances = (copy / "html/api.html").read_text()
    pages = {folder: (copy / f"html/api/alexlab.{folder}.html").read_text() for folder in TEMPLATE}
    assert all(f'id="alexlab.{name}"' in entrances for name in ("train", "load", "runs", "curves"))
    for name in LISTED:
        folder, _, module = name.removesuffix(".py").partition("/")
        if folder in TEMPLATE and "/" not in module:
            assert f'id="module-alexlab.{folder}.{module}"' in pages[folder]
    assert 'id="alexlab.tasks.load.Trained.classes"' in pages["tasks"]
    assert 'id="alexlab.models.broken.Works"' in pages["models"]
    whole = "".join([entrances, *pages.values()])
    assert "Alias for field number" not in whole
    assert "&lt;factory&gt;" not in whole
    assert str(copy) not in whole, "a path of this machine"
