"""A loss that is no number spoils the weights for good: `on_nan` says whether the run stops, leaves such steps out, or
goes back to its last checkpoint and on from there with the next images.

No step waits for the device to look: the losses are kept there and looked at where numbers are logged anyway, and
with the weights before a validation and before a checkpoint is written, so that none holds spoiled ones. Which images
a batch had is worked out from its epoch and number. Only on_nan=skip must know at each step, and waits for each
gradient.
"""

import logging
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, WeightAveraging

from alexlab.callbacks.freezing import Freezing
from alexlab.engine import checkpoint_io as checkpoint
from alexlab.engine.errors import UserError

IN_A_ROW = 10  # steps that are skipped before it is the weights' fault
SAME = 3  # times that a run goes back to the same weights
SHOWN = 5  # images that a message names; train.log has all

HELP = "Lower optimizer.lr, clip with trainer.gradient_clip_val=1, or train with trainer.precision=32-true"

log = logging.getLogger("alexlab")


class OnNan(Callback):
    """
    Args:
        mode: "stop", "skip" or "rollback".
        path: of the run's last.ckpt.
        again: what goes on with the run.
        start: the checkpoint that the run began with.
    """

    def __init__(self, mode: str, path: Path, again: str, start: Path | None = None) -> None:
        self.mode, self.path, self.again, self.start = mode, path, again, start
        self.losses: list[tuple[int, torch.Tensor]] = []  # those not yet looked at, by their batch
        self.last = 0  # the last of these batches
        self.weighed = -1  # batches of the run when the weights were last looked at
        self.in_a_row = 0
        self.left_out = False  # whether this step is
        self.kept: list[torch.Tensor] = []  # BatchNorm's statistics before a step
        self.origin, self.times = 0, 0  # the step whose weights these really are, and how often the run went back to it
        self.moved = False  # whether good steps followed

    # -- where it looks

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.origin = pl_module.progress.get("origin", trainer.global_step)
        self.times = pl_module.progress.get("went_back", 0)
        self.in_a_row = pl_module.progress.get("in_a_row", 0)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append((batch_idx, outputs["loss"].detach()))
        self.last = batch_idx
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if self.mode == "skip" and stepped and scales(trainer):
            self.left_out = self._put_back_if_lost(trainer, pl_module, trainer.accumulate_grad_batches)
        if self.left_out:
            leave_averages(trainer)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.left_out or (stepped and trainer.global_step % every == 0):
            self.look(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            begun = self._begun(trainer)
            if self.mode == "skip" and begun:  # a validation must not see what the step's end will put back
                self._put_back_if_lost(trainer, pl_module, begun)
            self.look(trainer, weights=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(trainer, weights=True)

    def before_saving(self, trainer: pl.Trainer) -> dict[str, int]:
        """Look, and what a checkpoint keeps of this.

        Raises:
            UserError: as `look`.
        """
        self.look(trainer, weights=True)
        if self.moved:
            self.origin, self.times, self.moved = trainer.global_step, 0, False
        return {"origin": self.origin, "went_back": self.times, "in_a_row": self.in_a_row}

    def look(self, trainer: pl.Trainer, weights: bool = False) -> None:
        """At the losses since the last time, on all ranks together; on_nan=skip waits with those of a step that is not
        done, which is left out as a whole or not at all.

        Args:
            weights: at the weights too, which a gradient that is no number spoils although the loss was one.

        Raises:
            UserError: something is not finite, and that ends the run.
        """
        done = len(self.losses) - (self._begun(trainer) if self.mode == "skip" else 0)
        losses, self.losses = self.losses[:done], self.losses[done:]
        left_out, self.left_out = self.left_out, False
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        weights = weights and self.weighed != batches
        if not losses and not weights:
            return
        model: Any = trainer.lightning_module
        spoiled = ~all_finite([*model.net.parameters(), *model.net.buffers()]) if weights else torch.tensor(False)
        mine = torch.stack([spoiled.to(model.device).float(), *(loss.float() for _, loss in losses)])
        told = model.all_gather(mine).reshape(-1, len(mine)).tolist()  # (ranks, 1 + losses)
        if weights:
            self.weighed = batches
        values = [[rank[1 + n] for rank in told] for n in range(len(losses))]
        bad = [n for n, of_ranks in enumerate(values) if not all(map(math.isfinite, of_ranks))]
        if not bad and not left_out and not any(rank[0] for rank in told):
            if losses:
                self.in_a_row, self.moved = 0, True
            return
        if bad:
            batch, of_ranks = losses[bad[0]][0], values[bad[0]]
            ranks = [rank for rank, value in enumerate(of_ranks) if not math.isfinite(value)]
            what = self._name(trainer, [batch], ranks, f"train/loss became {of_ranks[ranks[0]]}")
        else:  # of the last step: one before would have shown in a loss
            first = self.last - self.last % trainer.accumulate_grad_batches
            batches_ = list(range(first, self.last + 1))
            became = "a gradient became nan or inf" if left_out else "the weights became nan or inf"
            what = self._name(trainer, batches_, list(range(len(told))), became)
        if len(losses) > trainer.accumulate_grad_batches:  # good steps lay between
            self.in_a_row = 0
        if self.mode == "skip" and any(rank[0] for rank in told):
            raise UserError(
                f"on_nan=skip: {what}, though loss and gradient were numbers, which cannot be left out. {HELP}."
            )
        {"stop": self._stop, "skip": self._skip, "rollback": self._go_back}[self.mode](trainer, what)

    def _name(self, trainer: pl.Trainer, batches: list[int], ranks: list[int], became: str) -> str:
        """What became of which batch, and of which images; train.log gets all of them."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        epoch = trainer.current_epoch
        images = [path for batch in batches for rank in ranks for path in data.images_of(epoch, batch, rank)]
        which = f"batch {batches[0] + 1}" if len(batches) == 1 else f"batches {batches[0] + 1} to {batches[-1] + 1}"
        what = f"{became} in {which} of epoch {epoch + 1}"
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
        self.times, self.moved = self.times + 1, False
        if self.times > SAME:
            raise UserError(
                f"on_nan=rollback: {what}, for the {self.times}th time since the weights of step {self.origin}. {HELP}."
            )
        found = self._newest()
        if found is None:
            raise UserError(
                f"on_nan=rollback: {what}, and there is no checkpoint to go back to yet. {HELP}, or write one sooner "
                "with checkpoint.every_n_steps."
            )
        take_states(trainer, found)
        log.warning(
            "on_nan=rollback: %s; weights and optimizer are those of step %d again, and the next images follow.",
            what, found["alexlab"]["place"].get("origin", found["global_step"]),
        )  # fmt: skip

    def _newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole and of numbers."""
        paths = [self.path, self.path.with_name(checkpoint.PREVIOUS), *([self.start] if self.start else [])]
        for path in paths:
            if path.is_file() and checkpoint.damage_of(path) is None:
                found = checkpoint.load(path)
                if "place" in found["alexlab"] and all_finite(list(found["state_dict"].values())):
                    return found
        return None

    # -- leaving a step out

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.mode == "skip" and batch_idx % trainer.accumulate_grad_batches == 0:
            self.kept = [buffer.clone() for buffer in pl_module.net.buffers()]

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        """Without gradients no optimizer changes anything. The ranks of DDP have the same gradients here. Under
        16-mixed the scaling leaves out what has overflowed, which is nothing to tell of."""
        if self.mode != "skip" or scales(trainer):
            return
        if all_finite([p.grad for p in pl_module.parameters() if p.grad is not None]):
            return
        optimizer.zero_grad(set_to_none=True)
        self.left_out = True
        self._put_back(pl_module)

    def _put_back_if_lost(self, trainer: pl.Trainer, pl_module: Any, batches: int) -> bool:
        """Where a loss of the last `batches` was no number on any rank: the step that they belong to is left out, by
        this or by 16-mixed, and BatchNorm has seen them all the same."""
        losses = [loss for _, loss in self.losses[-batches:]]
        bad = (~torch.stack(losses).isfinite().all()).float()
        lost = bool(trainer.strategy.reduce(bad, reduce_op="sum") > 0)
        if lost:
            self._put_back(pl_module)
        return lost

    def _begun(self, trainer: pl.Trainer) -> int:
        """Batches of a step that is not done."""
        return (self.last + 1) % trainer.accumulate_grad_batches if self.losses else 0

    def _put_back(self, pl_module: Any) -> None:
        for buffer, before in zip(pl_module.net.buffers(), self.kept, strict=True):
            buffer.copy_(before)


def scales(trainer: pl.Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def all_finite(tensors: list[Any]) -> torch.Tensor:
    """A bool on their device; of sums, as a pass over each number by itself would make another of their size."""
    floats = [tensor.detach() for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return torch.stack(torch._foreach_norm(floats, 1)).isfinite().all() if floats else torch.tensor(True)


def leave_averages(trainer: pl.Trainer) -> None:
    """A step that is left out moves no average of the weights: Lightning's takes it for one that it has counted."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback._latest_update_step = trainer.global_step


def take_states(trainer: pl.Trainer, found: dict[str, Any]) -> None:
    """Weights, averages, optimizer and this rank's BatchNorm as a checkpoint of this run has them. Where the run is,
    and its learning rates, stay."""
    model: Any = trainer.lightning_module
    for optimizer in trainer.optimizers:  # within an accumulation they are spoiled, too
        optimizer.zero_grad(set_to_none=True)
    trainer.strategy.load_model_state_dict(found)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging):
            callback.on_load_checkpoint(trainer, model, found)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in trainer.optimizers]
    trainer.strategy.load_optimizer_state_dict(found)
    for optimizer, before in zip(trainer.optimizers, rates, strict=True):
        for group, rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = rate
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Freezing):
            callback.complete(trainer)
    model.take_buffers(found["alexlab"]["place"])
