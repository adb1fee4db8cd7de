"""The loader's processes: how they start, and when they end."""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext

ENDING = {signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])}
LOOK = 2.0  # seconds between a worker's looks at whether its rank is still there


def context(ranks: int) -> BaseContext | None:
    """What starts the workers of one of several `ranks`; None is the platform's own way (fork, on Linux).

    A process with gloo's threads must not be forked: they take the GIL whenever they free what a backward pass has
    sent, and where one is about to, Python 3.11's child waits for a lock that nobody holds any more. A run in some
    thousand was seen to hang that way, for ever. A server that was started by itself is forked in the rank's place.
    """
    if ranks == 1 or sys.platform != "linux":
        return None
    start_server()
    return multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start the server that a rank's workers are forked from, if it does not run; it imports what they need beside
    what the rank does meanwhile."""
    forkserver.set_forkserver_preload(["alexlab.data.dataset", "alexlab.config"])
    # A signal to the whole job must not end the two servers: what is started with signals blocked keeps them so.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # which it has unblocked
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker(worker: int) -> None:
    """One thread: there are as many workers as cores. Signals that end a run are the rank's to answer: a terminal or
    a scheduler sends them to the workers as well, and the rank would report a worker that died."""
    import torch

    torch.set_num_threads(1)
    for number in ENDING - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_rank, daemon=True).start()


def _end_with_the_rank() -> None:
    """End when the rank has died, or at a SIGTERM from it, with which it stops its workers; ignore all others."""
    rank = multiprocessing.parent_process()
    assert rank is not None
    while rank.is_alive():
        got = signal.sigtimedwait({signal.SIGTERM}, LOOK)
        if got is not None and got.si_pid == rank.pid:
            break
    os._exit(0)
