"""Signals: recorded, and acted on by all ranks at the same batch; the loader's threads do not delay it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
from conftest import clean_env, summary_of, tiny_train
from resuming import Harness

from alexlab.callbacks.preemption import MAX_BATCHES_APART, Preemption
from alexlab.engine import launcher
from alexlab.engine.signals import Preempted, SignalRecorder
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
    asked, env = asking(tmp_path)
    run_dir = tmp_path / "run"
    words = ["trainer.devices=2", "resume=auto", "resume.requeue=true"]
    watch = stop_when(run_dir / "config.yaml", "data:", signal.SIGUSR1)
    done = tiny_train(shapes, run_dir, *words, env=env, watch=watch, ranks=2)
    assert done.returncode == 128 + signal.SIGUSR1
    assert "Stopped by SIGUSR1. No checkpoint was written yet: start the run again" in done.stdout
    assert done.stdout.endswith("SLURM queued job 91 again.\n")
    assert asked.read_text().startswith("requeue 91\n")
    assert summary_of(run_dir)["status"] == "preempted"


OF_RANKS = """
import json, signal, torch.distributed as dist
from types import SimpleNamespace
from alexlab.callbacks.preemption import Preemption
from alexlab.engine.ranks import meet
from alexlab.engine.signals import SignalRecorder
ranks, trainer = meet(1), SimpleNamespace(world_size=2)
dist.init_process_group("gloo")
real, calls = dist.all_reduce, []
dist.all_reduce = lambda *words, **more: calls.append(batch) or real(*words, **more)
preemption = Preemption(SignalRecorder(), ranks)
preemption.setup(trainer, None, "fit")
batch = 0
while not preemption.stop:
    batch += 1
    if batch == 500 and ranks.rank == 1:
        preemption.recorder.number = signal.SIGUSR1
    preemption.on_train_batch_end(trainer)
print(json.dumps([batch, preemption.stop, calls]))
"""


def test_ranks_with_fast_batches_compare_rarely_and_stop_at_the_same_one() -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launcher.free_port(None))}
    running = [
        subprocess.Popen([sys.executable, "-c", OF_RANKS], env=clean_env({**shared, "RANK": str(rank)}), stdout=-1)
        for rank in range(2)
    ]
    first, second = (json.loads(process.communicate(timeout=120)[0]) for process in running)
    assert first == second
    batch, stop, calls = first
    assert stop == signal.SIGUSR1
    assert 500 < batch <= 500 + 2 * MAX_BATCHES_APART
    assert len(calls) <= 500 / MAX_BATCHES_APART + 10, "after a start in which the interval doubles"


IMPORTING = """
import contextlib, os, signal
import alexlab.commands.cli as cli
real = cli.importing

@contextlib.contextmanager
def importing():
    with real():
        os.kill(os.getpid(), signal.SIGUSR1)
        try:
            1 / 0  # code that is imported may swallow what a handler raises
        except BaseException:
            yield

cli.importing = importing
"""


def asking(folder: Path) -> tuple[Path, dict[str, str]]:
    """Return the file in which an `scontrol` writes what it is asked, and summary.json then; and the environment."""
    scontrol, asked = folder / "bin/scontrol", folder / "asked"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\ncat {folder}/run/summary.json >> {asked} 2>&1\nexit 0\n')
    scontrol.chmod(0o755)
    return asked, {"SLURM_JOB_ID": "91", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}


@pytest.mark.parametrize("requeue", ["true", "false"])
def test_a_signal_while_torch_is_imported_is_reported(requeue: str, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "before.py").write_text(IMPORTING)
    asked, env = asking(tmp_path)
    words = ["resume=auto", f"resume.requeue={requeue}"]
    done = tiny_train(shapes, tmp_path / "run", *words, env=env, before=tmp_path / "before.py")
    assert done.returncode == 128 + signal.SIGUSR1
    assert "Stopped by SIGUSR1 while no run was training." in done.stdout
    assert ("SLURM queued job 91 again." in done.stdout) == asked.exists() == (requeue == "true")
    assert not (tmp_path / "run").exists()


def test_slurm_is_asked_when_everything_is_written(shapes: Path, tmp_path: Path) -> None:
    """It sends SIGTERM at once."""
    asked, env = asking(tmp_path)
    words = ["trainer.max_epochs=5000", "data.num_workers=1", "resume=auto", "resume.requeue=true"]
    watch = stop_when(tmp_path / "run/train.log", "epoch 1/", signal.SIGUSR1)
    done = tiny_train(shapes, tmp_path / "run", *words, env=env, watch=watch)
    assert done.returncode == 128 + signal.SIGUSR1, done.stderr
    assert asked.read_text().startswith("requeue 91\n{")
    assert '"status": "preempted"' in asked.read_text()
    assert done.stdout.endswith("SLURM queued job 91 again.\n")


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


def test_an_epoch_whose_end_a_signal_stops_has_its_line_once(harness: Harness) -> None:
    """Ranks may read that one of them received a signal when the last.ckpt of a whole epoch was written."""

    def received(self: Preemption) -> None:
        written(self)
        if not stopped:
            stopped.append(True)
            self.stop = signal.SIGTERM

    stopped: list[bool] = []
    written = Preemption.checkpoint_written
    words = ["trainer.max_epochs=3", "checkpoint.every_n_steps=null", "resume.run=auto"]
    harness.monkeypatch.setattr(Preemption, "checkpoint_written", received)
    with pytest.raises(SystemExit, match=f"^{128 + signal.SIGTERM}$"):
        harness.train("run", *words)
    assert epochs_in(harness.folder / "run") == ["1/3"]
    assert epochs_in(harness.train("run", *words)) == ["1/3", "2/3", "3/3"]


def epochs_in(run: Path) -> list[str]:
    """Return the epochs that train.log has a line of."""
    return re.findall(r"epoch (\d+/\d+) \|", (run / "train.log").read_text())


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
