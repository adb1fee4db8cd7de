"""The house's rules: imports point one way, no addresses and no machine's paths in files, every dependency locked."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = sorted((ROOT / "src/alexlab").rglob("*.py"))
LATER = {"alexlab.rules.check", "alexlab.run.fit", "alexlab.rules.EVAL_RULES", "alexlab.evaluate.evaluate",
         "alexlab.rules.COMPARE_RULES", "alexlab.compare.show.show",
         "alexlab.rules.DASHBOARD_RULES", "alexlab.dashboard.make",
         "alexlab.rules.PREDICT_RULES", "alexlab.predict.predict",
         "alexlab.rules.FIGURES_RULES", "alexlab.redraw.redraw",
         "alexlab.rules.EXPORT_RULES", "alexlab.export.export",
         "alexlab.rules.PREPARE_RULES", "alexlab.prepare.prepare",
         "alexlab.rules.BENCHMARK_RULES", "alexlab.rules.RULES",
         "alexlab.benchmark.benchmark"}  # after composing  # fmt: skip
SCRIPTS = [
    ROOT / f"{name}.py"
    for name in ("train", "eval", "compare", "dashboard", "predict", "figures", "export", "prepare", "benchmark")
]

# each room imports rooms before it in this order, and itself
ROOMS = [
    "errors", "secrecy", "kinds", "rules", "targets", "config", "sweeps", "help", "imports", "launch", "words",
    "memory", "rundir", "code_state", "options", "reworded", "compare", "identity", "figures", "plots", "study_plots",
    "data", "models", "optimizers", "optim", "augment", "checkpoint", "instantiate", "loading", "sums", "classifier",
    "loggers", "callbacks", "gallery", "trainer", "plan", "assemble", "report", "resume", "restore", "repeat",
    "run", "rank", "evaluate", "redraw", "panels", "dashboard", "predict", "export", "prepare", "benchmark",
    "beforehand", "refound", "study_terms", "study", "cli", "__init__",
]  # fmt: skip
STRANGERS = {"data": "models", "models": "data"}

# who may import what, by room or file; all others may not
ONLY = {
    "hydra": {"beforehand", "cli", "instantiate"},
    "hydra_plugins": {"study"},
    "optuna": {"sweeps", "study_terms", "study", "callbacks"},
    "omegaconf": {"rules", "config", "sweeps", "help", "instantiate", "loading", "callbacks", "trainer", "plan",
                  "rundir", "identity", "assemble", "report", "resume", "restore", "repeat",
                  "options", "run", "evaluate",
                  "redraw", "compare", "panels", "dashboard", "predict", "export", "prepare",
                  "benchmark", "study_terms", "study", "beforehand", "refound", "cli"},
    "pytorch_lightning": {"checkpoint", "classifier", "data/datamodule.py", "loggers", "callbacks", "trainer",
                          "assemble", "run", "report", "evaluate", "benchmark"},
    "wandb": {"loggers", "callbacks", "gallery", "compare/boards.py", "dashboard"},
    "wandb_workspaces": {"dashboard"},
    "plotly": {"compare"},
    "matplotlib": {"plots", "study_plots"},
    "timm": {"models"},
    "simplejpeg": {"data", "prepare"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "onnxscript": {"export"},
}  # fmt: skip
LIGHT = (
    "errors",
    "secrecy",
    "kinds",
    "rules",
    "targets",
    "config",
    "sweeps",
    "help",
    "imports",
    "launch",
    "words",
    "memory",
    "beforehand",
    "refound",
    "cli",
)  # before a task runs
HEAVY = ("matplotlib", "torch", "torchvision", "pytorch_lightning", "wandb", "numpy", "PIL", "torchmetrics")


def imports(source: str, top_only: bool = False) -> set[str]:
    tree = ast.parse(source)
    found: set[str] = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def broken_rules(path: str, source: str) -> list[str]:
    """The imports of src/alexlab/<path> that its room may not have."""
    room = path.split("/")[0].removesuffix(".py")
    wrong = []
    for name in imports(source):
        first, *rest = name.split(".")
        if first == "alexlab" and rest:
            if ROOMS.index(rest[0]) > ROOMS.index(room) or STRANGERS.get(room) == rest[0]:
                wrong.append(name)
        elif first in ONLY and not {room, path} & ONLY[first]:
            wrong.append(name)
    if room in LIGHT:
        wrong += [name for name in imports(source, top_only=True) if name.split(".")[0] in HEAVY]
    return wrong


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_imports_point_one_way(path: Path) -> None:
    assert broken_rules(str(path.relative_to(ROOT / "src/alexlab")), path.read_text()) == []
    assert path.stem not in ("utils", "helpers", "extras", "components")
    assert len(path.read_text().splitlines()) <= 350


def test_the_rules_see_wrong_imports() -> None:
    assert broken_rules("models/x.py", "def f():\n    from alexlab.data import index") == ["alexlab.data.index"]
    assert broken_rules("optim.py", "from alexlab import run") == ["alexlab.run"]
    assert broken_rules("data/index.py", "import pytorch_lightning as pl") == ["pytorch_lightning"]
    assert broken_rules("cli.py", "import torch") == ["torch"]
    assert broken_rules("data/datamodule.py", "import pytorch_lightning\nfrom alexlab.errors import UserError") == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_import_nothing_heavy_at_the_top(path: Path) -> None:
    light = {"alexlab.cli.hydra_command", "alexlab.imports.importing", "sys"}
    assert imports(path.read_text()) - LATER <= light


def test_no_addresses_and_no_machines_paths() -> None:
    hosts = "|".join(("py" + r"pi\.org", "python" + r"hosted\.", "registry" + r"\.npm"))
    wrong = re.compile(rf"{hosts}|(?<![\w.])/(?:ho" + r"me|ro" + r"ot|wo" + r"rk)/\w")
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
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
