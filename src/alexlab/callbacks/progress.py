"""Progress: a bar with loss, accuracy and images a second on a terminal, a line an epoch elsewhere."""

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, RichProgressBar

SHORT = {"train/loss_step": "loss", "train/acc1_step": "acc1", "perf/images_per_second_step": "images/s"}


class Bar(RichProgressBar):
    """Lightning's bar, with short names."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        found = super().get_metrics(trainer, pl_module)
        found.pop("v_num", None)
        return {SHORT.get(name, name): value for name, value in found.items()}


class PlainProgress(Callback):
    """Prints `epoch 3/10 | 12 s | train/loss 1.234 ...` on rank 0."""

    def __init__(self) -> None:
        self.start: float | None = None
        self.epoch = 0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer)
        self.start, self.epoch = time.monotonic(), trainer.current_epoch

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._tell(trainer)

    def _tell(self, trainer: pl.Trainer) -> None:
        """Called once an epoch's metrics are all there, which on_train_epoch_end is too early for."""
        if self.start is None or not trainer.is_global_zero:
            return
        shown = ("train/loss", "train/acc1", "val/loss", "val/acc1", "perf/images_per_second", "perf/data_wait")
        values = trainer.callback_metrics
        parts = [f"{key} {float(values[key]):.4g}" for key in shown if key in values]
        epochs = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else "?"
        seconds = time.monotonic() - self.start
        print(f"epoch {self.epoch + 1}/{epochs} | {seconds:.1f} s | " + " | ".join(parts), flush=True)
