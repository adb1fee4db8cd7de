"""Threads that read and decode images, and that a process can leave behind when a disk hangs."""

import atexit
import contextlib
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import Any

import torch

from alexlab.engine.errors import UserError

EXIT_WAIT = 2.0  # seconds that an exiting process waits for threads to finish the image that they have begun

_Tasks = SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]  # None ends the thread


class ReaderThreads(Executor):
    """Threads that read and decode images.

    Two things differ from a ThreadPoolExecutor. Nothing waits for these threads without a limit, so that a process can
    exit while a thread hangs on a disk. And torch's operations start no further threads in them: these would be more
    than the cores.

    Raises:
        UserError: the system does not allow that many threads.
    """

    def __init__(self, count: int) -> None:
        self.stop = threading.Event()  # set when the process exits; a long task should check it, and return early
        self._tasks: _Tasks = SimpleQueue()
        before = torch.get_num_threads()
        ready = threading.Barrier(count + 1)
        self._readers = [_Reader(self._tasks, self.stop, ready) for _ in range(count)]
        self._end = weakref.finalize(self, _end_readers, self._tasks, count)
        self._end.atexit = False  # see `_stop_all_readers`
        try:
            for reader in self._readers:
                reader.start()
            ready.wait()
        except RuntimeError as error:
            ready.abort()  # the threads that did start would wait forever
            raise UserError(
                f"num_workers={count}: the system starts no more threads ({error}): choose a lower number."
            ) from None
        finally:
            torch.set_num_threads(before)

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        assert not kwargs
        future: Future[Any] = Future()
        self._tasks.put((future, function, args))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads after the work that was submitted."""
        self._end()
        for reader in self._readers if wait else ():
            reader.join()


class _Reader(threading.Thread):
    """One of `ReaderThreads`, without a reference to that object, so that it ends when the object is deleted."""

    def __init__(self, tasks: _Tasks, stop: threading.Event, ready: threading.Barrier) -> None:
        super().__init__(name="alexlab reader", daemon=True)
        self.tasks, self.stop, self.ready = tasks, stop, ready

    def run(self) -> None:
        # this sets the number for this thread, and for threads that start later, where `ReaderThreads` sets it back
        torch.set_num_threads(1)
        torch.get_num_threads()  # without this, the thread's first work would use the number that is set by then
        with contextlib.suppress(threading.BrokenBarrierError):
            self.ready.wait()
            while (task := self.tasks.get()) is not None:
                if not self.stop.is_set():
                    _run(*task)
                del task  # do not keep the task's images in memory until the next task comes


def _run(future: "Future[Any]", function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
            del future  # the error refers to this frame


def _end_readers(tasks: _Tasks, count: int) -> None:
    for _ in range(count):
        tasks.put(None)


@atexit.register
def _stop_all_readers() -> None:
    """Let all threads finish the image that they have begun, as torch crashes in a thread that outlives Python."""
    readers = [thread for thread in threading.enumerate() if isinstance(thread, _Reader)]
    for reader in readers:
        reader.stop.set()
        reader.tasks.put(None)
    deadline = time.monotonic() + EXIT_WAIT
    for reader in readers:
        reader.join(max(0.0, deadline - time.monotonic()))
