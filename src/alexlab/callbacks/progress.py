"""Progress: a bar on a terminal; elsewhere, and in train.log, a line per epoch."""

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, RichProgressBar

log = logging.getLogger("alexlab")

# metrics with a special name or format; the rest are printed with their name and four digits
BAR_FORMATS = {
    "train/loss_step": "loss {:.3f}",
    "train/acc1_step": "acc1 {:.3f}",
    "perf/images_per_second_step": "images/s {:.0f}",
    "val/acc1": "val {:.3f}",
}
BAR_HIDES = ("v_num", "val/loss", "val/acc5")  # the bar has room for few metrics
LINE_FORMATS = {"perf/images_per_second": "{:.0f} images/s", "perf/data_wait": "data wait {:.0%}"}
LINE_HIDES = ("train/acc5", "val/acc5", "train/grad_norm")
LONG_EPOCH = 60.0  # seconds between two lines within an epoch


def bar_metrics(metrics: dict[str, Any]) -> dict[str, str]:
    """Format the metrics of a bar: name -> number."""
    parts = {}
    for key, value in metrics.items():
        if key not in BAR_HIDES and not key.endswith("_best"):
            name, _, number = BAR_FORMATS.get(key, key + " {:.4f}").rpartition(" ")
            parts[name] = number.format(float(value))
    return parts


def epoch_metrics(metrics: dict[str, Any]) -> list[str]:
    """Format the metrics of an epoch's line: those of training, then of validation, then speed."""
    known = [key for group in ("train/", "val/") for key in metrics if key.startswith(group)]
    shown = [key for key in known if key not in LINE_HIDES and not key.endswith(("_step", "_best"))]
    parts = [f"{key} {float(metrics[key]):.4f}" for key in shown]
    return parts + [how.format(float(metrics[key])) for key, how in LINE_FORMATS.items() if key in metrics]


class ProgressBar(RichProgressBar):
    """Lightning's bar in one line of 100 columns, until `breakpoint()` starts a debugger."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if os.environ.get("PYTHONBREAKPOINT") != "0":  # which switches breakpoint() off
            sys.breakpointhook = EndsBar(trainer, self)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._remove_hook()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._remove_hook()

    def _remove_hook(self) -> None:
        if isinstance(sys.breakpointhook, EndsBar):
            sys.breakpointhook = sys.breakpointhook.debugger

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        columns = super().configure_columns(trainer)[:-1]  # without batches per second: images/s is a metric
        columns[1].bar_width = 16  # leaves room for the metrics
        return columns

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        return bar_metrics(super().get_metrics(trainer, pl_module))


class EndsBar:
    """A sys.breakpointhook that replaces the bar with a line per epoch: the bar would hide the debugger's prompt.

    `__call__` is a property that returns the debugger: so the debugger stops in the user's code, not in this class.
    """

    def __init__(self, trainer: pl.Trainer, bar: ProgressBar) -> None:
        self.trainer, self.bar, self.debugger = trainer, bar, sys.breakpointhook

    @property
    def __call__(self) -> Callable[..., Any]:
        self.bar.disable()
        if self.bar.progress is not None:
            self.bar.progress.stop()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ProgressReporter):
                callback.console = True
        return self.debugger


class ProgressReporter(Callback):
    """Log `epoch 3/10 | 12 s | train/loss 1.234 ...` on rank 0, and in long epochs a line per minute.

    Args:
        console: whether to print on the console too, not only in train.log.
    """

    def __init__(self, console: bool = True) -> None:
        self.console = console
        self._epoch = 0
        self._epoch_start: float | None = None  # None before the first epoch
        self._last_report = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report_epoch(trainer)
        self._epoch, self._epoch_start = trainer.current_epoch, time.monotonic()
        self._last_report = self._epoch_start

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if time.monotonic() - self._last_report < LONG_EPOCH or not trainer.is_global_zero:
            return
        self._last_report = time.monotonic()
        parts = [f"{name} {number}" for name, number in bar_metrics(trainer.progress_bar_metrics).items()]
        self._log(trainer, f", batch {batch_idx + 1}/{trainer.num_training_batches}", *parts)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._report_epoch(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.fit_loop.epoch_progress.current.completed > self._epoch:  # a signal came at the end of the epoch
            self._report_epoch(trainer)

    def _report_epoch(self, trainer: pl.Trainer) -> None:
        """Report the previous epoch. In on_train_epoch_end, not all metrics of an epoch are logged yet."""
        if self._epoch_start is None or not trainer.is_global_zero:
            return
        seconds, self._epoch_start = time.monotonic() - self._epoch_start, None
        self._log(trainer, "", f"{seconds:.1f} s", *epoch_metrics(trainer.callback_metrics))

    def _log(self, trainer: pl.Trainer, batch: str, *parts: str) -> None:
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else "?"
        text = " | ".join([f"epoch {self._epoch + 1}/{epochs}{batch}", *parts])
        log.info("%s", text, extra={"file_only": not self.console})
