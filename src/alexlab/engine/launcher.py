"""One process a device on this machine, each with the job's own resolved config.

The command's own process only watches: it never joins a process group and its environment stays as it was, so that the
next job of a sweep starts clean, whatever its number of devices. Under torchrun or srun the ranks exist already.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from alexlab.engine.errors import UserError
from alexlab.engine.secrecy import masked

GRACE = 8.0  # seconds that the other ranks get to leave by themselves after one has failed,
GRACE_AFTER_SIGNAL = 60.0  # or after a signal: rank 0 has loggers to close
GRACE_OF_FIRST = 1200.0  # that rank 0 has for pictures and uploads when all others have finished
FORWARDED = (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
SHOW = 0.5  # seconds for the stacks of those that do not
KILLED = {9: " (kill -9, or memory was used up: `dmesg` tells)"}
TELL = "ALEXLAB_TELL"  # the variable that holds the number of a rank's pipe to its parent


@dataclass(frozen=True)
class Ended:
    """How a run on several devices ended: 0, or the exit code that it leaves with, and why."""

    code: int
    why: str
    by_signal: bool = False  # that was sent to the run
    told: bool = False  # whether rank 0 has heard of it, and said so


class Rank:
    """A process of the run, and what it has told: {"mistake": text}, {"failure": text, "traceback": text}, or {"lost":
    text} where it has noticed that another one is gone.

    It has a process group of its own: Ctrl-C reaches it once, from `spawn`, and not from the terminal as well.
    """

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.reading, writing = os.pipe()
        os.set_blocking(self.reading, False)
        self.raw = b""
        self.heard = 0  # signals that were passed on to it
        self.process = subprocess.Popen(command, env={**env, TELL: str(writing)}, pass_fds=[writing], process_group=0)
        os.close(writing)

    def poll(self) -> int | None:
        code = self.process.poll()
        with contextlib.suppress(BlockingIOError):  # nothing more is there
            while chunk := os.read(self.reading, 65536):
                self.raw += chunk
        return code

    @property
    def told(self) -> dict[str, str]:
        try:
            return json.loads(self.raw or b"{}")
        except ValueError:  # killed while it wrote
            return {}

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def external() -> bool:
    """Whether torchrun or srun, or `spawn` here, has started this process as a rank."""
    slurm = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
    return "TORCHELASTIC_RUN_ID" in os.environ or slurm or "ALEXLAB_RANKS" in os.environ


def world_of_launcher() -> tuple[int, int] | None:
    """(ranks in all, ranks on this machine) that torchrun or srun has started, or None where neither has."""
    if not external() or "ALEXLAB_RANKS" in os.environ:
        return None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    ranks = int(os.environ["SLURM_NTASKS"])
    return ranks, ranks // int(os.environ.get("SLURM_NNODES", os.environ.get("SLURM_JOB_NUM_NODES", "1")))


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) if external() else 0


def tells() -> bool:
    """Whether what all ranks find out is this process's to print: the command's own, or the first of a launcher."""
    return rank() == 0 and "ALEXLAB_RANKS" not in os.environ


def requeue() -> str:
    """Ask SLURM for this job again, with its number and so its run's directory; what to tell of that."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return "resume.requeue=true: this is no job of SLURM, and nothing was asked for"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SLURM was not asked for job {job} again: scontrol requeue {job}: {error}"
    if done.returncode:
        return f"SLURM does not take job {job} again: {done.stderr.strip() or f'scontrol left with {done.returncode}'}"
    return f"SLURM was asked for job {job} again"


