"""The LightningModule: wraps any net that turns images into logits; loss, metrics, optimizer wiring."""

import math
from functools import partial
from typing import Any, cast

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from pytorch_lightning.strategies import FSDPStrategy
from pytorch_lightning.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassConfusionMatrix

from alexlab.data.dataset import Batch
from alexlab.data.sample_rng import mix
from alexlab.engine.errors import UserError
from alexlab.engine.rules import mode_of
from alexlab.tasks import optimizers as optim
from alexlab.tasks.augment import BatchAugment
from alexlab.tasks.metrics import Sums


class ImageClassifier(pl.LightningModule):
    """Trains `net` with cross-entropy.

    Args:
        net: float (B, C, H, W) -> logits (B, num_classes).
        augment: uint8 batches -> float batches, on the device.
        optimizer, scheduler: plain settings, see `optim.py`; None for evaluation alone.
        step_images: images an optimizer step over all devices, for the scaled learning rate.
        steps, steps_per_epoch: optimizer steps, for the schedule. Lightning's own estimate would make the first
            training batches before a checkpoint's epoch is restored.
        label_smoothing: 0 to 1, in training only.
        monitor: the metric of a validation that says which weights are the best.
        max_bad: broken images that may be left out, of all splits together; None is any number.
        leaves_nan: whether training goes on after a loss that is no number, see callbacks/on_nan.py.
        provenance: plain values for each checkpoint: config, class names, data fingerprint.
    """

    def __init__(
        self,
        net: nn.Module,
        augment: BatchAugment,
        class_names: list[str],
        seed: int,
        optimizer: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        step_images: int = 1,
        steps: int = 1,
        steps_per_epoch: int = 1,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        monitor: str = "val/acc1",
        max_bad: int | None = None,
        leaves_nan: bool = False,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.augment = augment
        self.class_names = class_names
        self.optimizer_settings, self.scheduler_settings = optimizer, scheduler
        self.seed = seed
        self.step_images, self.steps, self.steps_per_epoch = step_images, steps, steps_per_epoch
        self.label_smoothing = label_smoothing
        self.channels_last = channels_last
        self.provenance = provenance or {}
        self.skipped: dict[str, str] = {}  # the broken images' paths, and what is wrong with each
        self.max_bad, self.leaves_nan = max_bad, leaves_nan
        self.monitor = monitor
        self.best: dict[str, float] = {}  # all metrics of the epoch with the best `monitor`, which best.ckpt holds
        self.best_epoch: int | None = None  # from 1
        self.improved = False  # whether the last validation was that one
        self.keeps_best = False  # whether `best` goes on from a checkpoint's, whose best.ckpt came along
        self.validated_at = -1  # optimizer steps done by the last validation
        self.place: dict[str, Any] | None = None  # of a last.ckpt that is just written, see callbacks/snapshots.py
        self.progress: dict[str, Any] = {}  # of the last.ckpt that this run goes on from
        self.came_from: str | None = None  # where that was which this run goes on from
        if channels_last:
            self.net.to(memory_format=torch.channels_last)

    def __setattr__(self, name: str, value: Any) -> None:
        """Lightning notes the running hook here forty times a step, and nn.Module's own way takes 4 microseconds."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """The tensors; Lightning's own walk through any nested batch takes 0.2 ms."""
        return batch.to(device)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> logits (B, num_classes)."""
        return self.net(self._layout(self.augment.normalize(images)))

    def _layout(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(self.dtype).contiguous(memory_format=layout)  # float32, but for trainer.precision=...-true

    # -- training

    def on_train_start(self) -> None:
        """A checkpoint holds the rate that its own schedule had come to; a longer run's is another at this step."""
        for entry in self.trainer.lr_scheduler_configs:
            schedule = entry.scheduler
            if isinstance(schedule, LambdaLR):
                each = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
                for group, base, factor in each:
                    group["lr"] = base * factor(schedule.last_epoch)

    def on_train_epoch_start(self) -> None:
        self.epoch_sums, self.window_sums = Sums(self.device), Sums(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        images, targets, skipped = batch[:3]
        self.note_skipped(skipped)
        if len(targets):
            images, targets = self.augmented(images, targets, batch_idx)
            logits = self.net(self._layout(images)).float()
            loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
            self.window_sums.add(loss, logits, targets, self.leaves_nan)
        else:  # every image of the batch was broken; the ranks still meet in the backward pass
            loss = cast(Tensor, sum(p.sum() for p in self.net.parameters()) * 0.0)
        if self._logs_now(batch_idx):
            self._log_window()
        return loss

    def note_skipped(self, skipped: dict[str, str]) -> None:
        """
        Raises:
            UserError: more broken images than `max_bad`.
        """
        if not skipped:
            return
        self.skipped.update(skipped)
        if self.max_bad is not None and len(self.skipped) > self.max_bad:
            some = ", ".join(list(self.skipped.values())[:5])
            raise UserError(
                f"{len(self.skipped)} images are broken, more than data.max_bad={self.max_bad}: {some}, ... Mend or "
                "remove them, or allow more; null is without limit."
            )

    def share_skipped(self) -> None:
        """All ranks know of the broken images that any has met."""
        if self.trainer.world_size > 1:
            gathered: list[dict[str, str]] = [{}] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, self.skipped)
            self.note_skipped({path: why for skipped in gathered for path, why in skipped.items()})

    def augmented(self, images: Tensor, targets: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
        """What the net sees of batch `batch_idx` of this epoch, whenever it is asked; see `BatchAugment`."""
        step = mix(self.seed, self.current_epoch, batch_idx)
        reseed(mix(step, self.global_rank), self.device)  # mixing, and dropout after it, need no state to resume
        return self.augment(images, targets, step, self.global_rank, self.trainer.world_size)

    def _logs_now(self, batch_idx: int) -> bool:
        """The steps at which Lightning passes logged values on to the loggers."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        last_of_step = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        return last_of_step and (self.global_step + 1) % every == 0

    def _log_window(self) -> None:
        means = self.window_sums.merged(lambda values: values)  # this rank's
        self.epoch_sums.take(self.window_sums)
        for name in ("loss", "acc1"):  # without a loss that is a number Lightning would log the one before again
            self.log(f"train/{name}_step", means.get(name, math.nan), prog_bar=True)

    def on_train_epoch_end(self) -> None:
        self.share_buffers()  # last.ckpt holds them, also where this epoch was not validated, or an average was
        self.epoch_sums.take(self.window_sums)
        self._log_means("train", self.epoch_sums, prog_bar=False)

    # -- validation and test: each image once, over any number of ranks

    def on_validation_epoch_start(self) -> None:
        self.eval_sums = Sums(self.device)
        self.share_buffers()

    def share_buffers(self) -> None:
        """Average BatchNorm's statistics over the ranks, once a validation instead of at each step."""
        if self.trainer.world_size > 1:
            for buffer in self.net.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.trainer.strategy.reduce(buffer, reduce_op="mean"))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._eval_step(batch)

    def on_validation_epoch_end(self) -> None:
        self.validated_at = self.trainer.fit_loop.epoch_loop.global_step
        self.share_skipped()
        means = self._log_means("val", self.eval_sums, prog_bar=True)
        if self.trainer.sanity_checking or not means:
            return
        found = {f"val/{name}": value for name, value in means.items()}
        sign = 1 if mode_of(self.monitor) == "max" else -1
        self.improved = not self.best or sign * found[self.monitor] > sign * self.best[self.monitor]
        if self.improved:
            self.best, self.best_epoch = found, self.trainer.fit_loop.epoch_progress.current.ready
        for key, value in self.best.items():
            self.log(f"{key}_best", value)

    def on_test_epoch_start(self) -> None:
        self.eval_sums = Sums(self.device)
        self.confusion = MulticlassConfusionMatrix(len(self.class_names), validate_args=False).to(self.device)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor] | None:
        result = self._eval_step(batch)
        if result is None:
            return None
        self.confusion.update(*result)
        return {"logits": result[0]}

    def on_test_epoch_end(self) -> None:
        self._log_means("test", self.eval_sums, prog_bar=False)
        self.confusion_matrix = self.confusion.compute().cpu()  # sums over the ranks

    def _eval_step(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        images, targets, skipped = batch[:3]
        self.note_skipped(skipped)
        if not len(targets):
            return None
        logits = self(images).float()
        self.eval_sums.add(F.cross_entropy(logits, targets), logits, targets)
        return logits, targets

    def _log_means(self, stage: str, sums: Sums, prog_bar: bool) -> dict[str, float]:
        together = partial(self.trainer.strategy.reduce, reduce_op="sum")
        means = sums.merged(together)
        leaves = self.leaves_nan and stage == "train"
        if not means and not (leaves and (sums.any_left_out(together) or not self.skipped)):
            raise UserError(
                f"no image of {stage} could be read: data.on_error=skip has left out all that there were, such as "
                f"{next(iter(self.skipped.values()), 'none')}."
            )
        if means and not math.isfinite(means["loss"]):
            raise UserError(
                f"{stage}/loss became {means['loss']} in epoch {self.current_epoch + 1}: lower optimizer.lr, clip with "
                "trainer.gradient_clip_val=1, or train with trainer.precision=32-true."
            )
        for name, value in means.items():
            self.log(f"{stage}/{name}", value, prog_bar=prog_bar and name != "acc5")
        return means

    # -- optimizer and checkpoint

    def configure_optimizers(self) -> Any:
        assert self.optimizer_settings is not None
        assert self.scheduler_settings is not None
        # a fused optimizer undoes 16-mixed's loss scaling inside its step, which is too late for clipping
        clips_scaled = self.trainer.precision == "16-mixed" and bool(self.trainer.gradient_clip_val)
        optimizer = optim.build_optimizer(
            self.net, self.optimizer_settings, self.step_images, may_fuse=not clips_scaled
        )
        schedulers = optim.build_schedulers(optimizer, self.scheduler_settings, self.steps, self.steps_per_epoch)
        for scheduler in schedulers:
            if "monitor" in scheduler:  # is there after a validation only
                scheduler["frequency"] = self.trainer.check_val_every_n_epoch
        return [optimizer], schedulers

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """As Lightning does, but also for bf16 with a fused optimizer, which it refuses although bf16 scales no loss,
        and for FSDP."""
        plugin = self.trainer.precision_plugin
        if isinstance(self.trainer.strategy, FSDPStrategy):
            sharded: Any = self.trainer.strategy.model
            if gradient_clip_val:  # the norm is that of all shards together
                sharded.clip_grad_norm_(gradient_clip_val)
            return
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and "current_model_state" not in checkpoint:
                # best.ckpt: Lightning asks no callback for weights alone, and would keep others than it validated
                callback.on_save_checkpoint(self.trainer, self, checkpoint)
                for key in ("current_model_state", "averaging_state"):
                    checkpoint.pop(key, None)
        checkpoint["alexlab"] = {**self.provenance, "best": self.best, "best_epoch": self.best_epoch}
        if self.place is not None:
            checkpoint["alexlab"]["place"] = {**self.place, **self._progress()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.keeps_best:
            self.best, self.best_epoch = checkpoint["alexlab"]["best"], checkpoint["alexlab"]["best_epoch"]
        if "place" in checkpoint["alexlab"]:  # no weights alone
            self.progress = checkpoint["alexlab"]["place"]
            self.came_from, self.validated_at = self.progress["of"], self.progress["validated_at"]
            self.skipped = dict(self.progress.get("skipped", {}))

    def _progress(self) -> dict[str, Any]:
        """What all ranks know of the epoch so far, and a resume needs: plain values and tensors."""
        sums = [part for each in (self.epoch_sums, self.window_sums) for part in (each.values, each.counted())]
        self.share_skipped()
        found: dict[str, Any] = {
            "skipped": self.skipped,
            "epochs": self.trainer.fit_loop.epoch_progress.current.completed,
            "steps_per_epoch": self.steps_per_epoch,
            "validated_at": self.validated_at,
            "metrics": {key: float(value) for key, value in self.trainer.callback_metrics.items()},
            "sums": self._of_all_ranks(torch.cat(sums)),
        }
        if self.trainer.world_size > 1:
            buffers = {name: buffer for name, buffer in self.net.named_buffers() if buffer.is_floating_point()}
            found["buffers"] = {name: self._of_all_ranks(buffer) for name, buffer in buffers.items()}
        return found

    def _of_all_ranks(self, value: Tensor) -> Tensor:
        """(ranks, ...), on the CPU."""
        if self.trainer.world_size == 1:
            return value.cpu()[None]
        return cast(Tensor, self.all_gather(value)).cpu()

    def restore_sums(self) -> None:
        """The sums of an epoch that goes on, and each rank's own statistics of BatchNorm; with other ranks than before
        the first has the sums of all, and each the mean statistics."""
        rank, ranks = self.global_rank, self.trainer.world_size
        sums = self.progress["sums"]
        if len(sums) != ranks:
            sums = F.pad(sums.sum(0, keepdim=True), (0, 0, 0, ranks - 1))
        self.epoch_sums, self.window_sums = (Sums(self.device, part) for part in sums[rank].chunk(2))
        self.take_buffers(self.progress)

    def take_buffers(self, place: dict[str, Any]) -> None:
        """BatchNorm's statistics of this rank, from the checkpoint of a run of several."""
        rank, ranks = self.global_rank, self.trainer.world_size
        for name, values in place.get("buffers", {}).items():
            own = values[rank] if len(values) == ranks else values.mean(0)
            self.net.get_buffer(name).copy_(own)


def reseed(seed: int, device: torch.device) -> None:
    """Seed the generators that dropout and mixing draw from, without torch.manual_seed's 131 microseconds."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
