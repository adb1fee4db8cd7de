"""The commands as a user runs them: one run, its directory, evaluation, and two processes against one."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, command, tiny_train


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


EXACT = [
    "augment=none", "model.net.dropout=0", "model.net.norm=lrn", "trainer.precision=32-true", "test=false",
    "trainer.limit_train_batches=1.0", "trainer.accumulate_grad_batches=2", "trainer.log_every_n_steps=1",
]  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_two_processes_end_with_the_weights_of_one(shapes: Path, tmp_path: Path) -> None:
    """The same global batch, accumulated over two; validation of 21 images leaves one rank short."""
    one = tiny_train(shapes, tmp_path / "one", *EXACT)
    two = tiny_train(shapes, tmp_path / "two", *EXACT, "trainer=ddp", "trainer.devices=2")
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=0, atol=1e-5)
    first, second = summary_of(tmp_path / "one"), summary_of(tmp_path / "two")
    assert (first["world_size"], second["world_size"]) == (1, 2)
    assert second["last"]["val/acc1"] == pytest.approx(first["last"]["val/acc1"], abs=1e-9)
    assert second["last"]["val/loss"] == pytest.approx(first["last"]["val/loss"], abs=1e-4)
    assert len(list(tmp_path.glob("two/checkpoints/*.ckpt"))) == 2
    assert len(list(tmp_path.glob("two/*.log"))) == 1


def test_torchrun_shares_one_directory(shapes: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    done = command(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py", "model=alexnet_bn",
        "data=folder", f"data.root={shapes}", "data.image_size=64", "data.batch_size=8", "data.num_workers=0",
        "logger=csv", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "debug=fast", f"paths.logs={logs}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (logs / "train" / "runs").iterdir()
    assert summary_of(folder)["world_size"] == 2


def test_sweep_over_ddp_gives_each_job_its_own_values(shapes: Path, tmp_path: Path) -> None:
    done = command(
        "train.py", "-m", "model=alexnet_bn", "data=folder", f"data.root={shapes}", "data.image_size=64", "test=false",
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
        "train.py", "-m", "sweep=optuna", "model=alexnet_bn", "data=folder", f"data.root={shapes}",
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


def test_a_rank_that_fails_ends_the_run_as_failed(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    subprocess.run(["cp", "-r", f"{shapes}/.", str(tmp_path / "data")], check=True)
    (tmp_path / "data/train/arrow/0000.jpg").write_bytes(b"broken")
    done = tiny_train(
        tmp_path / "data", tmp_path / "run", "trainer=ddp_cpu", "trainer.limit_train_batches=1.0", "augment=none"
    )
    assert done.returncode == 2
    assert "0000.jpg cannot be read as an image" in done.stderr
    assert "the run has ended on all ranks" in done.stderr
    assert summary_of(tmp_path / "run")["status"] == "failed"


def test_compiled_and_plain_models_share_checkpoints(shapes: Path, tmp_path: Path) -> None:
    done = tiny_train(
        shapes, tmp_path / "c", "+compiled=1", "compile=true", "test=false", env={"TORCH_COMPILE_DISABLE": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert not any("_orig_mod" in key for key in weights(tmp_path / "c"))


def test_works_from_any_directory(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "train.py"), "--cfg", "job", "--resolve"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"root: {ROOT}/data/demo" in done.stdout
    assert list(tmp_path.iterdir()) == []
