"""The heavy imports: done fast, ended cleanly by Ctrl-C, and left without being taken apart."""

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn


def cores() -> int:
    """Return how many cores this process may use: a job of a scheduler often has fewer than the machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS has no affinities


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports of torch, Lightning and what uses them.

    No garbage is collected meanwhile, which takes a fifth off their time: they make some million objects that stay, and
    each collection walks them all. Those are left out of later collections too, so that forked processes share them.

    Ctrl-C ends the process at once: torch swallows it where it imports numpy, and numpy would fail later.
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
            atexit.register(gc.unfreeze)  # for a Python that ends as usual: some libraries complain of what is left
            gc.enable()
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)


def leave(code: int) -> NoReturn:
    """End this process as Python would, but without taking its objects apart.

    That takes 1.3 seconds where torch and Lightning are imported. With gloo it can abort as well: its threads may still
    take the GIL to free what a backward pass has sent (torch 2.15), and a rank that has finished would count as failed.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a reader that has gone, a closed stream
            stream.flush()
    os._exit(code)


def nothing_follows(caller: FrameType | None) -> bool:
    """Whether the process ends when `caller`, the frame of a script, has: it is run by no profiler, debugger or other
    program, and torch's objects are there to be left."""
    return caller is not None and caller.f_back is None and not sys.flags.interactive and "torch" in sys.modules
