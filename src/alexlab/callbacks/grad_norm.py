"""The norm of all gradients, before they are clipped."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback


class GradNorm(Callback):
    """Log train/grad_norm, the Euclidean norm of the gradients of all parameters.

    The norm is computed every `trainer.log_every_n_steps` optimizer steps, in one pass over the gradients. On several
    ranks, it is the norm of the mean gradient.
    """

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (trainer.global_step + 1) % every:
            return
        norm = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # A fused optimizer undoes 16-mixed's loss scaling in `step`, after this hook. Only a private
        # attribute of torch shows whether an optimizer does so.
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            norm = norm / scaler.get_scale()
        pl_module.log("train/grad_norm", norm)
