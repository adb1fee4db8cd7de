"""Start one worker process per device of this machine, each with the same config, and watch them.

The parent joins no process group and keeps the environment as it is, so that the next job of a sweep starts clean.
Under torchrun or srun the ranks exist already, and nothing is started here.
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
from typing import Any

from alexlab.engine.errors import UserError
from alexlab.engine.signals import of_stacks, stopping
from alexlab.engine.sweeps import agent

# Seconds that ranks get to stop by themselves:
GRACE = 8.0  # the remaining ranks, after one has failed
GRACE_AFTER_SIGNAL = 60.0  # all ranks, after a signal (rank 0 closes the loggers); or the rest, after rank 0
TIME_TO_PRINT = 0.5  # seconds in which hanging ranks print their stacks
KILLED = {9: " (kill -9, or the system ran out of memory: `dmesg` says which)"}
# environment variables of a worker process
REPORT_PIPE = "ALEXLAB_REPORT_PIPE"  # the file descriptor of the pipe to the parent
RANKS = "ALEXLAB_RANKS"  # the world size
# set in the ranks of torchrun
AGENT = "ALEXLAB_AGENT"  # HOST:PORT of the store of torchrun's agents


@dataclass(frozen=True)
class Outcome:
    """How a run on several devices ended: exit code 0, or another one and why."""

    code: int
    why: str
    by_signal: bool = False  # whether a signal to the run ended it
    reported: bool = False  # whether rank 0 has already printed how it ended


class Worker:
    """A worker process and what it has reported: {"mistake": text}, {"failure": text, "traceback": text}, or
    {"lost": text} if it noticed that another rank is gone.
    """

    def __init__(self, command: list[str], env: dict[str, str], config: bytes) -> None:
        self.reading, writing = os.pipe()
        os.set_blocking(self.reading, False)
        self.raw = b""
        self.forwarded = 0  # signals that were passed on to it
        env = {**env, REPORT_PIPE: str(writing)}
        # in a new process group, so that Ctrl-C reaches the worker only once, through `run_workers`
        self.process = subprocess.Popen(command, env=env, pass_fds=[writing], process_group=0, stdin=subprocess.PIPE)
        os.close(writing)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process died at once, which `poll` notices
            self.process.stdin.write(config)
            self.process.stdin.close()

    def poll(self) -> int | None:
        code = self.process.poll()
        with contextlib.suppress(BlockingIOError):  # the pipe is empty
            while chunk := os.read(self.reading, 65536):
                self.raw += chunk
        return code

    @property
    def report(self) -> dict[str, str]:
        try:
            return json.loads(self.raw or b"{}")
        except ValueError:  # it was killed while it wrote
            return {}

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


# -- ranks


@dataclass(frozen=True)
class Started:
    """This process as one of several ranks."""

    by: str  # what has started it: alexlab (`run_workers`), torchrun, srun, or "RANK and WORLD_SIZE"
    rank: int
    world: int  # the number of all ranks
    local_rank: int | None = None  # on this machine; None if unknown
    local: int | None = None  # the number of ranks on this machine; None if unknown


MPI = ("OMPI_COMM_WORLD", "PMI", "MV2_COMM_WORLD")  # prefixes of the variables that an mpirun sets


def started() -> Started | None:
    """Return this rank as the environment describes it; None if this process is the only one.

    An environment that names several processes, and not which of them this is, raises UserError.
    """
    world, rank, tasks = _number("WORLD_SIZE"), _number("RANK"), _number("SLURM_NTASKS") or 1
    local = _number("LOCAL_RANK"), _number("LOCAL_WORLD_SIZE")
    if RANKS in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return Started("alexlab" if RANKS in os.environ else "torchrun", rank or 0, world or 1, *local)
    if rank is None and tasks > 1 and "SLURM_PROCID" in os.environ:
        if "SLURM_STEP_ID" not in os.environ:
            raise UserError(
                f"This SLURM job has {tasks} tasks (SLURM_NTASKS), and srun has not started this process: start "
                f"{tasks} ranks with `srun python train.py ...`, or ask for one task with more cores: --ntasks=1 "
                f"--cpus-per-task={tasks}."
            )
        return Started("srun", _number("SLURM_PROCID") or 0, tasks, _number("SLURM_LOCALID"))
    if world is not None and world > 1:
        lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if lacking:
            raise UserError(
                f"WORLD_SIZE={world} in the environment says that this is one of {world} processes, and "
                f"{', '.join(lacking)} are not set: set them for each process, or unset WORLD_SIZE to train with one."
            )
        if rank is None or not 0 <= rank < world:
            raise UserError(f"RANK={rank} in the environment must be from 0 to WORLD_SIZE-1={world - 1}.")
        _number("MASTER_PORT")
        return Started("RANK and WORLD_SIZE", rank, world, *local)
    for mpi in MPI:
        if (_number(f"{mpi}_SIZE") or 1) > 1:
            raise UserError(
                f"mpirun has started {os.environ[f'{mpi}_SIZE']} processes ({mpi}_SIZE), which do not know of each "
                f"other. Start each with RANK=${mpi}_RANK WORLD_SIZE=${mpi}_SIZE and the same MASTER_ADDR=HOST and "
                f"MASTER_PORT=PORT of rank 0: mpirun ... bash -c 'RANK=${mpi}_RANK ... exec python train.py ...'"
            )
    return None


def _number(name: str) -> int | None:
    """Return a variable of the environment that must be a whole number, or None without it."""
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f"{name}={text} in the environment must be a whole number.")
    return int(text) if text else None


def external() -> bool:
    """Check whether this process is a rank already."""
    return started() is not None


def rank() -> int:
    try:
        this = started()
    except UserError:  # which training alone reports
        return 0
    return 0 if this is None else this.rank


def prints() -> bool:
    """Check whether this process prints what all ranks know: the command itself, or rank 0 of another launcher."""
    return rank() == 0 and RANKS not in os.environ


def run_stamp(resumes: bool) -> str:
    """Return the name of a new run's directory. That of rank 0 counts.

    If the run `resumes` (resume=auto), a SLURM job that is repeated and ranks that torchrun restarts get the same name.
    """
    if os.environ.get("ALEXLAB_STAMP"):
        return os.environ["ALEXLAB_STAMP"]
    if ids := agent():  # which may resume this run
        return "sweep-" + "/".join(ids)
    if "SLURM_JOB_ID" in os.environ and (external() or resumes):
        return f"slurm-{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_STEP_ID', '0')}"
    if "TORCHELASTIC_RUN_ID" in os.environ and resumes:
        # without --rdzv-id all ids are `none`, but the ports differ
        return f"torchrun-{os.environ['TORCHELASTIC_RUN_ID']}-{os.environ.get('MASTER_PORT')}"
    return time.strftime("%Y-%m-%d_%H-%M-%S") + f"_{time.time_ns() // 1_000_000 % 1000:03d}"


def job() -> str | None:
    """Return "slurm ID" or "torchrun ID at HOST:PORT", which stays if the job is started again; None without an ID."""
    elastic = os.environ.get("TORCHELASTIC_RUN_ID")
    if "SLURM_JOB_ID" in os.environ:
        return f"slurm {os.environ['SLURM_JOB_ID']}"
    return f"torchrun {elastic} at {os.environ.get(AGENT)}" if elastic not in (None, "none") else None


def requeue() -> str:
    """Ask SLURM to queue this job again, with the same number and so the same run directory; return what to print."""
    job = os.environ.get("SLURM_JOB_ID")
    # The last task of an array has the number of the whole array. A job that an array's task has submitted inherits
    # SLURM_ARRAY_*, but has a number of its own.
    if job is not None and os.environ.get("SLURM_ARRAY_JOB_ID") == job:
        job = f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if job is None:
        return "resume.requeue=true: this is no SLURM job, so nothing was queued"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SLURM could not be asked to queue job {job} again: scontrol requeue {job}: {error}"
    if done.returncode and done.returncode != -signal.SIGTERM:  # which the requeue sends to all processes of the job
        why = done.stderr.strip() or f"scontrol exited with {done.returncode}"
        return f"SLURM did not queue job {job} again: {why}"
    return f"SLURM queued job {job} again"


def free_port(wanted: int | None) -> int:
    """Return `wanted` if it is free, or any free port for None.

    Raises:
        UserError: it is in use.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            why = f"cannot be used ({error.strerror}): choose another, or null."
            raise UserError(f"`trainer.master_port={wanted}` {why}") from None
        return int(probe.getsockname()[1])


