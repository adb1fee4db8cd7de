"""Ranks that are killed or freeze while they train, under both launchers: the others stop, with one message."""

import contextlib
import datetime
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL_NET, clean_env, command, summary_of
from resuming import rows_of

from alexlab.engine.errors import RankLostError, lost_peer

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def job(shapes: Path, run_dir: Path, *more: str) -> list[str]:
    data = ["data=folder", f"data.root={shapes}", "data.image_size=64", "data.batch_size=8", "data.num_workers=0"]
    ranks = ["trainer=ddp_cpu", "trainer.devices=2", "trainer.max_epochs=1000"]
    run = ["logger=csv", "callbacks.figures=false", f"hydra.run.dir={run_dir}"]
    return ["train.py", *SMALL_NET, *data, *ranks, *run, *more]


def workers_of(pid: int) -> list[psutil.Process]:
    """Return the ranks that a command has started, in their order."""
    return sorted(psutil.Process(pid).children(), key=lambda process: process.pid)


def ranks_of_torchrun(pid: int) -> list[psutil.Process]:
    started = psutil.Process(pid).children(recursive=True)
    ranks = [process for process in started if "train.py" in " ".join(process.cmdline())]
    return sorted(ranks, key=lambda process: int(process.environ()["RANK"]))


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


class Strike:
    """Sends `number` to one rank once the run has done an epoch."""

    def __init__(self, run_dir: Path, which: int, number: int, ranks_of: Any = workers_of) -> None:
        self.run_dir, self.which, self.number, self.ranks_of = run_dir, which, number, ranks_of
        self.ranks: list[psutil.Process] = []

    def __call__(self, pid: int) -> None:
        if self.ranks or not (self.run_dir / "checkpoints/last.ckpt").is_file():
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks = self.ranks_of(pid)
            ranks[self.which].send_signal(self.number)
            self.ranks = ranks


MATRIX = [
    (number, target, ranks)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    for target, ranks in (("command", 1), ("command", 2), ("all", 2), ("rank 0", 2), ("rank 1", 2))
]
SOME = [(signal.SIGTERM, "rank 1", 2), (signal.SIGUSR1, "command", 2), (signal.SIGINT, "all", 2)]


@pytest.mark.parametrize(("number", "target", "ranks"), MATRIX if os.environ.get("ALEXLAB_FAULTS") else SOME)
def test_a_signal_stops_all_ranks_at_the_same_step(
    number: signal.Signals, target: str, ranks: int, shapes: Path, tmp_path: Path
) -> None:
    """A scheduler, a terminal or a colleague sends them: all ranks stop at the same step, which is saved."""
    run_dir, sent = tmp_path / "run", list[psutil.Process]()

    def watch(pid: int) -> None:
        if sent or not (run_dir / "checkpoints/last.ckpt").is_file():
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            started = workers_of(pid)
            if len(started) != (ranks if ranks > 1 else 0):
                return
            sent.extend([psutil.Process(pid), *started])
            for process in {"command": sent[:1], "all": sent, "rank 0": sent[1:2], "rank 1": sent[2:3]}[target]:
                process.send_signal(number)

    words = [f"trainer.devices={ranks}", "trainer.log_every_n_steps=1", "checkpoint.every_minutes=null"]
    done = command(*job(shapes, run_dir, *words), watch=watch, ranks=ranks if ranks > 1 else 0)
    assert len(sent) == (1 if ranks == 1 else 1 + ranks)
    assert done.returncode == 128 + number, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not running(sent)
    assert summary_of(run_dir)["status"] == "preempted"
    saved = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    steps = [int(row["step"]) for row in rows_of(run_dir) if "train/loss_step" in row]
    assert steps == list(range(saved)), "none is lost"


