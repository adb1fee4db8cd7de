"""Make sure that all ranks train with the same config."""

import hashlib
import json
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback

from alexlab.engine.errors import UserError


class SameConfig(Callback):
    """Compare a hash of the config over all ranks at the start. Nothing else would notice a difference."""

    def __init__(self, config: dict[str, Any]) -> None:
        text = json.dumps(config, sort_keys=True, default=str)
        self.hash = hashlib.sha256(text.encode()).hexdigest()[:16]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size == 1:
            return
        hashes: list[str] = [""] * trainer.world_size
        dist.all_gather_object(hashes, self.hash)
        different = [str(rank) for rank, value in enumerate(hashes) if value != hashes[0]]
        if different:
            raise UserError(
                f"The ranks were started with different configs: {', '.join(different)} differ from rank 0 "
                f"(hashes {', '.join(hashes)}). Start all of them with the same command line and files."
            )
