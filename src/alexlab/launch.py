"""One process a device on this machine, each with the job's own resolved config.

The command's own process only watches: it never joins a process group and its environment stays as it was, so that the
next job of a sweep starts clean, whatever its number of devices. Under torchrun or srun the ranks exist already.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

from alexlab.errors import UserError

GRACE = 8.0  # seconds that the other ranks get to leave by themselves after one has failed


def external() -> bool:
    """Whether torchrun or srun, or `spawn` here, has started this process as a rank."""
    slurm = int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
    return "TORCHELASTIC_RUN_ID" in os.environ or slurm or "ALEXLAB_RANKS" in os.environ


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) if external() else 0


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


def spawn(run_dir: Path, world_size: int, threads: int, port: int | None) -> int:
    """Train `run_dir/config.yaml` on `world_size` processes.

    Returns:
        0, or the exit code of the rank that failed first; the others are ended then.
    """
    shared = {
        **os.environ,
        "ALEXLAB_RANKS": str(world_size),
        "WORLD_SIZE": str(world_size),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port(port)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    command = [sys.executable, "-m", "alexlab.rank", str(run_dir)]
    ranks = [subprocess.Popen(command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(world_size)]

    def forward(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _watch(ranks)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()


def _watch(ranks: list[subprocess.Popen]) -> int:
    while True:
        codes = [process.poll() for process in ranks]
        if all(code == 0 for code in codes):
            return 0
        bad = [(r, code) for r, code in enumerate(codes) if code]
        if bad:
            break
        time.sleep(0.1)
    first, code = bad[0]
    end = time.monotonic() + GRACE
    while time.monotonic() < end and any(process.poll() is None for process in ranks):
        time.sleep(0.1)
    still = [r for r, process in enumerate(ranks) if process.poll() is None]
    for r in still:
        ranks[r].kill()
        ranks[r].wait()
    how = f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
    print(f"rank {first} of {len(ranks)} {how}; the run has ended on all ranks.", file=sys.stderr, flush=True)
    return code if code > 0 else 128 - code
