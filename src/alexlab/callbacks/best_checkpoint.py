"""best.ckpt, after each validation that was better than all before. last.ckpt is in snapshots.py."""

from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class BestCheckpoint(Callback):
    """Writes the weights where the classifier, which keeps the score, has found them better."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and pl_module.improved:
            trainer.save_checkpoint(self.path, weights_only=True)