# -- workers


def report_to_parent(**what: str) -> None:
    """Send the reason why this rank stops to `run_workers`, which prints equal messages of several ranks once."""
    with os.fdopen(int(os.environ[REPORT_PIPE]), "w") as pipe:
        json.dump(what, pipe)


def run_workers(config: dict[str, Any], world_size: int, threads: int, port: int | None) -> Outcome:
    """Train `config` on `world_size` processes of this machine, of `threads` OpenMP threads. If one fails, all stop.

    The ranks meet at `port`; None takes a free one.
    """
    # TORCH_CPP_LOG_LEVEL hides the stacks that torch prints when another rank stops
    shared = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": str(threads), **os.environ}
    shared |= {RANKS: str(world_size), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(port))}
    command = [sys.executable, "-m", "alexlab.commands.worker"]
    encoded = json.dumps(config).encode()
    workers: list[Worker] = []
    signals: list[int] = []  # received so far

    def pass_on() -> None:
        for worker in workers:
            while worker.forwarded < len(signals):
                worker.forwarded += 1
                with contextlib.suppress(ProcessLookupError):
                    worker.process.send_signal(signals[worker.forwarded - 1])

    def forward(number: int, frame: Any) -> None:
        signals.append(number)
        pass_on()

    before = {number: signal.signal(number, forward) for number in stopping()}
    try:
        for r in range(world_size):
            workers.append(Worker(command, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, encoded))
            pass_on()  # signals that came while it was started
        return _watch(workers, signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for worker in workers:
            worker.kill()
            os.close(worker.reading)


def _watch(workers: list[Worker], signals: list[int]) -> Outcome:
    """Wait until all workers have stopped. If one fails, stop all, and find out which one failed and why."""
    # wait
    since: float | None = None  # when a signal came, or when rank 0 finished, which draws figures and uploads
    while True:
        codes = [worker.poll() for worker in workers]
        if all(code == 0 for code in codes):
            return Outcome(0, "")
        if any(codes):
            break
        if signals or codes[0] == 0:
            since = since or time.monotonic()
            if time.monotonic() - since > GRACE_AFTER_SIGNAL:
                if signals:
                    break
                print("Ranks that had not stopped a minute after rank 0 were killed.", file=sys.stderr)
                return Outcome(0, "")
        time.sleep(0.1)

    # let the rest stop
    closing = signals and codes[0] is None
    end = time.monotonic() + (GRACE_AFTER_SIGNAL if closing else GRACE) * any(codes)
    while time.monotonic() < end and any(worker.poll() is None for worker in workers):
        time.sleep(0.1)
    stopped = {r: code for r, worker in enumerate(workers) if (code := worker.poll())}
    hanging = [r for r, worker in enumerate(workers) if worker.poll() is None]
    for r in hanging:  # prints the stack of each thread, as `RunSession` has enabled
        with contextlib.suppress(ProcessLookupError):
            workers[r].process.send_signal(of_stacks())
    time.sleep(TIME_TO_PRINT if hanging else 0)
    for worker in workers:
        worker.kill()
        worker.poll()
    reports = [worker.report for worker in workers]

    # a user's mistake is the cause, even if a rank reports that another was lost
    mistakes = list(dict.fromkeys(report["mistake"] for report in reports if "mistake" in report))
    if mistakes:
        return Outcome(2, "\n".join(mistakes))
    # name the rank that failed, not those that noticed
    number = min(stopped, key=lambda r: (stopped[r] > 0, "lost" in reports[r], r), default=0)
    code = stopped.get(number, 0)  # 0: a signal came, and no rank stopped in time
    over = "the run has stopped on all ranks."
    if signals and code in (0, 128 + signals[0], -signals[0]):
        why = f"stopped by {signal.Signals(signals[0]).name}"
        return Outcome(128 + signals[0], why, by_signal=True, reported=stopped.get(0) == 128 + signals[0])
    tracebacks: dict[str, list[str]] = {}  # the same bug on several ranks is printed once
    for r, report in enumerate(reports):
        if "traceback" in report:
            tracebacks.setdefault(report["traceback"], []).append(f"rank {r}")
    for text, ranks in tracebacks.items():
        print(f"{', '.join(ranks)}:\n{text}", file=sys.stderr)
    if "lost" in reports[number]:
        reasons = [report["lost"].rstrip(".") for report in reports if "lost" in report]
        why = min(reasons, key=lambda text: "answer" not in text)  # a rank that did not answer is the cause
        who = " and ".join(f"rank {r}" for r in hanging or sorted(stopped))
        return Outcome(1, f"{who} of {len(workers)}{' hung' if hanging else ''}: {why}; {over}")
    if code < 0:
        how = f"was stopped by signal {signal.Signals(-code).name}{KILLED.get(-code, '')}"
    else:
        how = f"exited with code {code}"
    failures = list(dict.fromkeys(report["failure"] for report in reports if "failure" in report))
    why = "\n".join([f"Rank {number} of {len(workers)} {how}; {over}", *failures])
    return Outcome(code if code > 0 else 128 - code, why)
