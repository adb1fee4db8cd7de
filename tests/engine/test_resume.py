"""resume= without training: the config to continue with, the checkpoint, and the directory at that checkpoint."""

import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import composed
from resuming import composed_once

from alexlab.engine import config as configs
from alexlab.engine import files, resume
from alexlab.engine.errors import UserError, counted

WORDS = ["data=folder", "data.root=/photos", "model=alexnet_bn", "optimizer.lr=0.25", "trainer.max_epochs=3"]


def save_checkpoint(path: Path, best: float = 0.5, rows: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"best": {"val/acc1": best}, "place": {"rows": rows}, "config": {"monitor": "val/acc1"}}
    torch.save({"state_dict": {}, "alexlab": about}, path)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "train/runs/then"
    save_checkpoint(folder / "checkpoints/last.ckpt")
    configs.save({**composed_once(*WORDS), "run_dir": str(folder)}, folder / "config.yaml")
    return folder


def resumed(run_dir: Path, *words: str, named: str | None = None) -> resume.Resumed:
    return resume.resume_config(composed(f"resume.run={named or run_dir}", *words))


def test_the_runs_config_counts_with_the_overrides_that_may_change(run_dir: Path) -> None:
    before = yaml.safe_load((run_dir / "config.yaml").read_text())
    found = resumed(run_dir, "trainer={max_epochs:9,timeout:5}", "data.num_workers=3", "optimizer.lr=0.25")
    assert (found.run_dir, found.ckpt_path) == (run_dir, run_dir / "checkpoints/last.ckpt")
    assert (found.resumes, found.finished) == (True, False)
    config, trainer = found.config, found.config["trainer"]
    assert (trainer["max_epochs"], trainer["timeout"], config["data"]["num_workers"]) == (9, 5, 3)
    assert trainer["precision"] == before["trainer"]["precision"], "only the given keys of a mapping change"
    assert config["model"] == before["model"]
    moved = resumed(run_dir, "data.root=/moved").config["data"]["root"]
    assert moved == "/moved", "the images have a fingerprint, which is compared later"
    assert (config["run_dir"], config["ckpt_path"]) == (str(run_dir), str(found.ckpt_path))
    assert config["overrides"] == [*WORDS, "trainer={max_epochs:9,timeout:5}", "data.num_workers=3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("optimizer.lr=0.5", "different settings: optimizer.lr=0.5 (the run has 0.25). Remove these overrides. To"),
        (
            "seed=1 compile=true",
            "seed=1 (the run has 0), compile=true (the run has false). Remove these overrides. To",
        ),
        ("compile=true", "(the run has false). Remove these overrides, or add resume.allow_changes=true. To"),
        ("+my.note=x", "+my.note=x (the run has none)"),
        ("~trainer.tf32", "~trainer.tf32 (the run has true)"),
        ("model=alexnet", "model=alexnet: a resumed run keeps its options (model=alexnet_bn). Give single keys"),
        ("callbacks=[early_stopping,grad_norm]", "a resumed run keeps its options (callbacks=default)"),
        ("init_from=x", "init_from=x: a resumed run continues from the newest checkpoint: remove the key"),
    ],
)
def test_overrides_that_would_change_the_run_are_refused(words: str, message: str, run_dir: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        resumed(run_dir, *words.split())


def test_changes_can_be_allowed(run_dir: Path) -> None:
    found = resumed(run_dir, "resume.allow_changes=true", "compile=true", "~trainer.tf32", "model=alexnet_bn")
    assert found.config["compile"] is True
    assert "tf32" not in found.config["trainer"]


def test_a_run_of_an_older_version_gets_top_level_keys_that_it_lacks(run_dir: Path) -> None:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    del config["finetune"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    assert resumed(run_dir).config["finetune"] == {"freeze_epochs": 0, "backbone_lr_factor": 1.0}


def test_a_config_that_is_incomplete_is_refused(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"config.yaml is not a run's config: it has no `model`"):
        resumed(run_dir)


def test_callbacks_get_a_secret_only_if_it_is_given_again(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["callbacks"]["mine"] = {"_target_": "alexlab.callbacks.mine.Mine", "token": "${oc.env:MY_TOKEN}"}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r"callbacks.mine.token of \S+ refers to the environment, .*repeat the setting"):
        resumed(run_dir)
    found = resumed(run_dir, "+callbacks.mine.token=${oc.env:MY_TOKEN}")
    assert found.config["callbacks"]["mine"]["token"] in ("hunter2hunter2", "${oc.env:MY_TOKEN}")


def test_auto_starts_a_new_run_or_one_from_scratch_or_says_that_it_is_finished(run_dir: Path) -> None:
    def auto(folder: Path, *words: str) -> resume.Resumed:
        return resume.resume_config(composed("resume.run=auto", *words, run_dir=folder))

    new = auto(run_dir.with_name("new"))
    assert (new.resumes, new.ckpt_path, len(new.notes)) == (False, None, 1)
    assert new.config["model"]["name"] == "alexnet", "today's config"
    files.write_csv(run_dir / "metrics.csv", ["step"], [{"step": "1"}])
    (run_dir / "summary.json").write_text('{"status": "finished"}')
    found = auto(run_dir)
    assert (found.finished, found.notes) == (True, [f"resume=auto: {run_dir} is finished."])
    assert not auto(run_dir, "trainer.max_epochs=9").finished
    with pytest.raises(UserError, match=r"is finished. Give a trainer.max_epochs above 3 to train it longer"):
        resumed(run_dir)
    (run_dir / "checkpoints/last.ckpt").unlink()
    assert auto(run_dir).finished, "it is not started again"
    (run_dir / "summary.json").write_text('{"status": "preempted"}')
    scratch = auto(run_dir)
    assert (scratch.ckpt_path, scratch.resumes) == (None, True)
    assert "has no checkpoint yet: it starts again from scratch." in scratch.notes[0]
    with pytest.raises(UserError, match="has no checkpoint to resume from: start it again from scratch, or use res"):
        resumed(run_dir)


def test_an_older_run_never_resumes_in_place_of_the_latest(run_dir: Path) -> None:
    newer = run_dir.with_name("newer")
    newer.mkdir()
    (newer / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    os.utime(run_dir / "config.yaml", (0, 0))
    with pytest.raises(UserError, match=r"resume=latest: .*newer has no checkpoint to resume from: start it again fr"):
        resumed(run_dir, f"paths.logs={run_dir.parents[2]}", named="latest")


def test_the_directory_is_reset_to_its_checkpoint(run_dir: Path) -> None:
    rows = [{"step": str(step)} for step in range(5)]
    last, best = (run_dir / f"checkpoints/{name}.ckpt" for name in ("last", "best"))
    for own, left in ((True, 2), (False, 0)):
        files.write_csv(run_dir / "metrics.csv", ["step"], rows)
        (run_dir / "summary.json").write_text("{}")
        (run_dir / "checkpoints/.last.ckpt.7.tmp").write_text("half")
        save_checkpoint(best, best=0.5)
        path = last if own else run_dir.with_name("other") / "last.ckpt"
        (line,) = resume.reset_directory(run_dir, path)
        assert line == f"run directory: {run_dir}, resumed (computed again: {counted(5 - left, 'row')} of metrics.csv)"
        assert files.read_csv(run_dir / "metrics.csv") == (["step"], rows[:left])
        assert not (run_dir / "summary.json").exists()
        assert (run_dir / "summary.before.json").is_file()
        assert sorted(each.name for each in last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    save_checkpoint(best, best=0.75)
    lines = resume.reset_directory(run_dir, last)
    assert lines[0].startswith(f"removed {best}: it was of later steps than the checkpoint")
    assert not best.exists()


def test_jobs_of_a_sweep_start_from_the_same_run(run_dir: Path, tmp_path: Path) -> None:
    logs, sweep = run_dir.parents[2], run_dir.parents[1] / "multiruns/s"
    save_checkpoint(sweep / "0/checkpoints/last.ckpt")
    (sweep / "0/config.yaml").write_text("{}")
    job = resume.find_ckpt("latest", "init_from", "last", logs, sweep / "1")
    assert job == run_dir / "checkpoints/last.ckpt"
    alone = resume.find_ckpt("latest", "init_from", "last", logs, tmp_path / "runs/x")
    assert alone == sweep / "0/checkpoints/last.ckpt"
    assert resume.find_ckpt("/none.ckpt", "init_from", "last", logs, tmp_path) == Path("/none.ckpt")


def test_a_checkpoint_is_named_by_its_run_or_by_its_file(run_dir: Path, tmp_path: Path) -> None:
    last, logs = run_dir / "checkpoints/last.ckpt", run_dir.parents[2]
    for named in ("latest", str(run_dir), "then", str(last)):
        assert resume.find_ckpt(named, "ckpt_path", "last", logs, tmp_path / "runs/x") == last
    with pytest.raises(UserError, match="`ckpt_path=two` is not a run's directory"):
        resume.find_ckpt("two", "ckpt_path", "last", logs, tmp_path)
    with pytest.raises(UserError, match="`init_from=latest`: no run exists below"):
        resume.find_ckpt("latest", "init_from", "best", tmp_path / "none", tmp_path)


def test_a_lock_is_held_by_one_process(tmp_path: Path) -> None:
    with files.lock(tmp_path), pytest.raises(UserError, match="is still training in another process: wait for it"):
        files.lock(tmp_path).__enter__()
    with files.lock(tmp_path):
        pass


def owned(folder: Path, **owner: Any) -> None:
    values = {"host": "n1", "process": 7, "since": "2026-11-29 12:00", "job": None, **owner}
    (folder / ".lock.owner").write_text(json.dumps(values))


def test_another_machine_is_refused_with_owner_and_age(tmp_path: Path) -> None:
    owned(tmp_path)
    (tmp_path / "metrics.csv").touch()
    os.utime(tmp_path / ".lock.owner", (0, 0))
    os.utime(tmp_path / "metrics.csv", (time.time() - 3 * 60, time.time() - 3 * 60))
    expected = (
        rf"{tmp_path} is still training on n1 \(process 7 since 2026-11-29 12:00; it wrote something 3 minutes ago\): "
        "wait for it, or stop it on that machine. If that process is gone, add resume.break_lock=true."
    )
    with pytest.raises(UserError, match=expected):
        files.lock_against_machines(tmp_path, "slurm 5").__enter__()
    assert json.loads((tmp_path / ".lock.owner").read_text())["host"] == "n1"
    with files.lock_against_machines(tmp_path, None, breaks=True):
        assert json.loads((tmp_path / ".lock.owner").read_text())["process"] == os.getpid()
    assert not (tmp_path / ".lock.owner").exists()


@pytest.mark.parametrize("owner", [{"host": socket.gethostname()}, {"job": "slurm 5"}])
def test_a_killed_owner_on_this_machine_or_of_this_job_is_replaced(owner: dict[str, str], tmp_path: Path) -> None:
    owned(tmp_path, **owner)
    with files.lock_against_machines(tmp_path, "slurm 5"):
        pass
    assert not (tmp_path / ".lock.owner").exists()


def test_a_run_that_another_machine_has_taken_over_leaves_its_lock(tmp_path: Path) -> None:
    with files.lock_against_machines(tmp_path, None):
        owned(tmp_path, host="n2")
    assert json.loads((tmp_path / ".lock.owner").read_text())["host"] == "n2"
    (tmp_path / ".lock.owner").write_text("half")
    with pytest.raises(UserError, match=r"is still training on \?"):
        files.lock_against_machines(tmp_path, None).__enter__()
