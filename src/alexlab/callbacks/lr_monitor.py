"""Log the learning rates; for W&B, also the axes that their curves are drawn over."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor

from alexlab.callbacks.throughput import Throughput


class LearningRateLogger(LearningRateMonitor):
    """Log the learning rates as Lightning's monitor does, and add the axes for W&B to the rows.

    Lightning logs rows that have the step only. W&B draws a curve over an axis only if both are in the same row.
    """

    def on_train_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_start(trainer, *args, **kwargs)
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            if throughput is not None and hasattr(logger, "learning_rate_axes"):
                # the row belongs to the step that begins; the other rows of this step count the step's images
                logger.learning_rate_axes = lambda: {"epoch": trainer.current_epoch, **throughput.axes(ahead=1)}
