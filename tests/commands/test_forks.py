"""What people fork a template for, in files outside of the project: train, kill, resume, evaluate, export, compare."""

import json
from pathlib import Path

import pytest
from forks import EXTENDING, Fork, blocks_of

FOLDER = ["data=folder", "data.root=IMAGES", "data.val_fraction=0.25"]
SECTIONS = blocks_of(EXTENDING)


@pytest.fixture
def fork(tmp_path: Path) -> Fork:
    return Fork(tmp_path)


def test_loss_metric_and_task_of_ones_own(fork: Fork) -> None:
    for name in ("Loss", "Metrics", "Task"):
        fork.write(SECTIONS[name])
    fork.circle("--config-dir", "MYCONF", "loss=poly", "metrics=mine", "task=penalized", "monitor=val/kappa", *FOLDER)
    best = json.loads((fork.folder / "killed/summary.json").read_text())["best"]
    assert {"val/kappa", "val/margin", "val/acc1"} <= best.keys()


def test_a_lightning_module_of_ones_own(fork: Fork) -> None:
    fork.write(SECTIONS["Any LightningModule"])
    fork.circle("--config-dir", "MYCONF", "task=plain", "monitor=val/loss", *FOLDER, exact=False)


def test_class_weights_and_focal_loss(fork: Fork) -> None:
    fork.circle("loss=focal", "loss.class_weights=auto", *FOLDER)


def test_distillation(fork: Fork) -> None:
    assert fork.train("teacher", *FOLDER).returncode == 0
    fork.circle("task=distillation", f"task.teacher={fork.folder / 'teacher'}", *FOLDER)
