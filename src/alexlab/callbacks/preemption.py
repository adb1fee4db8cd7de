"""SIGTERM, SIGUSR1 and Ctrl-C stop a run at the same batch on all ranks, so that each can report how it stopped.

Lightning broadcasts from inside the signal handler, wherever the rank is at that moment, and waits for the device
before each batch to learn about a signal. Ranks were seen to deadlock. Here the handler only records the signal. The
ranks compare their records over gloo while they train, and each reads the result one batch later.
"""

import contextlib
import signal
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preempted(BaseException):
    """A signal stopped the run; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class SignalRecorder:
    """Record the first signal.

    Attributes:
        number: of the signal, or 0.
        is_polled: whether the training loop will read `number`. If not, the handler raises Preempted at once.
    """

    def __init__(self) -> None:
        self.number = 0
        self.is_polled = False

    def record(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. A second Ctrl-C raises Preempted at once."""
        second = self.number and number == signal.SIGINT
        self.number = self.number or number
        if second or not self.is_polled:
            raise Preempted(number)

    @contextlib.contextmanager
    def recording(self) -> Iterator["SignalRecorder"]:
        """Handle signals while the block runs."""
        previous = {number: signal.signal(number, self.record) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class Preemption(Callback):
    """Find out, on all ranks at the end of the same batch, whether any of them received a signal.

    After a signal, validation and test raise Preempted. Training sets `stop`, because the checkpoint callback writes
    last.ckpt first. The ranks agree in the same way that it is time for a checkpoint, as their clocks differ.

    Args:
        recorder: records this rank's signals.
        timeout: how long a rank waits for the other ranks; None is torch's default.

    Attributes:
        stop: the signal that any rank received, or 0.
        wants_checkpoint: whether this rank wants a checkpoint.
        checkpoint_due: whether any rank wanted one, as of the batch before.
    """

    def __init__(self, recorder: SignalRecorder, timeout: timedelta | None = None) -> None:
        self.recorder, self.timeout = recorder, timeout
        self.stop = 0
        self.wants_checkpoint = self.checkpoint_due = False
        self._group: Any = None
        self._pending: Any = None  # the comparison in progress
        self._values = torch.zeros(2, dtype=torch.int64)  # what is compared: signal, wants_checkpoint
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
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)
        self.recorder.is_polled = True

    def agree(self, trainer: pl.Trainer) -> None:
        """Compare the records, wait for the result, and raise Preempted if any rank received a signal.

        This is for points after which no batch follows.
        """
        self._compare(trainer)
        self._read_result()
        self._raise_if_stopped()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._compare(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._compare(trainer)
        self._raise_if_stopped()

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def _compare(self, trainer: pl.Trainer) -> None:
        """Start to compare the records of all ranks, and read the result of the batch before."""
        if trainer.world_size == 1:
            self.stop, self.checkpoint_due = self.recorder.number, self.wants_checkpoint
            return
        self._read_result()
        self._values[0], self._values[1] = self.recorder.number, self.wants_checkpoint
        self._pending = dist.all_reduce(self._values, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _read_result(self) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
            self.stop, due = self._values.tolist()
            self.checkpoint_due |= bool(due)

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
