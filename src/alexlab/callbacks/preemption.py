"""SIGTERM, SIGUSR1 and Ctrl-C end a run at the same batch on all ranks, so that each can say how it ended.

Lightning broadcasts from inside its signal handler, wherever the rank is then, and before each batch waits for the
device to hear of it: ranks were seen to wait for each other for ever. Here a signal leaves a note; the notes travel
beside the training, over gloo, and each rank looks at the answer one batch later.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback

SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class Preempted(BaseException):
    """A signal ended the run.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


class Notes:
    """The first signal that has come, or 0."""

    def __init__(self) -> None:
        self.number = 0
        self.looked_at = False  # whether a callback looks at `number` soon; else the handler raises

    def take(self, number: int, frame: FrameType | None) -> None:
        again = self.number and number == signal.SIGINT
        self.number = self.number or number
        if again or not self.looked_at:
            raise Preempted(number)

    @contextlib.contextmanager
    def taken(self) -> Iterator["Notes"]:
        """Take the signals' notes while the block runs."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self.take) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Preemption(Callback):
    """Finds out, on all ranks at the end of the same batch, that any of them has got a signal: raises Preempted, or
    while training says so in `stop`, as a checkpoint is written first.

    Attributes:
        stop: the signal, or 0.
        wish, wished: 1 where this rank, or any, wants a checkpoint.
    """

    def __init__(self, notes: Notes, timeout: timedelta | None = None) -> None:
        self.notes, self.timeout = notes, timeout
        self.group: Any = None
        self.asked: Any = None
        self.numbers = torch.zeros(2, dtype=torch.int64)
        self.stop = self.wish = self.wished = 0
        self.waits = False

    def install(self, trainer: pl.Trainer) -> None:
        """Take Lightning's own handling out."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1 and self.group is None:
            self.group = dist.new_group(backend="gloo", timeout=self.timeout)
        self.notes.looked_at = True

    def agree(self, trainer: pl.Trainer) -> None:
        """Ask all ranks and wait for the answer, where no batch follows that would be asked at."""
        self._look(trainer)
        self._answer()
        self._end()

    def on_train_batch_end(self, trainer: pl.Trainer, *words: Any) -> None:
        self._look(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *words: Any) -> None:
        self._look(trainer)
        self._end()

    def on_test_batch_end(self, trainer: pl.Trainer, *words: Any) -> None:
        self._look(trainer)
        self._end()

    def _look(self, trainer: pl.Trainer) -> None:
        """Ask all ranks for their notes, and take the answer to the question of the batch before."""
        if trainer.world_size == 1:
            self.stop, self.wished = self.notes.number, self.wish
            return
        self._answer()
        self.numbers[0], self.numbers[1] = self.notes.number, self.wish
        self.asked = dist.all_reduce(self.numbers, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def _answer(self) -> None:
        if self.asked is not None:
            self.asked.wait()
            self.asked = None
            self.stop, wished = self.numbers.tolist()
            self.wished |= wished

    def grant(self) -> None:
        """The wish for a checkpoint is fulfilled, that of a question on its way included."""
        self._answer()
        self.wish = self.wished = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """No Preempted is raised meanwhile."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def _end(self) -> None:
        if self.stop and not self.waits:
            raise Preempted(self.stop)
