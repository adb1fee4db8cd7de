"""SIGTERM, SIGUSR1 and Ctrl-C stop a run at the same batch on all ranks, so that each can report how it stopped.

Lightning broadcasts from inside the signal handler, wherever the rank is at that moment, and waits for the device
before each batch to learn about a signal. Ranks were seen to deadlock. Here the handler only records the signal. The
ranks compare their records over gloo while they train, and each reads the result one batch later.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback

from alexlab.engine.ranks import Ranks
from alexlab.engine.signals import Preempted, SignalRecorder

COMPARE_SECONDS, MAX_BATCHES_APART = 1.0, 32  # between two comparisons


class Preemption(Callback):
    """Find out, on all ranks at the end of the same batch, whether any of them received a signal.

    The ranks compare their records about once a second, and at most `MAX_BATCHES_APART` batches apart: with 32 ranks on
    gloo a comparison takes 15 ms. How many batches apart is compared too, because their clocks differ.

    After a signal, validation and test raise Preempted. Training sets `stop`, because the checkpoint callback writes
    last.ckpt first. The ranks agree in the same way that it is time for a checkpoint, as their clocks differ.
    """

    def __init__(self, recorder: SignalRecorder, ranks: Ranks | None = None) -> None:
        self.recorder, self.ranks = recorder, ranks or Ranks()
        self.stop = 0  # the signal that any rank received
        self.wants_checkpoint = False  # whether this rank wants a checkpoint
        self.checkpoint_due = False  # whether any rank wanted one, as of the last comparison
        self._group: Any = None
        self._pending: Any = None  # the comparison in progress
        # what is compared: signal, wants_checkpoint, and the negated interval to the next comparison, so that MAX gives
        # the smallest
        self._values = torch.zeros(3, dtype=torch.int64)
        self._interval, self._batches, self._since = 1, 0, time.monotonic()
        self._postponed = False

    def install(self, trainer: pl.Trainer) -> None:
        """Switch off Lightning's own signal handling. Raises AttributeError if Lightning has moved it."""
        connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
        for owner, name in ((connector, "register_signal_handlers"), (loop, "_broadcast_sigterm_tensor")):
            if not hasattr(owner, name):
                raise AttributeError(f"Lightning {pl.__version__} has no {type(owner).__name__}.{name}: use 2.6.")
            setattr(owner, name, lambda: None)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size > 1 and self._group is None:
            self._group = self.ranks.gloo
        self.recorder.is_polled = True

    def agree(self, trainer: pl.Trainer) -> None:
        """Compare the records, wait for the result, and raise Preempted if any rank received a signal.

        This is for points after which no batch follows.
        """
        self._compare(trainer, now=True)
        self._read_result()
        self._raise_if_stopped()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._compare(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._compare(trainer)
        self._raise_if_stopped()

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def _compare(self, trainer: pl.Trainer, now: bool = False) -> None:
        """Start to compare the records of all ranks if it is time, and read the result of the batch before."""
        if trainer.world_size == 1:
            self.stop, self.checkpoint_due = self.recorder.number, self.wants_checkpoint
            return
        self._read_result()
        self._batches += 1
        if self._batches < self._interval and not now:
            return
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        fitting = int(self._batches * COMPARE_SECONDS / max(seconds, 1e-9))
        following, self._batches = max(1, min(fitting, 2 * self._interval, MAX_BATCHES_APART)), 0
        self._values = torch.tensor([self.recorder.number, self.wants_checkpoint, -following])
        self._pending = dist.all_reduce(self._values, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _read_result(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self.stop, due, following = self._values.tolist()
            self.checkpoint_due |= bool(due)
            self._interval = -following

    def _raise_if_stopped(self) -> None:
        if self.stop and not self._postponed:
            raise Preempted(self.stop)

    def checkpoint_written(self) -> None:
        """Clear all requests for a checkpoint, including those that are being compared."""
        self._read_result()
        self.wants_checkpoint = self.checkpoint_due = False

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """Raise no Preempted while the block runs."""
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False
