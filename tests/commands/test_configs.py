"""Every shipped yaml composes, opens with what it is for, and breaks no rule."""

from pathlib import Path

import pytest
from conftest import ROOT, composed
from hydra.core.hydra_config import HydraConfig

from alexlab.engine.schema import TrainConfig
from alexlab.engine.validation import validate

CONF = ROOT / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
OTHER = ("hydra", "paths", "callbacks", "dashboard")  # groups with one option, or of another command
WANDBS = CONF / "sweep/wandb.yaml"  # W&B's own file, not an option: see test_agent.py
CHOICES = [p for p in FILES if p.parent != CONF and p.parent.name not in OTHER and p != WANDBS and p.stem[0] != "_"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONF)))
def test_file_says_what_it_is_for(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# "), path
    assert len(lines[0]) > 10


@pytest.mark.parametrize("path", CHOICES, ids=lambda p: str(p.relative_to(CONF)))
def test_every_option_composes_and_is_valid(path: Path, tmp_path: Path) -> None:
    (tmp_path / "prepared.json").touch()  # for data=prepared
    group = path.parent.relative_to(CONF)
    sampler = ["hydra/sweeper=optuna"] if group.name == "sampler" else []
    needed = {"table": ["data.file=x"], "huggingface": ["data.path=x"], "torchvision": ["data.name=CIFAR10"]}
    needed["distillation"] = ["task.teacher=latest"]
    more = needed.get(path.stem, []) if group.name in ("data", "task") else []
    plain = composed(*sampler, f"{group}={path.stem}", f"data.root={tmp_path}", *more)
    assert validate(TrainConfig, plain).data.root == str(tmp_path)


def test_optuna_optimizes_the_monitored_metric() -> None:
    for metric, direction in (("val/acc1", "maximize"), ("val/loss", "minimize")):
        composed("sweep=optuna", f"monitor={metric}")
        assert HydraConfig.get().sweeper.direction == direction
