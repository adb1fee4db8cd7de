"""best.ckpt and last.ckpt, and the exact resume from last.ckpt. The only file that changes Lightning's loops.

best.ckpt has weights only, of the best validation. last.ckpt has everything, and is written after each epoch, every few
steps or minutes if wanted, and when a run stops.

Lightning writes checkpoints from within hooks, when a step or an epoch is only partly done: the validation, the
metrics of the epoch or the next learning rate may be missing. Depending on the hook, a run that resumes from such a
file loses or repeats a validation or a row of metrics. Here last.ckpt is written at three points only, between two
hooks, and stores which one: after an optimizer step, before the validation ("step"); when a run stopped within an epoch
("end"); and after everything of an epoch ("epoch").
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback, EarlyStopping, WeightAveraging
from pytorch_lightning.trainer import call
from torch import Tensor
from torchmetrics import Metric

from alexlab.callbacks.nan_guard import NanGuard
from alexlab.callbacks.preemption import Preemption
from alexlab.engine.checkpoint_io import LAST, position_of
from alexlab.engine.errors import UserError
from alexlab.engine.signals import Preempted
from alexlab.loggers.csv_logger import CsvLogger
from alexlab.tasks.base import BaseTask
from alexlab.tasks.metrics import LossAndAccuracy

# the parts of Lightning that this file replaces or reads, some of which are private
FIT_LOOP_PARTS = ("_iteration_based_training", "_can_stop_early", "on_advance_end")
EPOCH_LOOP_PARTS = ("on_advance_end", "on_run_start", "_should_accumulate", "_num_ready_batches_reached")
CALL_PARTS = ("_call_callback_hooks", "_call_lightning_module_hook")


@dataclass(eq=False)
class Checkpointing(Callback):
    """Write best.ckpt and last.ckpt, and resume from last.ckpt.

    The state that differs between ranks (sums of the metrics, BatchNorm's statistics) is gathered from all of them. If
    the number of ranks changes, the first rank gets the sums of all, and each rank gets the mean statistics.
    """

    folder: Path  # for best.ckpt and last.ckpt
    preemption: Preemption
    nan_guard: NanGuard
    every_n_steps: int | None = None  # from one last.ckpt within an epoch to the next; None is never
    every_minutes: float | None = None  # the same, by the clock
    steps_per_epoch: int = 0  # stored in last.ckpt, because a resumed run must have the same
    restores_best: bool = False  # whether to restore the best metrics of a resumed run, whose best.ckpt is in `folder`

    def __post_init__(self) -> None:
        self.best_path, self.last_path = self.folder / "best.ckpt", self.folder / LAST
        self.only_epochs = False  # whether a resume must start at the end of an epoch, because the loaders are not ours
        self.validated_at = -1  # optimizer steps of the run at the last validation
        self.restored_metrics: dict[str, float] = {}  # the last values of all metrics, of the resumed checkpoint
        self.world_sizes: list[tuple[int, int]] = []  # (step, ranks) where their number changed
        self._written_at = time.monotonic()
        self._position: dict[str, Any] = {}  # of the last.ckpt that is being written
        self._ranks: list[dict[str, Any]] = []  # the state of each rank in the checkpoint that this run resumes
        self._resumed_point: str | None = None  # the point of that checkpoint, until training has started from it
        self._stop_held = False  # whether a stop waits for the end of an accumulation
        self._out_of_time = False  # whether the run stops within an epoch, as Timer does

    def install(self, trainer: pl.Trainer) -> None:
        """Replace the ends of Lightning's steps and epochs. Raises AttributeError if Lightning's loops have changed."""
        epochs: Any = trainer.fit_loop
        steps: Any = epochs.epoch_loop
        for owner, names in ((epochs, FIT_LOOP_PARTS), (steps, EPOCH_LOOP_PARTS), (call, CALL_PARTS)):
            for name in names:
                if not hasattr(owner, name):
                    raise AttributeError(f"Lightning {pl.__version__} has no {type(owner).__name__}.{name}: use 2.6.")
        self.trainer = trainer
        epochs._iteration_based_training = lambda: False  # after max_steps, Lightning counts the resumed epoch twice
        self._lightnings_step_end, self._lightnings_epoch_end = steps.on_advance_end, epochs.on_advance_end
        self._lightnings_steps_start = steps.on_run_start
        steps.on_advance_end, epochs.on_advance_end = self._after_step, self._after_epoch
        steps.on_run_start = self._before_steps

    # -- when to write

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking:
            return
        self.validated_at = trainer.fit_loop.epoch_loop.global_step
        if not isinstance(pl_module, BaseTask):  # by `adopt`: what the module logs is known now
            pl_module.compare_with_best({k: float(v) for k, v in trainer.callback_metrics.items() if k[:4] == "val/"})
        if pl_module.improved:
            trainer.save_checkpoint(self.best_path, weights_only=True)

    def _after_step(self, fetcher: Any) -> None:
        """Replace Lightning's own end of a batch, which validates if it is time, and counts the step."""
        loop: Any = self.trainer.fit_loop.epoch_loop
        if loop._should_accumulate():  # nothing may stop the run before the step: no checkpoint has the gradients
            self._hold_stop()
            with self.preemption.postponed():
                self._lightnings_step_end(fetcher)
            self._hold_stop()  # early stopping may have asked for a stop
            return
        self.trainer.should_stop |= self._stop_held
        at_max_steps = loop.max_steps != -1 and loop.global_step >= loop.max_steps  # "end" follows
        if not at_max_steps:
            if self.preemption.stop:
                self.save("step")
                raise Preempted(self.preemption.stop)
            stops: bool = self.trainer.should_stop and self.trainer.fit_loop._can_stop_early
            self._out_of_time = stops and not self._stopped_early()
            # Lightning validates if a run stops within an epoch. Save first: a prolonged run must lack that validation.
            if not loop._num_ready_batches_reached() and (self._is_due() or self._out_of_time):
                self.save("step")
        self._finish_step(fetcher)

    def _finish_step(self, fetcher: Any) -> None:
        """Do what follows a step's checkpoint: validate, if it is time, and count the step."""
        try:
            self._lightnings_step_end(fetcher)
        except Preempted:  # within the validation, which the resumed run repeats
            self.trainer.training = True
            for averaging in self._averaging():  # swaps average and weights back
                averaging.on_validation_epoch_end(self.trainer, self.trainer.lightning_module)
            self.save("step")
            raise

    def _hold_stop(self) -> None:
        self._stop_held |= self.trainer.should_stop
        self.trainer.should_stop = False

    def _stopped_early(self) -> bool:
        stoppers = [c for c in self.trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
        return any(stopper.wait_count >= stopper.patience for stopper in stoppers)

    def _averaging(self) -> list[WeightAveraging]:
        return [c for c in self.trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]

    def _after_epoch(self) -> None:
        """Replace Lightning's own end of an epoch."""
        whole = self.trainer.fit_loop.epoch_loop._num_ready_batches_reached()
        if not whole and not self._out_of_time:
            self.save("end")
        self._lightnings_epoch_end()
        if whole:
            self.save("epoch")
        if self.preemption.stop:
            raise Preempted(self.preemption.stop)

    def _is_due(self) -> bool:
        by_step = self.every_n_steps is not None and self.trainer.global_step % self.every_n_steps == 0
        if self.every_minutes is not None and time.monotonic() - self._written_at >= 60 * self.every_minutes:
            self.preemption.wants_checkpoint = True
        by_clock, self.preemption.checkpoint_due = self.preemption.checkpoint_due, False
        return by_step or by_clock

    # -- last.ckpt

    def save(self, point: str) -> None:
        """Write last.ckpt, on all ranks together. Raises UserError if the weights are NaN or infinite.

        Args:
            point: "step", "end" or "epoch", see above.
        """
        trainer, model = self.trainer, self.trainer.lightning_module
        if self.only_epochs and point == "step":
            self._written_at = time.monotonic()
            self.preemption.checkpoint_written()
            return
        self.nan_guard.check(trainer, weights=True)
        model.share_skipped()  # type: ignore[operator]
        rows = [logger.sync() for logger in trainer.loggers if isinstance(logger, CsvLogger)]
        self._position = {
            "of": point,
            "rows": rows[0] if rows else None,  # of metrics.csv
            "epochs": trainer.fit_loop.epoch_progress.current.completed,
            "steps_per_epoch": self.steps_per_epoch,
            "validated_at": self.validated_at,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "skipped": model.skipped,
            "world_sizes": self.world_sizes,
            "ranks": self._gather_ranks(model),
        }
        try:
            trainer.save_checkpoint(self.last_path)
        finally:
            self._position = {}
        self._written_at = time.monotonic()
        self.preemption.checkpoint_written()

    def state_dict(self) -> dict[str, Any]:
        return self._position  # empty, and so not stored, in a checkpoint that a user's own callback writes

    def _gather_ranks(self, model: Any) -> list[dict[str, Any]]:
        """Gather the state that differs between ranks: the training metrics, and BatchNorm's statistics, also those of
        averaged weights."""
        own: dict[str, Any] = {"metrics": {name: _to(m.metric_state, "cpu") for name, m in _metrics(model).items()}}
        if self.trainer.world_size == 1:  # the statistics are in the state dict
            return [own]
        names = [name for name, buffer in model.net.named_buffers() if buffer.is_floating_point()]
        own["buffers"] = {name: model.net.get_buffer(name).cpu() for name in names}
        for averaging in self._averaging():
            average: dict[str, Any] = {"state_dict": {}}
            averaging.on_save_checkpoint(self.trainer, model, average)
            own["average"] = {name: average["state_dict"][f"net.{name}"].cpu() for name in names}
        ranks: list[dict[str, Any]] = [{}] * self.trainer.world_size
        dist.all_gather_object(ranks, own)
        return ranks

    # -- resume

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        if self.restores_best:
            pl_module.best, pl_module.best_epoch = checkpoint["alexlab"]["best"], checkpoint["alexlab"]["best_epoch"]
        position = position_of(checkpoint) or {}
        self._ranks, self._resumed_point = _ranks_of(position), position.get("of")
        self.validated_at = position.get("validated_at", -1)
        self.restored_metrics = position.get("metrics", {})
        self.world_sizes = position.get("world_sizes", [(0, len(self._ranks))] if self._ranks else [])
        pl_module.skipped = dict(position.get("skipped", {}))
        for name, value in self._statistics("average").items():  # WeightAveraging, a later callback, reads them
            checkpoint["state_dict"][f"net.{name}"] = value

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not self.world_sizes or self.world_sizes[-1][1] != trainer.world_size:
            self.world_sizes = [*self.world_sizes, (trainer.global_step, trainer.world_size)]
        # metrics of a validation before the checkpoint: plateau schedules, early stopping and the log may read them
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.restored_metrics.items()})
        if self._resumed_point == "epoch":  # nothing of the epoch is left to do
            trainer.fit_loop.restarting = False
        if self._resumed_point in ("epoch", "end"):
            trainer.should_stop |= self._stopped_early()

    def _before_steps(self, fetcher: Any) -> None:
        """Replace Lightning's own start of an epoch's batches, which restores the position in the epoch."""
        self._lightnings_steps_start(fetcher)
        trainer = self.trainer
        point, self._resumed_point = self._resumed_point, None
        if point not in ("step", "end"):
            return
        loop: Any = trainer.fit_loop.epoch_loop
        trainer.fit_loop.restarting = False  # and with it all loops
        loop.reset_restart_stage()
        loop.val_loop.reset_restart_stage()
        # Lightning does not call these hooks within an epoch
        call._call_callback_hooks(trainer, "on_train_epoch_start")
        call._call_lightning_module_hook(trainer, "on_train_epoch_start")
        self._restore_ranks()
        if point == "step":
            self._finish_step(fetcher)

    def _restore_ranks(self) -> None:
        """Restore what `_gather_ranks` gathered.

        Raises:
            UserError: the number of ranks changed, and a user's metric cannot add the states of several ranks.
        """
        model: Any = self.trainer.lightning_module
        ranks, rank = self._ranks, self.trainer.global_rank
        for name, metric in _metrics(model).items():
            states = [_to(each["metrics"][name], model.device) for each in ranks if name in each["metrics"]]
            if len(ranks) == self.trainer.world_size:
                for key, value in (states[rank] if states else {}).items():
                    setattr(metric, key, value)
                continue
            for state in states if rank == 0 else []:
                try:
                    metric.merge_state(state)
                except (RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
                    raise UserError(
                        f"The metric {name} cannot be resumed on {self.trainer.world_size} ranks instead of "
                        f"{len(ranks)} ({error}): resume on {len(ranks)}."
                    ) from error
        for name, value in self._statistics("buffers").items():
            model.net.get_buffer(name).copy_(value)

    def _statistics(self, key: str) -> dict[str, Tensor]:
        """Return BatchNorm's saved statistics for this rank; the mean over all if the number of ranks changed."""
        ranks = [each[key] for each in self._ranks if key in each]
        if len(ranks) == self.trainer.world_size:
            return ranks[self.trainer.global_rank]
        return {name: torch.stack([each[name] for each in ranks]).mean(0) for name in (ranks[0] if ranks else {})}


def _ranks_of(position: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what `_gather_ranks` gathered, also from a checkpoint of an older version, which has sums (ranks, 8), and
    buffers (ranks, ...) for several ranks."""
    ranks = []
    for rank, sums in enumerate(position.get("sums", [])):
        metrics = {LossAndAccuracy.__name__: {"past": sums[:4], "window": sums[4:]}}
        buffers = {"buffers": {name: values[rank] for name, values in position.get("buffers", {}).items()}}
        ranks.append({"metrics": metrics, **(buffers if "buffers" in position else {})})
    return position.get("ranks", ranks)


def _metrics(model: Any) -> dict[str, Metric]:
    """Return the metrics of the training epoch by their names."""
    own = {name: module for name, module in model.named_modules() if isinstance(module, Metric)}  # of a user's task
    if not isinstance(model, BaseTask):
        return own
    sums = model.sums["train"]
    return {type(sums).__name__: sums, **own, **dict(model.metrics["train"].items(keep_base=True))}


def _to(state: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Copy a metric's state, of tensors and lists of tensors, to a device."""
    return {
        key: [part.to(device, copy=True) for part in value] if isinstance(value, list) else value.to(device, copy=True)
        for key, value in state.items()
    }
