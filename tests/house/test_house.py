"""The house: imports run one way, commands start fast, no machine's path in a file, dependencies are locked."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from test_architecture import LISTED

PACKAGE = ROOT / "src/alexlab"
# each folder may import those to its right, and itself
RANKS = ("commands", "callbacks", "analysis", "loggers", "tasks", "data", "models", "engine")
SOURCES = [name for name in LISTED if name.split("/")[0] in RANKS]  # our files: yours may import what they like
HEAVY = {"matplotlib", "torch", "torchvision", "pytorch_lightning", "wandb", "numpy", "PIL", "torchmetrics", "pandas"}


def forbidden_imports(folder: str, source: str) -> list[str]:
    """List the imports in `source` that a file of `folder` may not have."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "alexlab":
            first = f"{node.module}.{node.names[0].name}".split(".")[1]
            if first in RANKS and (RANKS.index(first) < RANKS.index(folder) or {first, folder} == {"data", "models"}):
                found.append(f"{folder} -> {node.module}")
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_imports_run_one_way(name: str) -> None:
    assert forbidden_imports(name.split("/")[0], (PACKAGE / name).read_text()) == []


def test_an_import_that_climbs_is_seen() -> None:
    assert forbidden_imports("models", "def f():\n    from alexlab.data import folder") == ["models -> alexlab.data"]
    assert forbidden_imports("engine", "from alexlab.commands.train import fit") == ["engine -> alexlab.commands.train"]
    assert forbidden_imports("data", "from alexlab.engine.errors import UserError") == []


@pytest.mark.parametrize("command", ["train", "eval"])
def test_help_imports_no_heavy_library(command: str) -> None:
    code = (
        "import atexit, runpy, sys\n"
        f"atexit.register(lambda: print('heavy:', sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr))\n"
        f"sys.argv = ['{command}.py', '--help']\n"
        f"runpy.run_path({str(ROOT / command) + '.py'!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0
    assert "heavy: []" in done.stderr


def our_files() -> list[str]:
    """Return the files of this project, without what a user adds to src/ and conf/."""
    named = (ROOT / "docs/usage.md").read_text()
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    ours = {f"src/alexlab/{name}" for name in LISTED}
    return [
        name
        for name in names
        if name.split("/")[0] not in ("src", "conf", "data", "logs")
        or name in ours
        or (name.startswith("conf/") and f"`{Path(name).stem}`" in named)
    ]


def test_no_addresses_and_no_machines_paths() -> None:
    hosts = "|".join(("py" + r"pi\.org", "python" + r"hosted\.", "registry" + r"\.npm"))
    wrong = re.compile(rf"{hosts}|(?<![\w.])/(?:ho" + r"me|ro" + r"ot|wo" + r"rk)/\w")
    names = our_files()
    assert {"README.md", "src/alexlab/engine/schema.py", "conf/data/folder.yaml"} <= {*names}
    for name in names:
        if not (ROOT / name).is_file():  # removed, and not committed yet
            continue
        raw = (ROOT / name).read_bytes()
        assert len(raw) < 1_000_000, name
        if b"\0" not in raw:
            assert wrong.search(raw.decode()) is None, name


def test_every_dependency_is_locked_by_hash() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    entries = re.findall(r"^([a-z0-9-]+)==(\S+)(.*(?:\n +.*)*)", lock, re.M)
    assert all("--hash=sha256:" in rest for _, _, rest in entries)
    assert "://" not in lock
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    for requirement in asked:
        assert re.match(r"[A-Za-z0-9-]+", requirement)[0].lower() in {name for name, _, _ in entries}  # type: ignore[index]


def test_make_help_lists_the_targets() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in shown.splitlines()} >= {"help", "setup", "train", "test", "lint"}
