"""Batches that threads decode ahead, directly into the memory that the device reads.

The loader uses threads, not processes. Reading, decoding and resizing release the GIL, which is held for about 30
microseconds per image, so one process can keep about twelve cores busy. No processes must be started, none can die, and
no images are copied between them.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from alexlab.data.dataset import Batch, BrokenRows, ImageDataset
from alexlab.data.reader_threads import ReaderThreads
from alexlab.data.sampler import Key
from alexlab.engine.errors import UserError

CHUNK = 32  # the most images that a thread takes at once
AHEAD = 3  # batches that are begun before they are needed


class _PendingBatch(NamedTuple):
    """A batch in progress, which consists of chunks: (first row, future of the broken rows)."""

    keys: Sequence[Key]
    images: torch.Tensor
    chunks: list[tuple[int, "Future[BrokenRows]"]]


@dataclass(eq=False)
class Loader:
    """An iterable of `Batch`; each iteration is one pass over the batches of the sampler."""

    dataset: ImageDataset
    batch_sampler: "Sampler[list[Key]]"
    num_workers: int = 0  # threads; with 0, the caller's thread decodes each batch when it is needed
    pinned: bool = False  # write images to pinned memory, which a GPU reads directly and torch reuses
    timeout: float | None = None  # seconds to wait for a part of a batch, before a UserError; None waits forever
    _threads: ReaderThreads | None = field(default=None, init=False)

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        waiting: deque[_PendingBatch] = deque()
        try:
            for keys in self.batch_sampler:
                waiting.append(self._begin(keys))
                # images in progress: with threads, enough that none of them is idle
                ahead = max((AHEAD + 1) * len(keys), 4 * self.num_workers) if self.num_workers else 0
                if sum(len(pending.keys) for pending in waiting) >= ahead:
                    yield self._finish(waiting.popleft())
            while waiting:
                yield self._finish(waiting.popleft())
        finally:
            for pending in waiting:
                for _, chunk in pending.chunks:
                    chunk.cancel()

    # reader threads could not write tensors that were created in the caller's inference mode
    @torch.inference_mode(False)
    def _begin(self, keys: Sequence[Key]) -> _PendingBatch:
        pending = _PendingBatch(keys, self.dataset.allocate(keys, self.pinned), [])
        if not self.num_workers:
            done: Future[BrokenRows] = Future()
            done.set_result(self.dataset.fill(keys, pending.images))
            pending.chunks.append((0, done))
            return pending
        if self._threads is None:
            self._threads = ReaderThreads(self.num_workers)
        size = max(1, min(CHUNK, len(keys) // (2 * self.num_workers)))
        for start in range(0, len(keys), size):
            rows = slice(start, start + size)
            future = self._threads.submit(self.dataset.fill, keys[rows], pending.images[rows], self._threads.stop)
            pending.chunks.append((start, future))
        return pending

    def _finish(self, pending: _PendingBatch) -> Batch:
        try:
            chunks = [(start, chunk.result(self.timeout)) for start, chunk in pending.chunks]
        except TimeoutError:
            reading = ", ".join(self.dataset.index.path(i) for i in list(self.dataset.reading.values()))
            raise UserError(
                f"no image arrived for {self.timeout:g} s, and these are still being read: {reading}. Does their disk "
                "or network file system respond? trainer.timeout sets how many minutes to wait."
            ) from None
        broken = [(start + row, reason) for start, rows in chunks for row, reason in rows]
        return self.dataset.to_batch(pending.keys, pending.images, broken)
