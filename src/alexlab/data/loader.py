"""Batches, decoded ahead by threads straight into the memory that the device reads.

Threads and not processes: what takes time (reading, decoding, resizing, Pillow) lets other threads run, and Python's
own lock is held for some 30 microseconds an image, so that about twelve cores can be kept busy. There is nothing to
start, to send between processes, to copy, or to die unnoticed.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.utils.data import Sampler

from alexlab.data.dataset import Batch, Broken, ImageDataset, Key
from alexlab.engine.errors import UserError
from alexlab.engine.process import hanging

PIECE = 32  # images at most that a thread takes at once
AHEAD = 3  # batches at least that are begun before they are asked for

# Python waits for an executor's threads when it ends, and these for all that was begun. Its own hook for that is called
# after ours: the last one comes first.
_ending = threading.Event()
threading._register_atexit(_ending.set)  # type: ignore[attr-defined]


class Loader:
    """An iterable of `Batch`; each pass starts anew.

    Args:
        batch_sampler: gives the keys of each batch, and has a length.
        num_workers: threads; 0 decodes when a batch is asked for.
        pinned: whether images lie in memory that a GPU reads by itself (torch keeps such memory for the next batch).
        timeout: seconds that a part of a batch is waited for, by threads; None is for ever.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_sampler: "Sampler[list[Key]]",
        num_workers: int = 0,
        pinned: bool = False,
        timeout: float | None = None,
    ) -> None:
        self.dataset, self.batch_sampler, self.num_workers, self.pinned = dataset, batch_sampler, num_workers, pinned
        self.timeout = timeout
        self._threads: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        waiting: deque[_Begun] = deque()
        try:
            for keys in self.batch_sampler:
                waiting.append(self._begin(keys))
                if sum(len(begun.keys) for begun in waiting) >= self._ahead(len(keys)):
                    yield waiting.popleft().whole(self.timeout)
            while waiting:
                yield waiting.popleft().whole(self.timeout)
        finally:
            for begun in waiting:
                begun.cancel()

    def _ahead(self, size: int) -> int:
        """Images that are begun in all, for batches of `size`: with threads more than they have in hand."""
        return max((AHEAD + 1) * size, 4 * self.num_workers) if self.num_workers else 0

    @torch.inference_mode(
        False
    )  # other threads, which know nothing of the caller's mode, could not write into its memory
    def _begin(self, keys: Sequence[Key]) -> "_Begun":
        begun = _Begun(self.dataset, keys, self.dataset.room(keys, self.pinned))
        if not self.num_workers:
            begun.pieces.append((0, _done(self.dataset.fill(keys, begun.images))))
            return begun
        piece = max(1, min(PIECE, len(keys) // (2 * self.num_workers)))
        for start in range(0, len(keys), piece):
            part = slice(start, start + piece)
            begun.pieces.append((start, self._pool().submit(_fill, self.dataset, keys[part], begun.images[part])))
        return begun

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = decoding_threads(self.num_workers)
        return self._threads


def decoding_threads(count: int) -> ThreadPoolExecutor:
    """Threads without threads of torch's own, which would multiply with them.

    Raises:
        UserError: the system starts no more threads.
    """
    before = torch.get_num_threads()
    ready = threading.Barrier(count + 1)
    pool = ThreadPoolExecutor(count, "loader", _start_thread, (ready,))
    try:
        for _ in range(count):
            pool.submit(int)
        ready.wait()
    except RuntimeError as error:
        ready.abort()  # those that did start would wait for ever
        pool.shutdown(wait=False, cancel_futures=True)
        raise UserError(
            f"num_workers={count}: the system starts no more threads ({error}): give a lower number."
        ) from None
    finally:
        torch.set_num_threads(before)
    return pool


class _Begun:
    """A batch in the making: its pieces by their first row."""

    def __init__(self, dataset: ImageDataset, keys: Sequence[Key], images: torch.Tensor) -> None:
        self.dataset, self.keys, self.images = dataset, keys, images
        self.pieces: list[tuple[int, Future[Broken]]] = []

    def whole(self, timeout: float | None) -> Batch:
        """
        Raises:
            UserError: a piece was not there after `timeout` seconds.
        """
        try:
            broken = [(start + row, why) for start, piece in self.pieces for row, why in piece.result(timeout)]
        except TimeoutError:
            hanging.set()
            reading = ", ".join(self.dataset.index.path(i) for i in list(self.dataset.reading.values()))
            raise UserError(
                f"no image came for {timeout:g} s, and these are still being read: {reading}. Is their disk or network "
                "file system there? trainer.timeout has the minutes that are waited."
            ) from None
        return self.dataset.batch(self.keys, self.images, broken)

    def cancel(self) -> None:
        for _, piece in self.pieces:
            piece.cancel()


def _fill(dataset: ImageDataset, keys: Sequence[Key], images: torch.Tensor) -> Broken:
    return dataset.fill(keys, images, _ending)


def _done(broken: Broken) -> "Future[Broken]":
    future: Future[Broken] = Future()
    future.set_result(broken)
    return future


def _start_thread(ready: threading.Barrier) -> None:
    """What is set here is this thread's, and also of threads that start later, for which the caller puts it back."""
    torch.set_num_threads(1)
    torch.get_num_threads()  # without which the thread's first work would take the number that all have by then
    ready.wait()
