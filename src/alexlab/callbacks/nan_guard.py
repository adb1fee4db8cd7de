"""Handle NaN and infinite losses, which make the weights NaN: `on_nan` is `stop` (the run) or `skip` (the step).

A loss that rises over ten times the first one (over 10 if that is below 1) gives a warning, and the run continues.

`stop` takes no time per step: losses stay on the device, and are checked when metrics are logged anyway. `skip` waits
for each gradient. Both check the weights before a validation and before a checkpoint, so that no file has NaN or
infinite weights. The images of a batch are computed from the epoch and the batch's number.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, WeightAveraging
from torch import Tensor

from alexlab.engine.errors import UserError

MOST_IN_A_ROW = 10  # skipped steps, after which the images cannot be the cause
IMAGES_SHOWN = 5  # in a message; train.log has all
RISE = 10.0  # times the first loss, or times 1 if that is less, as with trained weights

HELP = "Lower optimizer.lr, clip with trainer.gradient_clip_val=1, or train with trainer.precision=32-true"

Losses = list[tuple[int, Tensor]]  # batch, loss

log = logging.getLogger("alexlab")


class NanGuard(Callback):
    """Check losses, gradients and weights, on all ranks together. `resume_command` resumes the run, for messages."""

    def __init__(self, mode: str, last_ckpt: Path, resume_command: str) -> None:
        self.skips = mode == "skip"
        self.last_ckpt, self.resume_command = last_ckpt, resume_command
        self.losses: Losses = []  # since the last check
        self.of_step: Losses = []  # of this step, for skip
        self.last_batch = 0
        self.step_before, self.stepped = 0, True  # optimizer steps before this batch; whether it ended in one
        self.skipped_in_a_row = 0
        self.start: float | None = None  # the first loss of the run
        self.has_risen = False
        self.skipping = False  # whether the optimizer's step of this batch is skipped
        self.buffers: list[Tensor] = []  # BatchNorm's statistics before the step

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_in_a_row": self.skipped_in_a_row, "start": self.start, "has_risen": self.has_risen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped_in_a_row = state_dict["skipped_in_a_row"]
        self.start, self.has_risen = state_dict.get("start"), state_dict.get("has_risen", False)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.ignores_nonfinite_loss = self.skips

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.step_before = trainer.global_step
        if self.skips and batch_idx % trainer.accumulate_grad_batches == 0:
            self.of_step.clear()
            self.buffers = [buffer.clone() for buffer in pl_module.net.buffers()]

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Skip the step: without gradients, an optimizer changes nothing. DDP's ranks have the same gradients here.
        16-mixed skips overflows itself, as it should."""
        if not self.skips or _scaler(trainer) is not None:
            return
        if not all_finite([p.grad for p in pl_module.parameters() if p.grad is not None]):
            optimizer.zero_grad(set_to_none=True)
            self.skipping = True
            self._restore_buffers(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append((batch_idx, outputs["loss"].detach()))
        if self.skips:
            self.of_step.append(self.losses[-1])
        self.last_batch = batch_idx
        self.stepped = trainer.global_step > self.step_before
        if self.stepped and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.check(trainer)
        if not self.skips:
            return
        if self.stepped and _scaler(trainer) is not None:  # the scaler skipped the step, but BatchNorm saw the batch
            self.skipping = self._restore_buffers_if_nonfinite(trainer, pl_module)
        if self.skipping:
            self._report_skipped(trainer)
        elif self.stepped:
            self.skipped_in_a_row = 0
        self.skipping = False

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit":
            return
        if self.skips and not self.stepped:  # the validation must not see what the step's end will undo
            self._restore_buffers_if_nonfinite(trainer, pl_module)
        self.check(trainer, weights=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.check(trainer)  # before the epoch's metrics are logged; Checkpointing checks the weights

    def check(self, trainer: pl.Trainer, weights: bool = False) -> None:
        """Warn if the losses since the last check have risen, and raise UserError if one is NaN or infinite.

        With `skip`, none of them raises: such steps are skipped already.

        Args:
            weights: check the weights too: a NaN gradient makes them NaN although the loss was finite.
        """
        losses, self.losses = self.losses, []
        of_ranks = self._of_ranks(trainer, losses)
        self._warn_of_rise(trainer, losses, of_ranks)
        what = None if self.skips else self._first_nonfinite(trainer, losses, of_ranks)
        net: Any = trainer.lightning_module.net
        # the last step did it: after an earlier step, a loss would have been NaN
        if what is None and weights and _on_any_rank(trainer, ~all_finite([*net.parameters(), *net.buffers()])):
            what = self._describe(trainer, "the weights became nan or inf")
        if what is None:
            return
        if self.skips:
            raise UserError(f"on_nan=skip: {what}, although loss and gradient were finite: no step to skip. {HELP}.")
        resume = f" {self.last_ckpt.name} is from before that step: {self.resume_command} on_nan=skip skips such steps."
        raise UserError(f"{what}. {HELP}.{resume if self.last_ckpt.is_file() else ''}")

    # -- skip

    def _report_skipped(self, trainer: pl.Trainer) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):  # the average must not count this step either
                callback.load_state_dict({"latest_update_step": trainer.global_step})
        what = self._first_nonfinite(trainer, self.of_step, self._of_ranks(trainer, self.of_step))
        what = what or self._describe(trainer, "a gradient became nan or inf")
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MOST_IN_A_ROW:
            raise UserError(
                f"on_nan=skip: {what}, and the same in {MOST_IN_A_ROW} steps in a row, so the images are not the "
                f"cause. {HELP}."
            )
        log.warning("on_nan=skip: %s; this step is skipped.", what)

    def _restore_buffers_if_nonfinite(self, trainer: pl.Trainer, pl_module: Any) -> bool:
        """Restore BatchNorm's statistics if a loss of this step is not finite on any rank; return whether one is."""
        is_bad = _on_any_rank(trainer, ~torch.stack([loss for _, loss in self.of_step]).isfinite().all())
        if is_bad:
            self._restore_buffers(pl_module)
        return is_bad

    def _restore_buffers(self, pl_module: Any) -> None:
        for buffer, before in zip(pl_module.net.buffers(), self.buffers, strict=True):
            buffer.copy_(before)

    # -- messages

    def _of_ranks(self, trainer: pl.Trainer, losses: Losses) -> list[list[float]]:
        """Return the values of each loss on all ranks."""
        if not losses:
            return []
        gathered: Any = trainer.lightning_module.all_gather(torch.stack([loss.float() for _, loss in losses]))
        values: list[list[float]] = gathered.reshape(-1, len(losses)).T.tolist()
        return values

    def _first_nonfinite(self, trainer: pl.Trainer, losses: Losses, of_ranks: list[list[float]]) -> str | None:
        """Describe the first of these losses that is not finite on any rank."""
        for (batch, _), values in zip(losses, of_ranks, strict=True):
            ranks = [rank for rank, value in enumerate(values) if not math.isfinite(value)]
            if ranks:
                return self._describe(trainer, f"train/loss became {values[ranks[0]]}", [batch], ranks)
        return None

    def _warn_of_rise(self, trainer: pl.Trainer, losses: Losses, of_ranks: list[list[float]]) -> None:
        """Warn once of a loss that is over `RISE` times the first finite one."""
        for (batch, _), values in zip(losses, of_ranks, strict=True):
            loss = sum(values) / len(values)
            if not math.isfinite(loss):
                continue
            self.start = loss if self.start is None else self.start
            if not self.has_risen and loss > RISE * max(self.start, 1.0):
                self.has_risen = True
                log.warning(
                    "train/loss rose from %.3g to %.3g in batch %d of epoch %d, over %g times the first one: lower "
                    "optimizer.lr, lengthen scheduler.warmup, or clip with trainer.gradient_clip_val=1.",
                    *(self.start, loss, batch + 1, trainer.current_epoch + 1, RISE),
                )

    def _describe(self, trainer: pl.Trainer, what: str, batches: Sequence[int] = (), ranks: Sequence[int] = ()) -> str:
        """Add batches and images, by default all of the last step, to `what`. train.log gets all images."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        epoch, first = trainer.current_epoch, self.last_batch - self.last_batch % trainer.accumulate_grad_batches
        batches = batches or range(first, self.last_batch + 1)
        ranks = ranks or range(trainer.world_size)
        images = [path for batch in batches for rank in ranks for path in data.paths_of_batch(epoch, batch, rank)]
        which = f"batch {batches[0] + 1}" if len(batches) == 1 else f"batches {batches[0] + 1} to {batches[-1] + 1}"
        what = f"{what} in {which} of epoch {epoch + 1}"
        log.info("%s: the images are %s", what, ", ".join(images), extra={"file_only": True})
        more = f" and {len(images) - IMAGES_SHOWN} more, all in train.log" if len(images) > IMAGES_SHOWN else ""
        return f"{what} (images: {', '.join(images[:IMAGES_SHOWN])}{more})"


def all_finite(tensors: list[Tensor]) -> Tensor:
    """Return whether all tensors are finite, as a bool tensor on their device; isfinite would copy each tensor."""
    floats = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return torch.stack(torch._foreach_norm(floats, 1)).isfinite().all() if floats else torch.tensor(True)


def _scaler(trainer: pl.Trainer) -> Any:
    """Return the gradient scaler of 16-mixed, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def _on_any_rank(trainer: pl.Trainer, bad: Tensor) -> bool:
    return bool(trainer.strategy.reduce(bad.float(), reduce_op="sum") > 0)
