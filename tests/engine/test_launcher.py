"""The launcher: which rank failed and why, and that no process is left."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from alexlab.engine import launcher
from alexlab.engine.errors import UserError

PEER = "import time; time.sleep(600)"
SILENT = "report_to_parent(lost='another rank did not answer within trainer.timeout=1 minutes.'); sys.exit(1)"
OVER = "the run has stopped on all ranks."


def watch(*codes: str, signals: tuple[int, ...] = ()) -> launcher.Outcome:
    """Run these ranks to the end; after a failure none is left."""
    prefix = "import os, sys, json\nfrom alexlab.engine.launcher import report_to_parent\n"
    ranks = [launcher.Worker([sys.executable, "-c", prefix + code], {"PATH": ""}, b"") for code in codes]
    try:
        outcome = launcher._watch(ranks, [*signals])
        assert outcome.code == 0 or all(rank.process.poll() is not None for rank in ranks)
        return outcome
    finally:
        for rank in ranks:
            rank.kill()


def test_a_run_without_faults_has_exit_code_0() -> None:
    assert watch("pass", "pass") == launcher.Outcome(0, "")


def test_the_same_mistake_of_all_ranks_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    mistake = "report_to_parent(mistake='lr=-1: must be above 0'); sys.exit(2)"
    assert watch(mistake, mistake) == launcher.Outcome(2, "lr=-1: must be above 0")
    assert capfd.readouterr().err == ""


def test_a_mistake_outweighs_the_failures_that_it_causes(capfd: pytest.CaptureFixture[str]) -> None:
    failure = "report_to_parent(failure='RuntimeError: peer is gone', traceback='Traceback ...'); sys.exit(1)"
    ended = watch(failure, "report_to_parent(mistake='x.jpg is broken'); sys.exit(2)")
    assert ended == launcher.Outcome(2, "x.jpg is broken")
    assert "Traceback" not in capfd.readouterr().err


def test_a_rank_that_is_killed_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "GRACE", 0.3)
    ended = watch("os.kill(os.getpid(), 9)", PEER)
    assert ended.code == 128 + 9
    assert ended.why.startswith("Rank 0 of 2 was stopped by signal SIGKILL (kill -9, or the system ran out of memory")


def test_the_rank_that_failed_is_named_not_those_that_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whichever left first; one that hangs shows where."""
    lost = "report_to_parent(lost='another rank was lost.'); sys.exit(1)"
    ended = watch(lost, "report_to_parent(failure='ValueError: x', traceback='T'); sys.exit(1)")
    assert ended == launcher.Outcome(1, f"Rank 1 of 2 exited with code 1; {OVER}\nValueError: x")
    monkeypatch.setattr(launcher, "GRACE", 0.3)
    ready = tmp_path / "ready"
    os.mkfifo(ready)  # the first rank waits until the other one hangs
    hanging = f"def hangs():\n  open({str(ready)!r}, 'w').close()\n  {PEER}\nhangs()"
    register = "import faulthandler, signal\nfaulthandler.register(signal.SIGUSR2)\n"
    ended = watch(f"open({str(ready)!r}).read(); {SILENT}", register + hanging)
    assert ended.why == f"rank 1 of 2 hung: another rank did not answer within trainer.timeout=1 minutes; {OVER}"
    assert "in hangs" in capfd.readouterr().err


def test_tracebacks_are_printed_with_their_rank(capfd: pytest.CaptureFixture[str]) -> None:
    ended = watch("report_to_parent(failure='ValueError: x', traceback='T' * 100000); sys.exit(1)", "pass")
    assert ended == launcher.Outcome(1, f"Rank 0 of 2 exited with code 1; {OVER}\nValueError: x")
    assert capfd.readouterr().err == "rank 0:\n" + "T" * 100_000 + "\n"


