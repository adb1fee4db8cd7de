"""The commands as a user runs them: one run, its directory, evaluation, and two processes against one."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, SMALL_NET, command, tiny_train


@pytest.fixture(scope="module")
def run_dir(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    done = tiny_train(shapes, folder, "logger=wandb", "trainer.max_epochs=2", "trainer.log_every_n_steps=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"run directory: {folder}")
    assert "W&B: offline (WANDB_MODE=offline)" in done.stdout
    assert f"python eval.py run={folder}" in done.stdout
    return folder


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_run_directory_keeps_the_contract(run_dir: Path) -> None:
    summary = summary_of(run_dir)
    assert summary["status"] == "finished"
    assert set(summary) >= {
        "status", "best", "last", "test", "checkpoints", "images_per_second", "seconds", "world_size", "parameters",
        "git", "versions", "dataset",
    }  # fmt: skip
    assert summary["checkpoints"] == {"best": "checkpoints/best.ckpt", "last": "checkpoints/last.ckpt"}
    assert summary["dataset"]["images"] == {"train": 40, "val": 21, "test": 10}
    assert set(summary["test"]) == {"test/loss", "test/acc1", "test/acc5"}
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["data"]["batch_size"] == 8
    rows = list(csv.DictReader((run_dir / "metrics.csv").open()))
    assert {"train/loss", "val/loss", "val/acc1", "val/acc5", "perf/images_per_second", "perf/data_wait"} <= set(
        rows[0]
    )
    assert max(float(row["val/acc1"]) for row in rows if row["val/acc1"]) == pytest.approx(summary["best"]["val/acc1"])
    assert (run_dir / "train.log").read_text()


def test_checkpoint_is_plain_and_whole(run_dir: Path) -> None:
    for name in ("best", "last"):
        held = torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert held["alexlab"]["classes"][0] == "arrow"
        assert held["alexlab"]["config"]["seed"] == 0
        assert not any("_orig_mod" in key for key in held["state_dict"])
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_eval_gives_the_same_numbers_as_training(run_dir: Path) -> None:
    done = command("eval.py", f"run={run_dir}", f"paths.logs={run_dir}/eval")
    assert done.returncode == 0, done.stderr
    found, trained = json.loads((run_dir / "eval.json").read_text()), summary_of(run_dir)["test"]
    assert {f"test/{k}": found[k] for k in ("loss", "acc1", "acc5")} == trained
    assert found["images"] == 10
    assert len(found["per_class_acc1"]) == 10


def test_offline_run_reads_back_with_wandbs_own_tool(run_dir: Path) -> None:
    (file,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    tool = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json", str(file)]
    shown = subprocess.run(
        tool, capture_output=True, text=True, check=True, env={**os.environ, "WANDB_MODE": "offline"}
    )
    for part in ("val/acc1_best", "parameters", "test/acc1", "perf/data_wait"):
        assert part in shown.stdout


def test_goes_on_from_a_checkpoint(run_dir: Path, shapes: Path, tmp_path: Path) -> None:
    last = run_dir / "checkpoints/last.ckpt"
    done = tiny_train(shapes, tmp_path / "more", f"ckpt_path={last}", "trainer.max_epochs=3")
    assert done.returncode == 0, done.stderr
    assert "epoch 3/3" in done.stdout
    assert "epoch 2/3" not in done.stdout
    assert summary_of(tmp_path / "more")["best"]["val/acc1"] >= summary_of(run_dir)["best"]["val/acc1"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_sweep_over_ddp_gives_each_job_its_own_values(shapes: Path, tmp_path: Path) -> None:
    done = command(
        "train.py", "-m", *SMALL_NET, "data=folder", f"data.root={shapes}", "data.image_size=64", "test=false",
        "data.batch_size=8", "data.num_workers=0", "logger=csv", "trainer=ddp", "trainer.accelerator=cpu",
        "trainer.devices=2,1", "debug=fast", "optimizer.lr=0.5,-1", "sweep.keep_going=true",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "2 job(s) of the sweep failed" in done.stderr
    assert "optimizer.lr=-1: must be a number above 0" in done.stderr
    jobs = {job: summary_of(tmp_path / "sweep" / job) for job in ("0", "2")}
    assert {job: found["world_size"] for job, found in jobs.items()} == {"0": 2, "2": 1}
    assert all(found["effective_lr"] == 0.5 for found in jobs.values())
    stopped = command("train.py", "-m", "optimizer.lr=-1,-2", f"hydra.sweep.dir={tmp_path / 'stopped'}", "logger=csv")
    assert stopped.returncode == 2
    assert "Job 0 failed" in stopped.stderr
    assert not (tmp_path / "stopped" / "1").exists()


def test_optuna_drives_ddp_jobs(shapes: Path, tmp_path: Path) -> None:
    done = command(
        "train.py", "-m", "sweep=optuna", *SMALL_NET, "data=folder", f"data.root={shapes}",
        "data.image_size=64", "test=false",
        "data.batch_size=8", "data.num_workers=0", "logger=csv", "trainer=ddp_cpu", "debug=fast",
        "hydra.sweeper.n_trials=2", f"paths.logs={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    jobs = sorted(tmp_path.glob("train/multiruns/*/*/summary.json"))
    found = [json.loads(path.read_text()) for path in jobs]
    assert [f["world_size"] for f in found] == [2, 2]
    for path, summary in zip(jobs, found, strict=True):
        config = yaml.safe_load((path.parent / "config.yaml").read_text())
        assert summary["effective_lr"] == config["optimizer"]["lr"]
    assert len({f["effective_lr"] for f in found}) == 2
    assert (tmp_path / "optuna.db").is_file()


def test_average_of_the_weights_is_what_is_kept_and_evaluated(shapes: Path, tmp_path: Path) -> None:
    """Also: labels smoothed, gradients clipped, a scaled rate, and the bar of a terminal."""
    done = tiny_train(
        shapes, tmp_path / "ema", "ema.decay=0.5", "label_smoothing=0.1", "trainer.gradient_clip_val=1",
        "optimizer.lr_reference_batch=16", "callbacks.progress=rich", "trainer.log_every_n_steps=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stdout
    assert "effective learning rate 0.0025" in done.stdout
    summary = summary_of(tmp_path / "ema")
    assert summary["effective_lr"] == 0.0025
    held = torch.load(tmp_path / "ema/checkpoints/last.ckpt", weights_only=True)
    averaged, current = held["state_dict"], held["current_model_state"]
    assert not torch.equal(averaged["net.fc.weight"], current["net.fc.weight"])
    assert command("eval.py", f"run={tmp_path / 'ema'}", "ckpt=last", f"paths.logs={tmp_path}").returncode == 0
    found = json.loads((tmp_path / "ema/eval.json").read_text())
    assert found["acc1"] == pytest.approx(summary["test"]["test/acc1"])


def test_compiled_and_plain_models_share_checkpoints(shapes: Path, tmp_path: Path) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    words = [
        "model=alexnet",
        "model.net.norm=none",
        "model.name=alexnet",
        "trainer.limit_train_batches=1",
        "test=false",
    ]
    done = tiny_train(shapes, tmp_path / "c", "compile=true", *words)
    assert done.returncode == 0, done.stderr
    assert not any("_orig_mod" in key for key in weights(tmp_path / "c"))
    last = tmp_path / "c/checkpoints/last.ckpt"
    done = tiny_train(shapes, tmp_path / "p", f"ckpt_path={last}", "trainer.max_epochs=2", *words)
    assert done.returncode == 0, done.stderr
    last = tmp_path / "p/checkpoints/last.ckpt"
    done = tiny_train(shapes, tmp_path / "c2", "compile=true", f"ckpt_path={last}", "trainer.max_epochs=3", *words)
    assert done.returncode == 0, done.stderr


def test_overfitting_three_batches_works(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(
        shapes, tmp_path / "o", "model=alexnet", "model.name=alexnet", "debug=overfit", "trainer.max_epochs=12",
        "test=false", "trainer.limit_train_batches=1.0", "data.batch_size=4", "model.net.dropout=0",
        "trainer.check_val_every_n_epoch=12",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [
        float(row["train/loss"]) for row in csv.DictReader((tmp_path / "o/metrics.csv").open()) if row["train/loss"]
    ]
    assert losses[-1] < 0.5 * losses[0]


def test_dry_run_says_what_would_run_and_stops(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(shapes, tmp_path / "dry", "dry_run=true", "trainer=ddp_cpu", "trainer.accumulate_grad_batches=2")
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    for part in (
        "8 (4 a device)",
        "2 x cpu",
        "learning rate",
        "0.005",
        "parameters",
        "checkpoint",
        "images an optimizer step",
    ):
        assert part in shown
    assert not (tmp_path / "dry").exists()


def test_readable_names_and_broken_images_left_out(shapes: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(shapes, root)
    broken = root / "train/ring/0000.jpg"
    broken.write_bytes(b"broken")
    (tmp_path / "names.tsv").write_text("ring\tgolden ring\n")
    done = tiny_train(
        root, tmp_path / "run", "data.on_error=skip", f"data.class_names={tmp_path}/names.tsv",
        "trainer.limit_train_batches=1.0", "data.num_workers=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert summary_of(tmp_path / "run")["skipped_images"] == [str(broken)]
    assert command("eval.py", f"run={tmp_path / 'run'}", f"paths.logs={tmp_path}").returncode == 0
    names = json.loads((tmp_path / "run/eval.json").read_text())["per_class_acc1"]
    assert "golden ring" in names
    assert "ring" not in names


def test_works_from_any_directory(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "train.py"), "--cfg", "job", "--resolve"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"root: {ROOT}/data/demo" in done.stdout
    assert list(tmp_path.iterdir()) == []
