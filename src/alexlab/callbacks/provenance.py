"""What a checkpoint needs to be used on its own: plain config, class names, fingerprint of the data."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback


class Provenance(Callback):
    """Puts plain values into each checkpoint, so that it loads with weights_only=True."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["alexlab"] = self.values