@pytest.mark.parametrize("during", [0, 1])
def test_a_signal_while_ranks_are_started_reaches_all(during: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one that is just being started, and those to come."""
    started: list[launcher.Worker] = []

    class Starting(launcher.Worker):
        def __init__(self, command: list[str], env: dict[str, str], config: bytes) -> None:
            started.append(self)
            if env["RANK"] == str(during):
                os.kill(os.getpid(), signal.SIGTERM)
            super().__init__([sys.executable, "-c", PEER], env, config)

    monkeypatch.setattr(launcher, "Worker", Starting)
    monkeypatch.setattr(launcher, "GRACE", 20.0)
    assert launcher.run_workers({}, 2, 1, None) == launcher.Outcome(128 + 15, "stopped by SIGTERM", by_signal=True)
    assert [rank.process.returncode for rank in started] == [-signal.SIGTERM] * 2, "none had to be killed"


def test_the_outcome_says_whether_rank_0_has_reported_the_signal() -> None:
    """One that was still importing dies of it without a word."""
    for code, reported in (("sys.exit(143)", True), ("os.kill(os.getpid(), 15)", False)):
        ended = watch(code, "os.kill(os.getpid(), 15)", signals=(15,))
        assert ended == launcher.Outcome(128 + 15, "stopped by SIGTERM", by_signal=True, reported=reported)


def test_a_port_is_free_or_refused() -> None:
    assert launcher.free_port(None) > 0
    with socket.socket() as holder:
        with contextlib.suppress(OSError):  # root may use port 1: take it first
            holder.bind(("127.0.0.1", 1))
            holder.listen()
        with pytest.raises(UserError, match=r"`trainer.master_port=1` cannot be used \(.*\): choose another, or null"):
            launcher.free_port(1)


def test_ranks_of_torchrun_and_srun_are_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_PROCID", "ALEXLAB_RANKS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (launcher.external(), launcher.rank()) == (False, 0)
    monkeypatch.setenv("RANK", "3")  # left behind by something else
    assert launcher.rank() == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert (launcher.external(), launcher.rank()) == (True, 3)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert not launcher.external(), "one task of SLURM is a single process"
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert not launcher.run_stamp(resumes=False).startswith("slurm"), "a job may have several runs"
    assert launcher.run_stamp(resumes=True) == "slurm-78.0"
    assert launcher.job() == "slurm 78"
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(UserError, match=r"This SLURM job has 2 tasks \(SLURM_NTASKS\), and srun has not started this"):
        launcher.started()
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert (launcher.external(), launcher.rank()) == (True, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert launcher.started() == launcher.Started("srun", 1, 2), "scripts of SLURM export the rest for all tasks"
    monkeypatch.setenv("RANK", "0")
    assert launcher.started() == launcher.Started("RANK and WORLD_SIZE", 0, 2)


def test_ranks_that_torchrun_restarts_resume_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert launcher.run_stamp(resumes=True) == "torchrun-x-29500"
    assert not launcher.run_stamp(resumes=False).startswith("torchrun"), "another run with the same words is new"
    assert launcher.job() == "torchrun x at None"


def test_importing_the_launcher_is_light(tmp_path: Path) -> None:
    code = "import sys, alexlab.engine.launcher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_ranks_that_do_not_stop_after_rank_0_are_killed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What rank 0 wrote stays true."""
    monkeypatch.setattr(launcher, "GRACE_AFTER_SIGNAL", 0.3)
    assert watch("pass", PEER) == launcher.Outcome(0, "")
    assert "Ranks that had not stopped a minute after rank 0 were killed" in capfd.readouterr().err


def test_ranks_that_lost_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them hangs any more; the one that waited knows why."""
    ended = watch("report_to_parent(lost='another rank was lost.'); sys.exit(1)", SILENT)
    why = f"rank 0 and rank 1 of 2: another rank did not answer within trainer.timeout=1 minutes; {OVER}"
    assert ended == launcher.Outcome(1, why)


def test_a_rank_0_that_does_not_stop_after_a_signal_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "GRACE_AFTER_SIGNAL", 0.3)
    ended = watch(f"import signal; signal.signal(15, signal.SIG_IGN); {PEER}", "pass", signals=(15,))
    assert ended == launcher.Outcome(128 + 15, "stopped by SIGTERM", by_signal=True)


@pytest.mark.parametrize(
    ("array", "job"),
    [({}, "7"), ({"SLURM_ARRAY_JOB_ID": "7"}, "7_3"), ({"SLURM_ARRAY_JOB_ID": "5"}, "7")],
    ids=["job", "last task", "another task, or a job that a task has submitted"],
)
def test_a_task_of_an_array_queues_itself_alone(
    array: dict[str, str], job: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The last task of an array has the number of the whole array in SLURM_JOB_ID."""
    array |= {"SLURM_ARRAY_TASK_ID": "3"} if array else {}
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    for key, value in {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}", **array}.items():
        monkeypatch.setenv(key, value)
    assert launcher.requeue() == f"SLURM queued job {job} again"
    assert (tmp_path / "asked").read_text() == f"requeue {job}\n"


@pytest.mark.parametrize(
    ("ends", "printed"),
    [
        ("kill -TERM $$", "SLURM queued job 7 again"),  # by the requeue, which ends the processes of the job
        ("echo no permission >&2; exit 1", "SLURM did not queue job 7 again: no permission"),
        ("kill -KILL $$", "SLURM did not queue job 7 again: scontrol exited with -9"),
    ],
    ids=["ended by the requeue", "refused", "killed"],
)
def test_what_scontrol_answers_is_printed(
    ends: str, printed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{ends}\n")
    (tmp_path / "scontrol").chmod(0o755)
    for key, value in {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert launcher.requeue() == printed
