"""Import torch and Lightning fast, and end the process without the slow cleanup of what they created."""

import atexit
import contextlib
import gc
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from alexlab.engine.errors import UserError

CORES = "ALEXLAB_CORES"  # the environment variable with the number of cores for a job of a sweep


def cores() -> int:
    """Return how many cores this process may use: a job of a scheduler often has fewer than the machine."""
    # macOS has no affinities
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(own, int(os.environ.get(CORES, own)))


def read_env(path: Path) -> None:
    """Set the variables of a .env file, except those that are set already."""
    if path.is_file():
        from dotenv import load_dotenv

        try:
            load_dotenv(path)
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}): write lines NAME=VALUE in UTF-8.") from None


def complete_environment() -> None:
    """Provide what a daemon or a container may lack, and libraries fail without: standard streams and a home folder.

    Streams that were closed (`>&-`) write nowhere. A letter that the terminal's encoding lacks is printed escaped. A
    user without HOME and without an entry in passwd has the home /, as in Docker.
    """
    # Matplotlib would report that it cannot write to the home folder, and uses a temporary one
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:  # otherwise the next file that is opened is standard output
        os.set_inheritable(fd, True)
    os.close(fd)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not os.path.isabs(os.path.expanduser("~")):  # noqa: PTH111, PTH117
        os.environ["HOME"] = "/"


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Wrap imports of torch, Lightning and what uses them.

    Garbage collection is off meanwhile, which almost halves the time (benchmarks/startup.py): the imports
    create a million objects that stay, and each collection would walk them all. Later collections skip these objects
    too, so that forked processes share them.

    Ctrl-C ends the process at once. Otherwise torch would swallow it while it imports numpy, which then fails later.
    """

    def end(number: int, frame: Any) -> None:
        os.write(2, b"error: interrupted.\n")
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.freeze()
            atexit.register(gc.unfreeze)  # some libraries complain of frozen objects at the end
            gc.enable()
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def leave(code: int) -> NoReturn:
    """End this process as Python would, but without the cleanup of objects.

    The cleanup takes 1.3 seconds if torch and Lightning are imported. It can also abort: gloo's threads may still
    take the GIL to free tensors of a backward pass (torch 2.15), and a finished rank would count as failed.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it, or it is closed
            stream.flush()
    os._exit(code)