def free_port(wanted: int | None) -> int:
    """`wanted` if it is free, or any free port.

    Raises:
        UserError: it is in use.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise UserError(
                f"trainer.master_port={wanted} cannot be used ({error.strerror}): choose another, or null."
            ) from None
        return int(probe.getsockname()[1])


def tell_parent(**what: str) -> None:
    """Tell `spawn` why this rank ends: it prints the same message of several ranks once."""
    with os.fdopen(int(os.environ[TELL]), "w") as pipe:
        json.dump(what, pipe)


def spawn(run_dir: Path, world_size: int, threads: int, port: int | None) -> Ended:
    """Train `run_dir/config.yaml` on `world_size` processes; when one fails, the others are ended."""
    shared = {
        **os.environ,
        "ALEXLAB_RANKS": str(world_size),
        "WORLD_SIZE": str(world_size),
        "NODE_RANK": "0",
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),  # no stacks of peers that are leaving
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port(port)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    command = [sys.executable, "-m", "alexlab.commands.worker", str(run_dir)]
    ranks: list[Rank] = []
    signals: list[int] = []  # that have come

    def pass_on() -> None:
        for rank in ranks:
            while rank.heard < len(signals):
                rank.heard += 1
                with contextlib.suppress(ProcessLookupError):
                    rank.process.send_signal(signals[rank.heard - 1])

    def forward(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        pass_on()

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        for r in range(world_size):
            ranks.append(Rank(command, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}))
            pass_on()  # what came while it was started
        return _watch(ranks, signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for rank in ranks:
            rank.end()
            os.close(rank.reading)


def _watch(ranks: list[Rank], signals: list[int]) -> Ended:
    since: float | None = None  # when a signal had come, or some ranks had finished
    while True:
        codes = [rank.poll() for rank in ranks]
        if all(code == 0 for code in codes):
            return Ended(0, "")
        if any(codes):
            break
        if signals or 0 in codes:
            since = since or time.monotonic()
            waited = time.monotonic() - since
            if signals and waited > GRACE_AFTER_SIGNAL:
                break
            if not signals and codes[0] == 0 and waited > GRACE_AFTER_SIGNAL:
                print("ranks that had not left a minute after rank 0 were ended.", file=sys.stderr)
                return Ended(0, "")
            if not signals and codes[0] is None and waited > GRACE_OF_FIRST:
                break
        time.sleep(0.1)
    closing = signals and codes[0] is None
    end = time.monotonic() + (GRACE_AFTER_SIGNAL if closing else GRACE) * any(codes)
    while time.monotonic() < end and any(rank.poll() is None for rank in ranks):
        time.sleep(0.1)
    left = {r: code for r, rank in enumerate(ranks) if (code := rank.poll())}
    silent = [r for r, rank in enumerate(ranks) if rank.poll() is None]
    _show_where([ranks[r] for r in silent])
    for rank in ranks:
        rank.end()
        rank.poll()
    told = [rank.told for rank in ranks]
    mistakes = list(dict.fromkeys(what["mistake"] for what in told if "mistake" in what))
    if mistakes:  # whatever the other ranks said of the one that left them
        return Ended(2, "\n".join(mistakes))
    over = "the run has ended on all ranks."
    if not left:  # by themselves
        if signals:
            return Ended(128 + signals[0], f"stopped by {signal.Signals(signals[0]).name}", by_signal=True)
        return Ended(1, f"rank 0 of {len(ranks)} did not leave when the others had; {over}")
    # the one that the others have lost, if there is one
    number = min(left, key=lambda r: (left[r] > 0, "lost" in told[r], r))
    code = left[number]
    if signals and code in (128 + signals[0], -signals[0]):
        told_of = left.get(0) == 128 + signals[0]
        return Ended(128 + signals[0], f"stopped by {signal.Signals(signals[0]).name}", by_signal=True, told=told_of)
    for r, what in enumerate(told):
        if "traceback" in what:
            print(masked(f"rank {r}:\n{what['traceback']}"), file=sys.stderr)
    if "lost" in told[number] and not silent:
        texts = sorted(
            {what["lost"].rstrip(".") for what in told if "lost" in what}, key=lambda text: "answer" not in text
        )
        return Ended(1, f"{' and '.join(f'rank {r}' for r in sorted(left))} of {len(ranks)}: {texts[0]}; {over}")
    if "lost" in told[number]:
        names = " and ".join(map(str, silent))
        return Ended(1, f"of {len(ranks)} ranks rank {names} hung: {told[number]['lost'].rstrip('.')}; {over}")
    how = (
        f"was ended by signal {signal.Signals(-code).name}{KILLED.get(-code, '')}"
        if code < 0
        else f"left with exit code {code}"
    )
    failures = list(dict.fromkeys(what["failure"] for what in told if "failure" in what))
    return Ended(
        code if code > 0 else 128 - code, "\n".join([f"rank {number} of {len(ranks)} {how}; {over}", *failures])
    )


def _show_where(ranks: list[Rank]) -> None:
    """Let ranks that do not leave print where each of their threads is: `run.fit_rank` has turned that on."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            rank.process.send_signal(signal.SIGUSR2)
    if ranks:
        time.sleep(SHOW)
