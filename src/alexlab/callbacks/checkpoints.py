"""best.ckpt, after each validation that was better than all before, and last.ckpt, after each epoch."""

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

log = logging.getLogger("alexlab")


class BestCheckpoint(Callback):
    """Writes the weights where the classifier, which keeps the score, has found them better."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking and pl_module.improved:
            trainer.save_checkpoint(self.path, weights_only=True)


class LastCheckpoint(ModelCheckpoint):
    """Where a time limit (trainer.max_time, Lightning's Timer) ends a run in the middle of an epoch, the file of the
    whole epoch before stays: training can go on from that one alone."""

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.dirpath is not None
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        at_limit = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        kept = Path(self.dirpath, f"{self.filename}{self.FILE_EXTENSION}")
        if not progress.is_last_batch and not at_limit and trainer.strategy.broadcast(kept.is_file()):
            log.info("ended in the middle of epoch %d: %s stays as the epoch before it left it.",
                     trainer.current_epoch + 1, kept.name)  # fmt: skip
            return
        super().on_train_epoch_end(trainer, pl_module)
