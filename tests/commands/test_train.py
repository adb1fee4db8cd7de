"""What surrounds the training: the run's directory, W&B and summary.json, however the run ends."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import config_of, summary_of
from resuming import OVERRIDES, Harness, Killed, at_batch

from alexlab.commands import train
from alexlab.engine import files, launcher, run_dir
from alexlab.engine.errors import UserError
from alexlab.loggers.wandb_logger import WandbLogger


def content_of(folder: Path) -> dict[str, str]:
    """Hash the files of a run, except the log and the lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("train.log", files.RANK_LOCK)]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_a_mistake_leaves_no_directory_and_a_resumed_run_as_it_was(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that only W&B's server finds."""
    stopped = harness.stop(at_batch(3, "after"), "stopped", "logger=wandb", "logger.wandb.mode=disabled")
    before = content_of(stopped)

    def refuse(self: WandbLogger) -> None:
        raise UserError("W&B refuses the API key.")

    monkeypatch.setattr(WandbLogger, "start", refuse)
    for name in ("new", "stopped"):
        with pytest.raises(UserError, match="W&B refuses the API key"):
            harness.train(name, "resume.run=auto", "logger=wandb", "logger.wandb.mode=disabled")
    assert not (harness.folder / "new").exists()
    assert content_of(stopped) == before
    with (
        files.lock(stopped, files.RANK_LOCK),
        pytest.raises(UserError, match="is still training in another process: wait for it, or stop it first"),
    ):
        harness.train("stopped", "resume.run=auto", "logger=wandb", "logger.wandb.mode=disabled")
    assert content_of(stopped) == before


@pytest.mark.parametrize("has_started", [False, True])
def test_the_parent_marks_only_a_run_that_its_workers_have_started(
    has_started: bool, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = harness.train("run")

    def run_workers(*_: Any) -> launcher.Outcome:
        if has_started:
            os.utime(folder / "config.yaml", ns=(1, 1))
        return launcher.Outcome(2, "rank 1 found a broken image")

    monkeypatch.setattr(launcher, "run_workers", run_workers)
    words = ["resume.run=auto", "trainer.max_epochs=3", "trainer.devices=2", "resume.allow_changes=true"]
    config = config_of(*OVERRIDES, f"data.root={harness.root}", *words, run_dir=folder)
    with pytest.raises(UserError, match="rank 1 found a broken image"):
        train.train(config)
    assert summary_of(folder)["status"] == ("failed" if has_started else "finished")


@pytest.mark.parametrize("fails", ["the training", "the summary"])
def test_wandb_gets_the_status_of_the_run(fails: str, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if summary.json cannot be written."""
    ends: list[tuple[Any, ...]] = []
    finish = WandbLogger.finish

    def record(self: WandbLogger, *arguments: Any) -> None:
        ends.append(arguments)
        finish(self, *arguments)

    def full(path: Path, values: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def killed(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(WandbLogger, "finish", record)
    if fails == "the summary":
        write_json = run_dir.write_json
        monkeypatch.setattr(
            run_dir,
            "write_json",
            lambda path, values: (full if path.name == "summary.json" else write_json)(path, values),
        )
    else:
        monkeypatch.setattr(train, "test_best", killed)
    with pytest.raises(OSError if fails == "the summary" else Killed):
        harness.train("run", "logger=wandb", "logger.wandb.mode=disabled")
    assert ends == [("failed", None)]
    assert (harness.folder / "run/summary.json").exists() == (fails == "the training")
