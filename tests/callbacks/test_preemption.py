"""Signals: recorded, and acted on by all ranks at the same batch; the loader's threads do not delay it."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
from conftest import summary_of, tiny_train
from resuming import Harness

from alexlab.callbacks.preemption import Preempted, Preemption, SignalRecorder
from alexlab.engine import launcher
from alexlab.loggers.wandb_logger import WandbLogger


def test_a_signal_before_training_stops_at_once_and_later_ones_are_recorded() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with SignalRecorder().recording() as recorder:
        with pytest.raises(Preempted, match="stopped by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        recorder.is_polled, recorder.number = True, 0
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert recorder.number == signal.SIGUSR1, "the first one is the reason"
        with pytest.raises(Preempted, match="stopped by SIGINT"):  # a second Ctrl-C stops at once
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_lightnings_own_signal_handling_is_switched_off() -> None:
    """Of private methods: a version of Lightning without them is refused."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    loop = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=object()), _signal_connector=trainer._signal_connector)
    with pytest.raises(AttributeError, match=r"Lightning \S+ has no object._broadcast_sigterm_tensor: use 2.6"):
        Preemption(SignalRecorder()).install(loop)  # type: ignore[arg-type]
    Preemption(SignalRecorder()).install(trainer)
    before = signal.getsignal(signal.SIGTERM)
    trainer._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is before


def stop_when(seen: Path, text: str, number: int) -> Callable[[int], None]:
    """Send one signal to the process that is watched, once the file `seen` has `text`."""
    sent: list[int] = []

    def watch(pid: int) -> None:
        if not sent and seen.is_file() and text in seen.read_text():
            sent.append(number)
            os.kill(pid, number)

    return watch


def test_a_run_with_threads_stops_without_a_traceback(shapes: Path, tmp_path: Path) -> None:
    """test_dying_ranks.py does this with ranks."""
    run_dir, number = tmp_path / "run", signal.SIGINT
    watch = stop_when(run_dir / "train.log", "epoch 1/", number)
    done = tiny_train(shapes, run_dir, "trainer.max_epochs=5000", "data.num_workers=1", watch=watch)
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stderr
    assert summary_of(run_dir)["status"] == "preempted"
    assert summary_of(run_dir)["error"] == f"stopped by {number.name}"


@pytest.mark.parametrize("within", ["build.build_data", "summary.report_start"])
def test_a_signal_before_the_first_step_is_reported(
    within: str, harness: Harness, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before and after the run has a directory; SLURM is asked to run the job again."""

    def interrupted(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    harness.monkeypatch.setattr(f"alexlab.commands.{within}", interrupted)
    harness.monkeypatch.setattr(launcher, "requeue", lambda: "SLURM was asked")
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(SystemExit) as stopped:
        harness.train("run", "resume.run=auto", "resume.requeue=true")
    assert stopped.value.code == 128 + signal.SIGUSR1
    printed = capsys.readouterr().out
    assert "Stopped by SIGUSR1. No checkpoint was written yet: start the run again" in printed
    assert printed.endswith("SLURM was asked.\n")
    run_dir = harness.folder / "run"
    assert run_dir.exists() == (within == "summary.report_start")
    if run_dir.exists():
        assert summary_of(run_dir)["status"] == "preempted"
        assert summary_of(run_dir)["error"] == "stopped by SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_signal_while_the_ranks_start_is_reported(shapes: Path, tmp_path: Path) -> None:
    """The ranks die of it silently; their parent reports it, and asks SLURM to run the job again."""
    scontrol, asked = tmp_path / "bin/scontrol", tmp_path / "asked"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    env = {"SLURM_JOB_ID": "91", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    run_dir = tmp_path / "run"
    words = ["trainer.devices=2", "resume=auto", "resume.requeue=true"]
    watch = stop_when(run_dir / "config.yaml", "data:", signal.SIGUSR1)
    done = tiny_train(shapes, run_dir, *words, env=env, watch=watch, ranks=2)
    assert done.returncode == 128 + signal.SIGUSR1
    assert "Stopped by SIGUSR1. No checkpoint was written yet: start the run again" in done.stdout
    assert done.stdout.endswith("SLURM queued job 91 again.\n")
    assert asked.read_text() == "requeue 91\n"
    assert summary_of(run_dir)["status"] == "preempted"


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_while_the_run_is_being_closed_waits(times: int, harness: Harness) -> None:
    """The run's status is decided by then. Only a second Ctrl-C stops it."""

    def finish_interrupted(self: WandbLogger, *arguments: Any) -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        finish(self, *arguments)

    finish = WandbLogger.finish
    harness.monkeypatch.setattr(WandbLogger, "finish", finish_interrupted)
    harness.monkeypatch.setenv("WANDB_MODE", "offline")
    stops = pytest.raises(SystemExit, match=f"^{128 + signal.SIGINT}$")
    with stops if times == 2 else contextlib.nullcontext():
        harness.train("run", "logger=wandb", "trainer.max_epochs=1")
    assert summary_of(harness.folder / "run")["status"] == "finished"


def test_ranks_can_agree_after_the_last_batch() -> None:
    recorder = SignalRecorder()
    preemption, trainer = Preemption(recorder), pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    preemption.agree(trainer)
    recorder.number = signal.SIGTERM
    with pytest.raises(Preempted, match="stopped by SIGTERM"):
        preemption.agree(trainer)


def test_a_written_checkpoint_withdraws_the_wish_that_is_under_way() -> None:
    """Otherwise the ranks would write a second one a step later."""
    preemption, waited = Preemption(SignalRecorder()), []
    preemption.wants_checkpoint = True
    preemption._values[1] = 1
    preemption._pending = SimpleNamespace(wait=lambda: waited.append(True))
    preemption.checkpoint_written()
    assert (preemption.wants_checkpoint, preemption.checkpoint_due, waited) == (False, False, [True])
