"""The house's rules: imports point one way, no addresses and no machine's paths in files, every dependency locked."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = sorted((ROOT / "src/alexlab").rglob("*.py"))
SCRIPTS = [ROOT / "train.py", ROOT / "eval.py", ROOT / "compare.py"]

# what a room may not import, by the first match of its path
FORBIDDEN = {
    "models/": ("alexlab.data", "alexlab.run", "alexlab.classifier", "pytorch_lightning", "hydra", "omegaconf"),
    "data/datamodule.py": ("alexlab.models", "alexlab.run", "alexlab.classifier", "hydra", "omegaconf"),
    "data/": ("alexlab.models", "alexlab.run", "alexlab.classifier", "pytorch_lightning", "hydra", "omegaconf"),
    "callbacks/": ("alexlab.run", "alexlab.trainer", "alexlab.models"),
    "loggers/": ("alexlab.run", "alexlab.trainer", "alexlab.models", "hydra"),
    "optim.py": ("alexlab", "pytorch_lightning", "hydra", "omegaconf"),
    "augment.py": ("alexlab", "pytorch_lightning", "hydra", "omegaconf"),
    "classifier.py": ("alexlab.run", "alexlab.models", "hydra", "omegaconf"),
    "cli.py": ("torch", "pytorch_lightning", "wandb", "numpy"),
}


def imports(source: str, top_only: bool = False) -> set[str]:
    tree = ast.parse(source)
    found: set[str] = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def broken_rules(path: str, found: set[str]) -> list[str]:
    rules = next((rules for room, rules in FORBIDDEN.items() if path.startswith(room)), ())
    return [name for name in found for rule in rules if name == rule or name.startswith(f"{rule}.")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_imports_point_one_way(path: Path) -> None:
    room = str(path.relative_to(ROOT / "src/alexlab"))
    assert broken_rules(room, imports(path.read_text(), top_only=room == "cli.py")) == []
    assert path.stem not in ("utils", "helpers", "extras", "components")
    assert len(path.read_text().splitlines()) <= 450


def test_the_rule_sees_a_wrong_import() -> None:
    assert broken_rules("models/x.py", imports("def f():\n    from alexlab.data import index")) == [
        "alexlab.data.index"
    ]
    assert broken_rules("cli.py", imports("import torch", top_only=True)) == ["torch"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_import_nothing_heavy_at_the_top(path: Path) -> None:
    assert imports(path.read_text(), top_only=True) == {"alexlab.cli.hydra_command"}


def test_no_addresses_and_no_machines_paths() -> None:
    hosts = "|".join(("py" + r"pi\.org", "python" + r"hosted\.", "registry" + r"\.npm"))
    wrong = re.compile(rf"{hosts}|(?<![\w.])/(?:ho" + r"me|ro" + r"ot|wo" + r"rk)/\w")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
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
