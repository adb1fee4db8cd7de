"""Signals: a note, looked at by all ranks at the same batch; threads of the loader do not hold it up."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
from conftest import ROOT, TINY, clean_env, summary_of
from resuming import Harness
from test_configs import compose

from alexlab.callbacks.preemption import Notes, Preempted, Preemption
from alexlab.commands import train as run
from alexlab.engine import launcher as launch
from alexlab.loggers.wandb_logger import WandbLogger


def test_a_signal_before_training_ends_at_once_and_later_ones_are_noted() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Notes().taken() as notes:
        with pytest.raises(Preempted, match="ended by SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        notes.looked_at, notes.number = True, 0
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert notes.number == signal.SIGUSR1, "the first one tells why"
        with pytest.raises(Preempted, match="ended by SIGINT"):  # a second Ctrl-C does not wait
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_taken_out_of_lightning_is_still_there() -> None:
    """Both are Lightning's own affairs, and may move with a new version."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert callable(trainer._signal_connector.register_signal_handlers)
    assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    Preemption(Notes()).install(trainer)
    before = signal.getsignal(signal.SIGTERM)
    trainer._signal_connector.register_signal_handlers()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("number", "devices", "whom"),
    [(signal.SIGTERM, 1, "all"), (signal.SIGINT, 1, "all"), (signal.SIGUSR1, 2, "rank 1"), (signal.SIGINT, 2, "all")],
)
def test_a_run_with_threads_ends_quietly(
    number: signal.Signals, devices: int, whom: str, shapes: Path, tmp_path: Path
) -> None:
    """To the whole process group, as a terminal or a scheduler sends it; or to one rank of two."""
    words = [
        "train.py", *TINY, "data=folder", f"data.root={shapes}", "data.batch_size=8", "trainer.max_epochs=5000",
        "data.num_workers=1", f"hydra.run.dir={tmp_path / 'run'}", f"trainer.devices={devices}",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    if whom == "all":
        os.killpg(process.pid, number)
    else:
        shown = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
        pairs = [tuple(map(int, row.split())) for row in shown.splitlines()[1:]]
        os.kill(max(pid for pid, parent in pairs if parent == process.pid), number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert summary_of(tmp_path / "run")["status"] == "preempted"
    assert summary_of(tmp_path / "run")["error"] == f"ended by {number.name}"


@pytest.mark.parametrize("within", ["build_data", "fit_rank"])
def test_a_signal_before_the_first_step_is_told(
    within: str, harness: Harness, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the run has a directory, and after; a job of SLURM is asked for again."""

    def struck(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(run, within, struck)
    monkeypatch.setattr(launch, "requeue", lambda: "SLURM was asked")
    before = signal.getsignal(signal.SIGUSR1)
    with pytest.raises(SystemExit) as ended:
        harness.train("run", "resume.run=auto", "resume.requeue=true")
    assert ended.value.code == 128 + signal.SIGUSR1
    told = capsys.readouterr().out
    assert "ended by SIGUSR1. No checkpoint was written yet to go on from: start it anew" in told
    assert told.endswith("SLURM was asked.\n")
    run_dir = harness.folder / "run"
    assert run_dir.exists() == (within == "fit_rank")
    if run_dir.exists():
        assert summary_of(run_dir) == {"status": "preempted", "error": "ended by SIGUSR1"}
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_signal_while_ranks_import_is_told(shapes: Path, tmp_path: Path) -> None:
    """They die of it without a word; the command tells, and asks SLURM for the job again."""
    scontrol, asked = tmp_path / "bin/scontrol", tmp_path / "asked"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    env = clean_env({"SLURM_JOB_ID": "91", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"})
    words = [
        "train.py", *TINY, "data=folder", f"data.root={shapes}", "data.batch_size=8", "trainer.devices=2",
        "resume=auto", "resume.requeue=true", f"hydra.run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("run directory:"):
            break
    process.send_signal(signal.SIGUSR1)
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGUSR1
    assert told.startswith("ended by SIGUSR1. No checkpoint was written yet to go on from: start it anew")
    assert told.endswith("SLURM was asked for job 91 again.\n")
    assert asked.read_text() == "requeue 91\n"
    assert summary_of(tmp_path / "run")["status"] == "preempted"


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_while_the_run_is_closed_waits(
    times: int, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How the run ended is settled by then; a second Ctrl-C ends it all the same."""

    def interrupted(self: WandbLogger, *told: Any) -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        finish(self, *told)

    finish = WandbLogger.finish
    monkeypatch.setattr(WandbLogger, "finish", interrupted)
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = [word for word in TINY if word != "logger=csv"]
    composed = compose(*words, "data=folder", f"data.root={shapes}", "data.batch_size=8", "debug=fast")
    composed.run_dir = str(tmp_path / "run")
    if times == 1:
        run.fit(composed)
    else:
        with pytest.raises(SystemExit) as ended:
            run.fit(composed)
        assert ended.value.code == 128 + signal.SIGINT
    assert summary_of(tmp_path / "run")["status"] == "finished"


def test_ranks_agree_also_where_no_batch_follows() -> None:
    notes = Notes()
    preemption, trainer = Preemption(notes), pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    preemption.agree(trainer)
    notes.number = signal.SIGTERM
    with pytest.raises(Preempted, match="ended by SIGTERM"):
        preemption.agree(trainer)


def test_a_checkpoint_answers_the_question_that_is_on_its_way() -> None:
    """Else ranks would write a second one a step later."""
    preemption, waited = Preemption(Notes()), []
    preemption.wish = 1
    preemption.numbers[1] = 1
    preemption.asked = SimpleNamespace(wait=lambda: waited.append(True))
    preemption.grant()
    assert (preemption.wish, preemption.wished, preemption.asked, waited) == (0, 0, None, [True])
