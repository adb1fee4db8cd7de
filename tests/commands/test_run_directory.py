"""The contract of a run's directory."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import summary_of, tiny_train


@pytest.fixture(scope="module")
def run_dir(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    done = tiny_train(shapes, folder, "logger=wandb", "trainer.max_epochs=2", "trainer.log_every_n_steps=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"run directory: {folder}")
    assert "W&B: offline (WANDB_MODE=offline)" in done.stdout
    assert f"python eval.py run={folder}" in done.stdout
    wait = summary_of(folder)["data_wait"]
    assert 0 < wait < 1
    assert f"the device waited for data {wait:.0%} of the time" in done.stdout
    return folder


def test_run_directory_keeps_the_contract(run_dir: Path) -> None:
    summary = summary_of(run_dir)
    assert summary["status"] == "finished"
    keys = "status best last test checkpoints images_per_second seconds world_size parameters git versions dataset"
    assert set(summary) >= set(keys.split())
    assert summary["checkpoints"] == {"best": "checkpoints/best.ckpt", "last": "checkpoints/last.ckpt"}
    assert summary["dataset"]["images"] == {"train": 40, "val": 21, "test": 10}
    assert set(summary["test"]) == {"test/loss", "test/acc1", "test/acc5"}
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["data"]["batch_size"] == 8
    rows = list(csv.DictReader((run_dir / "metrics.csv").open()))
    columns = {"train/loss", "val/loss", "val/acc1", "val/acc5", "perf/images_per_second", "perf/data_wait"}
    assert columns <= set(rows[0])
    assert max(float(row["val/acc1"]) for row in rows if row["val/acc1"]) == pytest.approx(summary["best"]["val/acc1"])
    assert (run_dir / "train.log").read_text()
    assert not (run_dir / "figures").exists(), "with callbacks.figures=false"


def test_checkpoint_is_plain_and_whole(run_dir: Path) -> None:
    for name in ("best", "last"):
        held = torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert held["alexlab"]["classes"][0] == "arrow"
        assert held["alexlab"]["config"]["seed"] == 0
        assert not any("_orig_mod" in key for key in held["state_dict"])
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_offline_run_reads_back_with_wandbs_own_tool(run_dir: Path) -> None:
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    tool = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json", str(file)]
    env = {**os.environ, "WANDB_MODE": "offline"}
    shown = subprocess.run(tool, capture_output=True, text=True, check=True, env=env)
    for part in ("val/acc1_best", "parameters", "test/acc1", "perf/data_wait"):
        assert part in shown.stdout