@pytest.mark.parametrize("which", [0, 1])
def test_a_rank_that_is_killed_is_named_and_stops_the_run(which: int, shapes: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    strike = Strike(run_dir, which, signal.SIGKILL)
    done = command(*job(shapes, run_dir), watch=strike)
    assert len(strike.ranks) == 2
    assert running(strike.ranks) == []
    assert done.returncode == 128 + signal.SIGKILL
    why = (
        f"Rank {which} of 2 was stopped by signal SIGKILL (kill -9, or the system ran out of memory: `dmesg` says "
        "which); the run has stopped on all ranks."
    )
    assert done.stderr == f"error: {why}\nResume the run with: python train.py resume={run_dir}\n"
    summary = summary_of(run_dir)
    assert (summary["status"], summary["error"]) == ("failed", why)


def test_a_rank_that_freezes_is_named_and_stops_the_run(shapes: Path, tmp_path: Path) -> None:
    """As a machine's disk or GPU may let it. The other one waits for trainer.timeout, and no longer."""
    run_dir = tmp_path / "run"
    strike = Strike(run_dir, 1, signal.SIGSTOP)
    done = command(*job(shapes, run_dir, "trainer.timeout=0.1"), watch=strike)
    assert running(strike.ranks) == []
    assert done.returncode == 1
    assert "Traceback" not in done.stderr, done.stderr
    assert (
        "error: rank 1 of 2 hung: another rank did not answer within trainer.timeout=0.1 minutes; the run has "
        "stopped on all ranks.\nResume the run with: python train.py resume=" in done.stderr
    )
    assert "RuntimeError: " in (run_dir / "train.log").read_text(), "torch's own message is in the log"
    assert summary_of(run_dir)["status"] == "failed"


def test_a_rank_of_torchrun_that_is_killed(shapes: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    strike = Strike(run_dir, 1, signal.SIGKILL, ranks_of_torchrun)
    words = [sys.executable, *TORCHRUN, *job(shapes, run_dir)]
    process = subprocess.Popen(words, cwd=ROOT, env=clean_env(), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not strike.ranks:
        strike(process.pid)
    printed = process.communicate(timeout=120)[1]
    assert running(strike.ranks) == []
    assert process.returncode == 1
    assert printed.count("error: another rank was lost.") == 1
    assert re.search(r"exitcode *: -9", printed), "torchrun's own report"
    assert "[rank0]:" not in printed, "no traceback of the rank that noticed"
    assert summary_of(run_dir)["status"] == "failed"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer.", "another rank was lo"),
        ("[gloo/transport/tcp/pair.cc:545] Connection closed by peer [127.0.0.1]:1", "another rank was lost."),
        ("[gloo/x.cc:129] Timed out waiting 9000ms for send operation to complete", "within trainer.timeout=2.5 minut"),
        ("[gloo/x.cc:1] Connection closed by peer [10.77.0.2]:1", "another rank on 10.77.0.2 was lost."),
        ("[gloo/x.cc:1] Connection closed by peer [::ffff:10.77.0.2]:1", "another rank on 10.77.0.2 was lost."),
        ("NCCL error: remote process exited or there was a network error", "another rank was lost."),
    ],
)
def test_torchs_messages_about_lost_ranks(text: str, message: str) -> None:
    error = lost_peer(RuntimeError(text), 2.5)
    assert isinstance(error, RankLostError)
    assert message in str(error)


def test_the_store_that_waits_in_vain_has_lost_a_rank() -> None:
    """Its message names neither gloo nor a store."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    with pytest.raises(RuntimeError) as raised:
        store.wait(["x"], datetime.timedelta(milliseconds=20))
    error = lost_peer(raised.value, 10)
    assert isinstance(error, RankLostError)
    assert "another rank did not answer within trainer.timeout=10 minutes" in str(error)


def test_other_errors_are_no_lost_ranks() -> None:
    for error in (RuntimeError("CUDA out of memory"), ValueError("gloo timed out"), RuntimeError("read timed out")):
        assert lost_peer(error, 10) is None
