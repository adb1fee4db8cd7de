"""Progress: a bar with loss, accuracy and images a second on a terminal, a line an epoch elsewhere."""

import logging
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, RichProgressBar

log = logging.getLogger("alexlab")

# what the bar shows: its name there, and how the number is written
SHOWN = {
    "train/loss_step": ("loss", "{:.3f}"),
    "train/acc1_step": ("acc1", "{:.3f}"),
    "perf/images_per_second_step": ("images/s", "{:.0f}"),
    "val/acc1": ("val", "{:.3f}"),
}
# what a line an epoch tells
TOLD = {
    "train/loss": "train/loss {:.4f}",
    "train/acc1": "train/acc1 {:.4f}",
    "val/loss": "val/loss {:.4f}",
    "val/acc1": "val/acc1 {:.4f}",
    "perf/images_per_second": "{:.0f} images/s",
    "perf/data_wait": "data wait {:.0%}",
}
QUIET = 60.0  # seconds after which a long epoch says how far it is, where there is no bar


class Bar(RichProgressBar):
    """Lightning's bar in one line of 100 columns, its epochs counted from 1 as everywhere else."""

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        columns = super().configure_columns(trainer)[:-1]  # without batches a second: images/s is there
        columns[1].bar_width = 16  # leaves room for the metrics
        return columns

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        found: Any = super().get_metrics(trainer, pl_module)
        return {name: how.format(float(found[key])) for key, (name, how) in SHOWN.items() if key in found}

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs
        return f"epoch {current_epoch + 1}" + (f"/{epochs}" if epochs is not None and epochs > 0 else "")


class PlainProgress(Callback):
    """Tells `epoch 3/10 | 12 s | train/loss 1.234 ...` on rank 0, and in long epochs a line a minute.

    Args:
        console: on the console too, not in train.log alone.
    """

    def __init__(self, console: bool = True) -> None:
        self.console = console
        self.start: float | None = None
        self.epoch = 0
        self.told = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer)
        self.start = self.told = time.monotonic()
        self.epoch = trainer.current_epoch

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self.told < QUIET or not trainer.is_global_zero:
            return
        self.told = time.monotonic()
        values = trainer.progress_bar_metrics
        parts = [f"{name} {how.format(float(values[key]))}" for key, (name, how) in SHOWN.items() if key in values]
        self._say(f"{self._where(trainer)}, batch {batch_idx + 1}/{trainer.num_training_batches} | {' | '.join(parts)}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer)

    def _tell(self, trainer: pl.Trainer) -> None:
        """Called once an epoch's metrics are all there, which on_train_epoch_end is too early for."""
        if self.start is None or not trainer.is_global_zero:
            return
        values = trainer.callback_metrics
        parts = [how.format(float(values[key])) for key, how in TOLD.items() if key in values]
        seconds = time.monotonic() - self.start
        self._say(f"{self._where(trainer)} | {seconds:.1f} s | {' | '.join(parts)}")

    def _say(self, text: str) -> None:
        log.info(text, extra={"file_only": not self.console})

    def _where(self, trainer: pl.Trainer) -> str:
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else "?"
        return f"epoch {self.epoch + 1}/{epochs}"
