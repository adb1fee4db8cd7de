"""The launcher: what the ranks tell, and that none stays behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from alexlab.engine import launcher as launch
from alexlab.engine.errors import UserError

PEER = "import time; time.sleep(600)"


def ranks_of(*codes: str) -> list[launch.Rank]:
    prefix = "import os, sys, json\nfrom alexlab.engine.launcher import tell_parent\n"
    return [launch.Rank([sys.executable, "-c", prefix + code], {"PATH": ""}) for code in codes]


def watch(ranks: list[launch.Rank]) -> launch.Ended:
    try:
        return launch._watch(ranks, [])
    finally:
        for rank in ranks:
            rank.end()


def test_all_is_well() -> None:
    assert watch(ranks_of("pass", "pass")) == launch.Ended(0, "")


def test_the_same_mistake_of_all_ranks_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    mistake = "tell_parent(mistake='lr=-1: must be above 0'); sys.exit(2)"
    assert watch(ranks_of(mistake, mistake)) == launch.Ended(2, "lr=-1: must be above 0")
    assert capfd.readouterr().err == ""


def test_a_mistake_outweighs_the_failures_that_it_causes(capfd: pytest.CaptureFixture[str]) -> None:
    failure = "tell_parent(failure='RuntimeError: peer is gone', traceback='Traceback ...'); sys.exit(1)"
    ended = watch(ranks_of(failure, "tell_parent(mistake='x.jpg is broken'); sys.exit(2)"))
    assert ended == launch.Ended(2, "x.jpg is broken")
    assert "Traceback" not in capfd.readouterr().err


def test_a_rank_that_is_killed_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.3)
    ranks = ranks_of("os.kill(os.getpid(), 9)", PEER)
    ended = watch(ranks)
    assert ended.code == 128 + 9
    assert ended.why.startswith("rank 0 of 2 was ended by signal SIGKILL (kill -9, or memory was used up")
    assert all(rank.process.poll() is not None for rank in ranks)


def test_the_rank_that_the_others_have_lost_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whichever left first; one that hangs shows where."""
    monkeypatch.setattr(launch, "GRACE", 0.3)
    lost = "tell_parent(lost='another rank was lost.'); sys.exit(1)"
    ended = watch(ranks_of(lost, "tell_parent(failure='ValueError: x', traceback='T'); sys.exit(1)"))
    assert ended == launch.Ended(1, "rank 1 of 2 left with exit code 1; the run has ended on all ranks.\nValueError: x")
    silent = "tell_parent(lost='another rank did not answer within trainer.timeout=1 minutes.'); sys.exit(1)"
    hanging = (
        "import faulthandler, signal\nfaulthandler.register(signal.SIGUSR2)\ndef hangs():\n  " + PEER + "\nhangs()"
    )
    monkeypatch.setattr(launch, "GRACE", 3.0)
    ended = watch(ranks_of(silent, hanging))
    why = "of 2 ranks rank 1 hung: another rank did not answer within trainer.timeout=1 minutes; the run has ended on "
    assert ended.why == f"{why}all ranks."
    assert "in hangs" in capfd.readouterr().err


def test_tracebacks_are_shown_with_their_rank(capfd: pytest.CaptureFixture[str]) -> None:
    ended = watch(ranks_of("tell_parent(failure='ValueError: x', traceback='T' * 100000); sys.exit(1)", "pass"))
    assert ended == launch.Ended(1, "rank 0 of 2 left with exit code 1; the run has ended on all ranks.\nValueError: x")
    assert capfd.readouterr().err == "rank 0:\n" + "T" * 100_000 + "\n"


@pytest.mark.parametrize("during", [0, 1])
def test_a_signal_while_ranks_are_started_reaches_all(
    during: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also the one that is just being started, and those to come."""
    started: list[launch.Rank] = []

    class Starting(launch.Rank):
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            started.append(self)
            if env["RANK"] == str(during):
                os.kill(os.getpid(), signal.SIGTERM)
            super().__init__([sys.executable, "-c", PEER], env)

    monkeypatch.setattr(launch, "Rank", Starting)
    monkeypatch.setattr(launch, "GRACE", 20.0)
    assert launch.spawn(tmp_path, 2, 1, None) == launch.Ended(128 + 15, "stopped by SIGTERM", by_signal=True)
    assert [rank.process.returncode for rank in started] == [-signal.SIGTERM] * 2, "none had to be killed"


def test_whether_rank_0_has_told_of_the_signal() -> None:
    """One that was still importing dies of it without a word."""
    for code, told in (("sys.exit(143)", True), ("os.kill(os.getpid(), 15)", False)):
        ranks = ranks_of(code, "os.kill(os.getpid(), 15)")
        assert launch._watch(ranks, [15]) == launch.Ended(128 + 15, "stopped by SIGTERM", by_signal=True, told=told)


def test_ports() -> None:
    assert launch.free_port(None) > 0
    with pytest.raises(UserError, match=r"trainer.master_port=1 cannot be used \(.*\): choose another, or null"):
        raise_for_port_1()


def raise_for_port_1() -> None:
    """Port 1 may be free to root: take it first, where that is so."""
    import socket

    with socket.socket() as holder:
        try:
            holder.bind(("127.0.0.1", 1))
            holder.listen()
        except OSError:
            pass
        launch.free_port(1)


def test_ranks_of_other_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_PROCID", "ALEXLAB_RANKS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (launch.external(), launch.rank()) == (False, 0)
    monkeypatch.setenv("RANK", "3")  # left behind by something else
    assert launch.rank() == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert (launch.external(), launch.rank()) == (True, 3)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert not launch.external(), "one task of SLURM is a single process"
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert (launch.external(), launch.rank()) == (True, 1)


def test_importing_the_launcher_is_light(tmp_path: Path) -> None:
    code = "import sys, alexlab.engine.launcher; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_ranks_that_stay_behind_the_first_are_ended(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What rank 0 wrote stays true."""
    monkeypatch.setattr(launch, "GRACE_AFTER_SIGNAL", 0.3)
    assert watch(ranks_of("pass", PEER)) == launch.Ended(0, "")
    assert "ranks that had not left a minute after rank 0 were ended" in capfd.readouterr().err


def test_ranks_that_lost_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them hangs any more; the one that waited knows why."""
    silent = "tell_parent(lost='another rank did not answer within trainer.timeout=1 minutes.'); sys.exit(1)"
    ended = watch(ranks_of("tell_parent(lost='another rank was lost.'); sys.exit(1)", silent))
    why = "rank 0 and rank 1 of 2: another rank did not answer within trainer.timeout=1 minutes; the run has ended on "
    assert ended == launch.Ended(1, f"{why}all ranks.")


@pytest.mark.parametrize("signals", [[15], []])
def test_a_first_rank_that_does_not_leave(signals: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the others have, and though it was told to."""
    monkeypatch.setattr(launch, "GRACE_AFTER_SIGNAL", 0.3)
    monkeypatch.setattr(launch, "GRACE_OF_FIRST", 0.3)
    ranks = ranks_of(f"import signal; signal.signal(15, signal.SIG_IGN); {PEER}", "pass")
    try:
        ended = launch._watch(ranks, signals)
    finally:
        for rank in ranks:
            rank.end()
    if signals:
        assert ended == launch.Ended(128 + 15, "stopped by SIGTERM", by_signal=True)
    else:
        assert ended.why == "rank 0 of 2 did not leave when the others had; the run has ended on all ranks."
    assert all(rank.process.poll() is not None for rank in ranks)
