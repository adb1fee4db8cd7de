"""Train only the head in the first epochs, then the whole network.

Lightning's BackboneFinetuning freezes before DDP is set up. DDP then never sums the gradients of frozen layers: after
the release the ranks diverge, without a warning. BackboneFinetuning also adds parameter groups to a running optimizer,
which schedules by step do not allow. Here DDP and the optimizer know all parameters from the start. The epoch
alone decides which of them are frozen, so a resume needs no state.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from alexlab.models.introspection import head_of


class Freezing(Callback):
    """Freeze parameters and BatchNorm statistics outside of the head in the first `epochs` epochs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.parameters: list[nn.Parameter] = []
        self.norms: list[nn.Module] = []

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            head = {id(parameter) for parameter in head_of(pl_module.net).parameters()}
            self.parameters = [p for p in pl_module.net.parameters() if p.requires_grad and id(p) not in head]
            self.norms = [m for m in pl_module.net.modules() if isinstance(m, _BatchNorm) and m.training]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        frozen = trainer.current_epoch < self.epochs
        for parameter in self.parameters:
            parameter.requires_grad_(not frozen)
        for module in self.norms:
            module.train(not frozen)
        if not frozen:
            for optimizer in trainer.optimizers:
                add_momentum(optimizer)


def add_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give SGD zeros as the momentum of parameters that had no gradient so far. The first step gives the same result.
    Without the zeros, fused SGD would fail, because only some parameters have momentum."""
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
            for parameter in group["params"]:
                if optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
