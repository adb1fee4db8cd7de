"""All ranks train with the same config, or none does."""

import hashlib

import pytorch_lightning as pl
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback

from alexlab.engine.errors import UserError


class SameConfig(Callback):
    """Gathers a hash of the config from all ranks at the start."""

    def __init__(self, config: DictConfig) -> None:
        self.hash = hashlib.sha256(OmegaConf.to_yaml(config, resolve=True, sort_keys=True).encode()).hexdigest()[:16]

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size == 1:
            return
        hashes: list[str] = [""] * trainer.world_size
        dist.all_gather_object(hashes, self.hash)
        other = [rank for rank, found in enumerate(hashes) if found != hashes[0]]
        if other:
            raise UserError(
                f"The ranks were started with different configs: {', '.join(map(str, other))} differ from rank 0 "
                f"(hashes {', '.join(hashes)}). Start all of them with the same command line and files."
            )
