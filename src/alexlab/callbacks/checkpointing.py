"""last.ckpt: after each epoch, at steps and minutes as asked, and where a run is ended; and how to go on from it.

Lightning can write a checkpoint from within its hooks, where some of what belongs to a step or an epoch is done and
some is not: validation, the numbers of an epoch, the rate's next step. What it does with such a file when it is started
again differs by the hook, and a validation or a line of metrics is lost or doubled. Here a checkpoint is written in
three places alone, between two hooks, and holds which: after an optimizer's step, whose validation is still to come
("step"); where a run has ended within an epoch ("end"); and after all of an epoch ("epoch").
"""

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, WeightAveraging
from pytorch_lightning.trainer import call

from alexlab.callbacks.nan_guard import OnNan
from alexlab.callbacks.preemption import Preempted, Preemption
from alexlab.loggers.csv_logger import CsvLogger


class Snapshots(Callback):
    """
    Args:
        path: of last.ckpt.
        every_n_steps: optimizer steps of the run between two files; None writes none within an epoch.
        every_minutes: the same by the first rank's clock.
        preemption: says where a signal is to end the run.
        on_nan: looks, before a file is written, whether the weights are spoiled.
    """

    def __init__(
        self,
        path: Path,
        preemption: Preemption,
        on_nan: OnNan,
        every_n_steps: int | None = None,
        every_minutes: float | None = None,
    ) -> None:
        self.path, self.preemption, self.on_nan = path, preemption, on_nan
        self.every_n_steps, self.every_minutes = every_n_steps, every_minutes
        self.written_at = time.monotonic()
        self.held = False  # whether a stop waits for the end of an accumulation
        self.time_up = False  # whether the run has ended within an epoch, to be prolonged from a "step"

    def install(self, trainer: pl.Trainer) -> None:
        """Stand between Lightning's hooks."""
        epochs: Any = trainer.fit_loop
        steps = epochs.epoch_loop
        self.trainer = trainer
        # where max_steps ends a run Lightning counts an epoch anew that it goes on from the end of
        epochs._iteration_based_training = lambda: False
        self.after_step, self.after_epoch, self.before_steps = (
            steps.on_advance_end, epochs.on_advance_end, steps.on_run_start,
        )  # fmt: skip
        steps.on_advance_end, epochs.on_advance_end = self._after_step, self._after_epoch
        steps.on_run_start = self._before_steps

    # -- writing

    def _after_step(self, fetcher: Any) -> None:
        """In place of Lightning's own, which validates where it is time, and counts the step."""
        loop: Any = self.trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            self._within_accumulation(fetcher)
            return
        self.trainer.should_stop |= self.held
        at_end = loop.max_steps != -1 and loop.global_step >= loop.max_steps  # "end" is written then
        if not at_end:
            if self.preemption.stop:
                self.save("step")
                raise Preempted(self.preemption.stop)
            stops: bool = self.trainer.should_stop and self.trainer.fit_loop._can_stop_early
            self.time_up = stops and not self._stopped_early()
            # Lightning validates a run that stops out of turn, which is not to be seen where it is prolonged
            if not loop._num_ready_batches_reached() and (self._due() or self.time_up):
                self.save("step")
        try:
            self.after_step(fetcher)
        except Preempted:  # in the validation, which is done again
            self._end_validation()
            self.save("step")
            raise

    def _within_accumulation(self, fetcher: Any) -> None:
        """Nothing ends a run here: the gradients so far are in no checkpoint."""
        self._hold()
        with self.preemption.waiting():
            self.after_step(fetcher)
        self._hold()  # early stopping, that is

    def _hold(self) -> None:
        self.held |= self.trainer.should_stop
        self.trainer.should_stop = False

    def _stopped_early(self) -> bool:
        stoppers = [each for each in self.trainer.callbacks if isinstance(each, EarlyStopping)]  # type: ignore[attr-defined]
        return any(each.wait_count >= each.patience for each in stoppers)

    def _after_epoch(self) -> None:
        loop: Any = self.trainer.fit_loop.epoch_loop
        whole = loop._num_ready_batches_reached()
        if not whole and not self.time_up:
            self.save("end")
        self.after_epoch()
        if whole:
            self.save("epoch")
        if self.preemption.stop:
            raise Preempted(self.preemption.stop)

    def _due(self) -> bool:
        """Whether it is time for another file. `wished` is what the ranks have agreed on."""
        by_step = self.every_n_steps is not None and self.trainer.global_step % self.every_n_steps == 0
        if self.every_minutes is not None and time.monotonic() - self.written_at >= 60 * self.every_minutes:
            self.preemption.wish = 1
        by_clock, self.preemption.wished = self.preemption.wished, 0
        return by_step or bool(by_clock)

    def save(self, place: str) -> None:
        """Write the file, on all ranks together."""
        trainer, model = self.trainer, self.trainer.lightning_module
        nans = self.on_nan.before_saving(trainer)
        rows = [logger.sync() for logger in trainer.loggers if isinstance(logger, CsvLogger)]
        model.place = {"of": place, "rows": rows[0] if rows else None, **nans}  # type: ignore[assignment]
        try:
            trainer.save_checkpoint(self.path)
        finally:
            model.place = None  # type: ignore[assignment]
        self.written_at = time.monotonic()
        self.preemption.grant()

    def _end_validation(self) -> None:
        """Leave a validation as if it had not begun."""
        self.trainer.training = True
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):  # the average stood in for the weights
                callback.on_validation_epoch_end(self.trainer, self.trainer.lightning_module)

    # -- going on

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        # of a validation before the checkpoint: plateaus, early stopping and the epoch's line may ask for it
        known = pl_module.progress.get("metrics", {})
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in known.items()})
        if pl_module.came_from == "epoch":  # nothing is left of it to be done
            trainer.fit_loop.restarting = False
        if pl_module.came_from in ("epoch", "end"):
            trainer.should_stop |= self._stopped_early()

    def _before_steps(self, fetcher: Any) -> None:
        """In place of Lightning's own, which finds its place among the epoch's batches."""
        self.before_steps(fetcher)
        trainer, model = self.trainer, self.trainer.lightning_module
        came_from, model.came_from = model.came_from, None  # type: ignore[assignment]
        if came_from not in ("step", "end"):
            return
        loop: Any = trainer.fit_loop.epoch_loop
        trainer.fit_loop.restarting = False  # and so all loops'
        loop.reset_restart_stage()
        loop.val_loop.reset_restart_stage()
        # which Lightning leaves out within an epoch
        call._call_callback_hooks(trainer, "on_train_epoch_start")
        model.restore_sums()  # type: ignore[operator]
        if came_from == "step":
            self._do_what_is_owed(fetcher)

    def _do_what_is_owed(self, fetcher: Any) -> None:
        try:
            self.after_step(fetcher)
        except Preempted:
            self._end_validation()
            raise  # the file is still the one of this step
