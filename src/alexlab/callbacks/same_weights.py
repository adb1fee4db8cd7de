"""Send the initial weights, which only rank 0 has read, to all ranks."""

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback

from alexlab.engine.ranks import Ranks


class SameWeights(Callback):
    """Send the state dict of rank 0 at the start. DDP sends no buffers here (broadcast_buffers=False)."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    @torch.no_grad()
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or self.ranks.size == 1:
            return
        for tensor in pl_module.state_dict().values():
            value = tensor.detach().cpu()
            dist.broadcast(value, 0, group=self.ranks.gloo)
            tensor.copy_(value)
