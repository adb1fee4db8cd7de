"""Progress where there is no terminal: a line an epoch."""

import time

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


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
