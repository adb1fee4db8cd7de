"""Sweeps: each job on all its ranks with its own values."""

import contextlib
import json
import re
import sqlite3
from pathlib import Path

import yaml
from conftest import SMALL_NET, command, summary_of


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
    for job in ("1", "3"):  # failed before a rank could say so
        assert summary_of(tmp_path / "sweep" / job)["status"] == "failed"
        assert (tmp_path / "sweep" / job / "config.yaml").is_file()
    jobs = {job: summary_of(tmp_path / "sweep" / job) for job in ("0", "2")}
    assert {job: found["world_size"] for job, found in jobs.items()} == {"0": 2, "2": 1}
    assert all(found["effective_lr"] == 0.5 for found in jobs.values())
    config = yaml.safe_load((tmp_path / "sweep/0/config.yaml").read_text())
    assert config["choices"]["trainer"] == "ddp"
    assert "sweep" not in config["choices"]
    stopped = command("train.py", "optimizer.lr=-1,-2", "-m", f"hydra.sweep.dir={tmp_path / 'stopped'}", "logger=csv")
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
    hint = re.search(r"^compare its jobs: python (compare.py runs=.*)$", done.stdout, re.M)
    assert hint is not None
    table = command(*hint[1].split())
    assert "2 runs" in table.stdout, table.stderr
    assert jobs[0].parents[1].name in table.stdout


def test_each_optuna_sweep_is_a_study_of_its_own(shapes: Path, tmp_path: Path) -> None:
    """Also of another metric, in a folder of logs that is not there yet; unless one is named to go on with."""
    logs = tmp_path / "new" / "logs"
    words = [
        "train.py", "-m", "sweep=optuna", *SMALL_NET, "data=folder", f"data.root={shapes}", "data.image_size=64",
        "test=false", "data.batch_size=8", "data.num_workers=0", "logger=none", "trainer=cpu", "debug=fast",
        "hydra.sweeper.n_trials=1", f"paths.logs={logs}",
    ]  # fmt: skip
    named = "hydra.sweeper.study_name=mine"
    for more in ([named], ["monitor=val/loss"], [named, "hydra.sweeper.n_trials=2"]):
        done = command(*words, *more)
        assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(logs / "optuna.db")) as database:
        counts = database.execute(
            "select study_name, count(*) from studies join trials using (study_id) group by 1 order by 2"
        ).fetchall()
    assert [count for _, count in counts] == [1, 2]
    assert counts[1][0] == "mine"
    done = command(*words, "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "dry_run=true shows the first job alone" in done.stdout
    done = command(*words, "trainer.limit_val_batches=0")
    assert done.returncode == 2
    assert "nothing to optimize: the job has not measured val/acc1" in done.stderr
