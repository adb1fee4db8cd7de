"""The norm of all gradients, before they are clipped."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback


class GradNorm(Callback):
    """Logs train/grad_norm, the Euclidean norm of the gradients of all weights, at the steps that are logged.

    A norm a logged step costs one pass over the gradients. With several ranks it is that of their mean.
    """

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads)
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            # a fused step undoes 16-mixed's loss scaling itself, after this
            if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
                norm = norm / scaler.get_scale()
            pl_module.log("train/grad_norm", norm)
