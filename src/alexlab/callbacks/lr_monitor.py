"""The learning rate, and in W&B beside it what its curve is drawn over."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor

from alexlab.callbacks.throughput import Throughput


class Rates(LearningRateMonitor):
    """Lightning's, whose rows have the step alone: W&B draws a curve over a name that stands in the same row.

    Others draw over the step, where the axes stand already, once.
    """

    def on_train_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_start(trainer, *args, **kwargs)
        rate = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            if rate is not None and hasattr(logger, "learning_rate_axes"):
                # a row is stamped with the step that begins, whose images the step's other rows count
                logger.learning_rate_axes = lambda: {"epoch": trainer.current_epoch, **rate.axes(ahead=1)}
