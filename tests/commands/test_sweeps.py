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
    gone = "data=folder", f"data.root={shapes},{tmp_path / 'sweep'}"  # a folder, but not one of images
    words = [*SMALL_NET, *gone, "dry_run=true", "logger=csv", f"hydra.sweep.dir={tmp_path / 'stopped'}"]
    stopped = command("train.py", "seed=0,1", "data.image_size=64", *words, "-m")
    assert stopped.returncode == 2
    assert "job 0: " in stopped.stdout
    assert "Job 1 failed" in stopped.stderr
    assert "job 2: " not in stopped.stdout


def test_wrong_values_of_all_jobs_are_told_before_the_first_one_starts(tmp_path: Path) -> None:
    """Also one that its command line alone shows, and however the words become jobs."""
    sweep = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    words = ["optimizer.lr=0.003,abc,-1", "seed=1,x", "trainer.max_epochs=0", "logger=csv", sweep]
    done = command("train.py", "-m", *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: 6 of the sweep's 6 jobs have wrong values, and none was started (sweep.keep_going=true records them as "
        "failed, and goes on):\n"
        "  all jobs: trainer.max_epochs=0: must be a whole number, at least 1, or null.\n"
        "  jobs 1, 3, 5: seed=x: must be a whole number from 0 to 4294967295.\n"
        "  jobs 2, 3: optimizer.lr=abc: must be a number above 0.\n"
        "  jobs 4, 5: optimizer.lr=-1: must be a number above 0.\n"
    )
    assert not (tmp_path / "sweep").exists()
    for command_, more, told in (
        ("train.py", ["sweep=seeds", "ema.decay=0.9,2"], "jobs 1, 3, 5, 7, 9: ema.decay=2: "),
        ("train.py", ["model.name=alexnet,vgg16"], "job 1: model.name=vgg16: model=alexnet would be called so"),
        ("train.py", ["seed=0,-1", "hydra.sweeper.max_batch_size=1"], "1 of the sweep's 2 jobs"),
        ("eval.py", ["run=x", "crops=1,3"], "job 1: crops=3: must be one of 1, 10."),
        ("train.py", [f"seed={','.join('x' + str(n) for n in range(20))}"], "... and 8 more mistakes"),
    ):
        done = command(command_, "-m", *more, sweep)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert told in done.stderr


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
    before = sorted((logs / "train/multiruns").iterdir())
    done = command(*words, "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "dry_run=true shows the first job alone" in done.stdout
    assert sorted((logs / "train/multiruns").iterdir()) == before, "it leaves no folder"
    done = command(*words, "trainer.limit_val_batches=0")
    assert done.returncode == 2
    assert "nothing to optimize: the job has not measured val/acc1" in done.stderr


def test_a_sweep_that_is_only_shown_leaves_nothing(shapes: Path, tmp_path: Path) -> None:
    """No folder, and no hint of one."""
    words = [*SMALL_NET, "data=folder", f"data.root={shapes}", "data.image_size=64", "logger=csv", "trainer=cpu"]
    sweep = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    done = command("train.py", "-m", *words, "seed=0,1", "dry_run=true", sweep)
    assert done.returncode == 0, done.stderr
    assert "job 1: " in done.stdout
    assert "compare" not in done.stdout
    assert not (tmp_path / "sweep").exists()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/notes.txt").write_text("mine")
    command("train.py", "-m", *words, "seed=0,1", "dry_run=true", sweep)
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"notes.txt"}
    (tmp_path / "sweep/multirun.yaml").write_text("mine")
    deep = "hydra.sweep.subdir=a/${hydra.job.num}/b"
    done = command("train.py", "-m", *words, "seed=0,x", "dry_run=true", "sweep.keep_going=true", sweep, deep)
    assert done.returncode == 1, done.stderr
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"notes.txt", "multirun.yaml"}
    assert (tmp_path / "sweep/multirun.yaml").read_text() == "mine"


def test_a_key_that_a_group_lacks_is_no_group(tmp_path: Path) -> None:
    done = command("train.py", "-m", "sweep=seeds", "sweep.n=2", f"paths.logs={tmp_path}")
    assert done.returncode == 2
    assert "sweep.n: there is no such key. Did you mean sweep.keep_going?" in done.stderr
    done = command("train.py", "-m", "seed=1,2", "hydra.sweeper.max_batch_size=x", f"paths.logs={tmp_path}")
    assert done.returncode == 2
    assert done.stderr == "error: hydra.sweeper.max_batch_size=x: must be a whole number.\n"
