"""The head alone learns in the first epochs; then all of the network does.

Lightning's BackboneFinetuning freezes before DDP is set up, which then never sums the gradients of what was frozen:
each rank would go its own way after the release, unsaid. It also adds groups to a running optimizer, which schedules by
step do not take. Here DDP and the optimizer know all parameters from the start, and which are frozen follows from the
epoch alone, so that a resume needs to know nothing.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from alexlab.models.introspection import head_of


class Freezing(Callback):
    """No gradients and no new BatchNorm statistics outside of the head.

    Args:
        epochs: how many, from the first.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.parameters: list[nn.Parameter] = []  # outside of the head, that are to learn at all
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
        self.complete(trainer)

    def complete(self, trainer: pl.Trainer) -> None:
        """What an optimizer that knew the head alone lacks after the release; also one that went back to then."""
        if trainer.current_epoch >= self.epochs:
            give_momentum(trainer.optimizers)


def give_momentum(optimizers: list[torch.optim.Optimizer]) -> None:
    """Zeroes as SGD's momentum of those parameters that had no gradient before, of which its first step makes what it
    would without; the fused one takes none that are missing beside others."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(optimizer, torch.optim.SGD) and group["momentum"]:
                for parameter in group["params"]:
                    if optimizer.state[parameter].get("momentum_buffer") is None:
                        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
