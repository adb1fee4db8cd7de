"""A loss that is no number spoils the weights for good: `on_nan` says whether the run stops, leaves such steps out, or
goes back to its last checkpoint and on from there with the next images.

No step waits for the device to look: the losses are kept there and looked at where numbers are logged anyway, before a
validation, and before a checkpoint is written, so that none ever holds spoiled weights. Which images a batch had is
worked out from its epoch and number. Only on_nan=skip must know at each step, and waits for each gradient.
"""

import logging
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, WeightAveraging
from pytorch_lightning.strategies import FSDPStrategy

from alexlab import checkpoint
from alexlab.errors import UserError

IN_A_ROW = 10  # steps that are skipped, or whose loss 16-mixed's scaling may lower, before it is the weights' fault
SAME = 3  # times that a run goes back to one checkpoint
SHOWN = 5  # images that a message names; train.log has all

HELP = "Lower optimizer.lr, clip with trainer.gradient_clip_val=1, or train with trainer.precision=32-true"

log = logging.getLogger("alexlab")


class OnNan(Callback):
    """
    Args:
        mode: "stop", "skip" or "rollback".
        path: of the run's last.ckpt.
        again: what goes on with the run.
    """

    def __init__(self, mode: str, path: Path, again: str) -> None:
        self.mode, self.path, self.again = mode, path, again
        self.losses: list[tuple[int, torch.Tensor]] = []  # those not yet looked at, by their batch
        self.in_a_row = 0
        self.left_out = False  # whether this step is
        self.went_back: list[int] = []  # the steps of the checkpoints
        self.kept: list[torch.Tensor] = []  # BatchNorm's statistics before a step

    # -- where it looks

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append((batch_idx, outputs["loss"]))
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.left_out or (stepped and trainer.global_step % every == 0):
            self.look(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.look(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(trainer)

    def look(self, trainer: pl.Trainer) -> None:
        """At the losses since the last time, on all ranks together.

        Raises:
            UserError: one is not finite, and that ends the run.
        """
        losses, self.losses = self.losses, []
        left_out, self.left_out = self.left_out, False
        if not losses:
            return
        model: Any = trainer.lightning_module
        mine = torch.stack([loss.detach().float() for _, loss in losses])
        told = model.all_gather(mine).reshape(-1, len(losses)).tolist()  # (ranks, losses)
        bad = [n for n in range(len(losses)) if not all(math.isfinite(rank[n]) for rank in told)]
        if not bad and not left_out:
            self.in_a_row = 0
            return
        first = bad[0] if bad else len(losses) - 1
        batch = losses[first][0]
        ranks = [rank for rank, values in enumerate(told) if not math.isfinite(values[first])]
        value = told[ranks[0]][first] if ranks else None
        if self.mode != "skip" and getattr(trainer.precision_plugin, "scaler", None) is not None:
            # 16-mixed leaves such steps out by itself, and scales less from then on
            self.in_a_row = self.in_a_row + len(bad) if len(bad) == len(losses) else 0
            if self.in_a_row < IN_A_ROW:
                return
        what = self._name(trainer, batch, ranks or list(range(len(told))), value)
        {"stop": self._stop, "skip": self._skip, "rollback": self._go_back}[self.mode](trainer, what)

    def _name(self, trainer: pl.Trainer, batch: int, ranks: list[int], value: float | None) -> str:
        """What became of which batch, and of which images; train.log gets all of them."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        epoch = trainer.current_epoch
        images = [path for rank in ranks for path in data.images_of(epoch, batch, rank)]
        became = "a gradient became nan or inf" if value is None else f"train/loss became {value}"
        what = f"{became} in batch {batch + 1} of epoch {epoch + 1}"
        log.info("%s: its images are %s", what, ", ".join(images), extra={"file_only": True})
        more = f" and {len(images) - SHOWN} more, all in train.log" if len(images) > SHOWN else ""
        return f"{what} (images: {', '.join(images[:SHOWN])}{more})"

    # -- what it does

    def _stop(self, trainer: pl.Trainer, what: str) -> None:
        kept = ""
        if self.path.is_file():
            kept = f" {self.path.name} is from before it: {self.again} on_nan=skip goes on there without such steps."
        raise UserError(f"{what}. {HELP}.{kept}")

    def _skip(self, trainer: pl.Trainer, what: str) -> None:
        self.in_a_row += 1
        if self.in_a_row >= IN_A_ROW:
            raise UserError(f"on_nan=skip: {what}, and so in {IN_A_ROW} steps in a row: it is not the images. {HELP}.")
        log.warning("on_nan=skip: %s; this step is left out.", what)

    def _go_back(self, trainer: pl.Trainer, what: str) -> None:
        if not self.path.is_file():
            raise UserError(
                f"on_nan=rollback: {what}, and there is no checkpoint to go back to yet. {HELP}, or write one sooner "
                "with checkpoint.every_n_steps."
            )
        found = checkpoint.load(self.path)
        step = found["global_step"]
        self.went_back.append(step)
        if self.went_back.count(step) > SAME:
            raise UserError(
                f"on_nan=rollback: {what}, for the {SAME + 1}th time since the checkpoint of step {step}. {HELP}."
            )
        take_states(trainer, found)
        log.warning(
            "on_nan=rollback: %s; weights and optimizer are those of step %d again, and the next images follow.",
            what, step,
        )  # fmt: skip

    # -- leaving a step out

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.mode == "skip" and batch_idx % trainer.accumulate_grad_batches == 0:
            self.kept = [buffer.clone() for buffer in pl_module.net.buffers()]

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Without gradients no optimizer changes anything. The ranks of DDP have the same gradients here."""
        if self.mode != "skip":
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        bad = ~torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        if isinstance(trainer.strategy, FSDPStrategy):  # where each has a part of them
            bad = trainer.strategy.reduce(bad.float(), reduce_op="sum") > 0
        if not bad:
            return
        self.left_out = True
        optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(pl_module.net.buffers(), self.kept, strict=True):
            buffer.copy_(before)


def take_states(trainer: pl.Trainer, found: dict[str, Any]) -> None:
    """Weights, averages, optimizer and this rank's BatchNorm as a checkpoint of this run has them. Where the run is,
    and its learning rates, stay."""
    model: Any = trainer.lightning_module
    trainer.strategy.load_model_state_dict(found)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback.on_load_checkpoint(trainer, model, found)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    trainer.strategy.load_optimizer_state_dict(found)
    for optimizer, before in zip(trainer.optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate
    model.take_buffers(found["alexlab"]["place"])
