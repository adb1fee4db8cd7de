"""The learning rate beside what its curve is drawn over."""

import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor

from alexlab.callbacks.throughput import Throughput


class Rates(LearningRateMonitor):
    """Lightning's, whose rows have the step alone: W&B draws a curve over a name that stands in the same row."""

    def _extract_stats(self, trainer: pl.Trainer, interval: str) -> dict[str, float]:
        found = super()._extract_stats(trainer, interval)
        rate = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        if found and rate is not None:
            found |= {"epoch": trainer.current_epoch, **rate.axes()}
        return found
