"""The base classes of tasks: metrics, best values, broken images, checkpoint contents, and workarounds for Lightning.

`BaseTask` is the base of this package's tasks. `adopt` fits a LightningModule of your own into a run. A task that
overrides one of the hooks below must call `super()`.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from pytorch_lightning.strategies import FSDPStrategy
from pytorch_lightning.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix

from alexlab.data.dataset import Batch
from alexlab.data.sample_rng import mix
from alexlab.data.sampler import part
from alexlab.engine.errors import UserError
from alexlab.engine.schema import mode_of
from alexlab.tasks.augment import BatchAugment
from alexlab.tasks.metrics import MeanLoss

Stage = Literal["train", "val", "test"]
# attributes that a run sets, and hooks that it replaces, in a LightningModule that is no BaseTask
OF_THE_RUN = ("augment", "run", "best", "best_epoch", "improved", "skipped", "class_names", "per_class")
OURS = ("transfer_batch_to_device", "configure_gradient_clipping")
STAGES: tuple[Stage, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class RunInfo:
    """What a task needs to know about the run."""

    class_names: Sequence[str] = ()  # readable, in the order of the logits
    seed: int = 0  # of augmentation and dropout
    monitor: str = "val/acc1"  # the validation metric that decides which weights are the best
    mode: Literal["min", "max"] | None = None  # whether less or more of `monitor` is better; None: by the name
    max_bad: int | None = None  # broken images that may be skipped, of all splits together; None is no limit
    channels_last: bool = False  # memory format of the network
    global_batch: int | None = None  # training images per batch over all devices; None: as many on each
    provenance: dict[str, Any] = field(default_factory=dict)  # plain values for each checkpoint


class RunModule(pl.LightningModule):
    """What a run needs of a LightningModule. Checkpoints store the weights of `net` with the prefix "net."."""

    net: nn.Module
    one_class_per_image = False  # whether the test computes a confusion matrix

    def set_up(self, augment: BatchAugment, run: RunInfo) -> None:
        """Prepare for a run; call it when `net` is set."""
        self.augment, self.run = augment, run
        self.class_names = list(run.class_names)
        if run.channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.ignores_nonfinite_loss = False  # whether training metrics ignore batches with such a loss (on_nan=skip)
        self.nonfinite_losses = 0
        self.skipped: dict[str, str] = {}  # path -> reason of each broken image that was skipped
        self.best: dict[str, float] = {}  # all validation metrics of the epoch with the best `monitor`
        self.best_epoch: int | None = None  # counted from 1
        self.improved = False  # whether the last validation was the best so far, so that best.ckpt must be written
        # of the last test, int64 (classes, classes), over all ranks; rows are the true classes
        self.confusion_matrix: Tensor | None = None
        self.per_class: dict[str, list[float]] = {}  # numbers per class of the last validation or test, by metric

    # -- from a batch to what the network sees

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch and note the broken images. Lightning's own search for tensors in a batch takes 0.2 ms."""
        self.note_skipped(batch.skipped)
        return batch.to(device)

    def augmented(self, images: Tensor, targets: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Augment training batch `batch_idx` of this epoch, see `BatchAugment`.

        All random numbers, also dropout's, depend on seed, epoch, batch and rank only, so a resumed run draws the same.
        """
        batch_seed = mix(self.run.seed, self.current_epoch, batch_idx)
        reseed(mix(batch_seed, self.global_rank), self.device)
        first, total = self._part(len(images))
        images, targets = self.augment(images, targets, batch_seed, self.global_rank, first, total)
        return self._as_input(images), targets

    def _part(self, count: int) -> tuple[int, int]:
        """Return the position of this rank's first image in the global batch, and the number of all.

        Args:
            count: this rank's images, if all ranks have as many.
        """
        rank, ranks, total = self.global_rank, self.trainer.world_size, self.run.global_batch
        if total is None or total % ranks == 0:
            return rank * count, ranks * count
        return part(total, rank, ranks)[0], total

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute gradients. DDP takes the mean over the ranks, so a rank with fewer images must count less."""
        total, ranks = self.run.global_batch, self.trainer.world_size
        if total is not None and total % ranks:
            first, end = part(total, self.global_rank, ranks)
            loss = loss * ((end - first) * ranks / total)
        super().backward(loss, *args, **kwargs)

    def normalized(self, images: Tensor) -> Tensor:
        """Convert uint8 images (B, C, H, W) of an evaluation to what the network takes."""
        return self._as_input(self.augment.normalize(images))

    def _as_input(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if self.run.channels_last else torch.contiguous_format
        return images.to(self.dtype).contiguous(memory_format=layout)  # float32, except for trainer.precision=*-true

    def zero_loss(self) -> Tensor:
        """Return a loss of 0 for a batch without images, because all ranks must take part in the backward pass."""
        return cast(Tensor, sum(parameter.sum() for parameter in self.net.parameters()) * 0.0)

    # -- the best validation

    def compare_with_best(self, logged: dict[str, float]) -> None:
        """Remember the metrics of a validation if they are the best so far. Raises UserError if they lack `monitor`."""
        monitor = self.run.monitor
        sign = 1 if (self.run.mode or mode_of(monitor)) == "max" else -1
        if monitor not in logged:
            raise UserError(f"`monitor={monitor}` was not logged by the validation, which has {', '.join(logged)}.")
        before = self.best.get(monitor, math.nan)
        self.improved = not self.best or math.isnan(before) or sign * logged[monitor] > sign * before
        if self.improved:
            self.best, self.best_epoch = logged, self.trainer.fit_loop.epoch_progress.current.ready

    # -- what the ranks share

    def share_buffers(self) -> None:
        """Average BatchNorm's statistics over the ranks, once per validation instead of at each step."""
        if self.trainer.world_size > 1:
            for buffer in self.net.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.trainer.strategy.reduce(buffer, reduce_op="mean"))

    def note_skipped(self, skipped: dict[str, str]) -> None:
        """Add broken images to `skipped`, and raise UserError if they are more than `max_bad`."""
        self.skipped.update(skipped)
        if skipped and self.run.max_bad is not None and len(self.skipped) > self.run.max_bad:
            some = ", ".join(list(self.skipped.values())[:5])
            raise UserError(
                f"{len(self.skipped)} images are broken, more than data.max_bad={self.run.max_bad}: {some}, ... Repair "
                "or remove them, or raise data.max_bad; null is no limit."
            )

    def share_skipped(self) -> None:
        """Gather the broken images of all ranks on each rank."""
        if self.trainer.world_size > 1:
            gathered: list[dict[str, str]] = [{}] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, self.skipped)
            self.note_skipped({path: why for skipped in gathered for path, why in skipped.items()})

    # -- optimizer and checkpoints

    def on_train_start(self) -> None:
        """Recompute the learning rate: the checkpoint has the old schedule's, which is wrong if max_epochs changed."""
        super().on_train_start()
        for entry in self.trainer.lr_scheduler_configs:
            schedule = entry.scheduler
            if isinstance(schedule, LambdaLR):
                groups = schedule.optimizer.param_groups
                for group, base_lr, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
                    group["lr"] = base_lr * factor(schedule.last_epoch)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step a schedule. Schedules of timm get the number of the next epoch or step."""
        in_epochs = getattr(scheduler, "t_in_epochs", None)
        if in_epochs is None:
            super().lr_scheduler_step(scheduler, metric)
        elif in_epochs:
            scheduler.step(self.trainer.fit_loop.epoch_progress.current.ready, metric)
        else:
            scheduler.step_update(self.global_step, metric)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip gradients as Lightning does, also with FSDP, and also with bf16 and a fused optimizer. Lightning refuses
        the latter, although only 16-mixed scales the loss."""
        plugin = self.trainer.precision_plugin
        if isinstance(self.trainer.strategy, FSDPStrategy):
            sharded: Any = self.trainer.strategy.model
            if gradient_clip_val:
                sharded.clip_grad_norm_(gradient_clip_val)  # the norm of all shards together
        elif isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the run's provenance and the best metrics. If the run averages weights, save the average in best.ckpt:
        Lightning calls no callback for a checkpoint that has weights only."""
        super().on_save_checkpoint(checkpoint)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging) and "current_model_state" not in checkpoint:
                callback.on_save_checkpoint(self.trainer, self, checkpoint)
                for key in ("current_model_state", "averaging_state"):
                    checkpoint.pop(key, None)
        checkpoint["alexlab"] = {**self.run.provenance, "best": self.best, "best_epoch": self.best_epoch}

    def __setattr__(self, name: str, value: Any) -> None:
        """Set the attribute that Lightning sets forty times per step, without nn.Module's checks (4 microseconds each).
        If Lightning renames the attribute, only this speed is lost."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)


class BaseTask(RunModule):
    """A task calls `update_metrics` in each step. This class logs the metrics and remembers the best validation."""

    Sums: type[MeanLoss] = MeanLoss  # the metric of each stage that needs the loss: MeanLoss, or LossAndAccuracy

    def __init__(
        self, net: nn.Module, augment: BatchAugment, metrics: MetricCollection | None = None, run: RunInfo | None = None
    ) -> None:
        super().__init__()
        self.net = net
        self.set_up(augment, run or RunInfo())
        # plain dicts: as submodules they would be rounded to bfloat16 with the weights by trainer.precision=bf16-true
        self.sums = {stage: self.Sums() for stage in STAGES}
        self.metrics = {stage: (metrics or MetricCollection({})).clone() for stage in STAGES}

    # -- metrics

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return what the metrics of conf/metrics get, from 0 to 1 (B, num_classes): the softmax of float32 logits."""
        return logits.softmax(1)

    def labels_of(self, targets: Tensor) -> Tensor:
        """Return the labels that metrics get: the largest of class probabilities (B, num_classes)."""
        return targets if targets.ndim == 1 else targets.argmax(1)

    def metric_names(self, stage: Stage) -> list[str]:
        """Return the names under which the metrics of a stage are logged."""
        return [f"{stage}/{name}" for name in (*self.Sums.NAMES, *self.metrics[stage].keys())]

    def update_metrics(self, stage: Stage, logits: Tensor, targets: Tensor, loss: Tensor) -> None:
        """Add a batch to the metrics of a stage: logits (B, num_classes), targets, and the mean loss of the batch."""
        if stage == "train" and self.ignores_nonfinite_loss and not torch.isfinite(loss):
            self.nonfinite_losses += 1
            return
        labels = self.labels_of(targets)
        self.sums[stage].add(logits, labels, loss)
        if self.metrics[stage]:  # an empty collection would take 10 microseconds
            # torchmetrics would take logits of a batch that happen to be from 0 to 1 for probabilities
            self.metrics[stage].update(self.probabilities(logits.detach().float()), labels)
        if stage == "test" and self.one_class_per_image:
            self.confusion.update(logits, labels)

    def reset_metrics(self, stage: Stage) -> None:
        sums = self.sums[stage]
        if self.device.type == "mps":  # Apple's GPUs have no float64
            sums.set_dtype(torch.float32)
        sums.to(self.device).reset()
        self.metrics[stage].to(self.device).reset()

    def log_metrics(self, stage: Stage) -> dict[str, float]:
        """Log the metrics of an epoch over all ranks, and return them under their logged names.

        Raises:
            UserError: no image could be read, the loss is NaN or infinite, or a metric gives neither one number nor
                one per class, whose mean is logged.
        """
        with warnings.catch_warnings():  # a rank may have no images
            warnings.filterwarnings("ignore", message=".*method of metric .* was called before the ``update`` method")
            means = self.sums[stage].compute()
            further = self.metrics[stage].compute()
        if not means:
            if stage == "train" and self.ignores_nonfinite_loss:
                ignored = torch.tensor(float(self.nonfinite_losses), device=self.device)
                if self.trainer.strategy.reduce(ignored, reduce_op="sum") > 0 or not self.skipped:
                    return {}
            example = next(iter(self.skipped.values()), "none")
            raise UserError(
                f"No image of {stage} could be read: data.on_error=skip skipped all of them, such as {example}."
            )
        if not math.isfinite(means["loss"]):
            raise UserError(
                f"{stage}/loss became {means['loss']} in epoch {self.current_epoch + 1}: lower optimizer.lr, clip with "
                "trainer.gradient_clip_val=1, or train with trainer.precision=32-true."
            )
        for name, value in further.items():
            if isinstance(value, Tensor) and value.shape == (len(self.class_names),) and len(value) > 1:
                if stage != "train":
                    self.per_class[name] = value.tolist()
                value = value.nanmean()
            if not isinstance(value, Tensor) or value.numel() != 1:
                kind = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise UserError(f"The metric {name} gives a {kind}, and must give one number, or one per class.")
            means[name] = float(value)
        logged = {f"{stage}/{name}": value for name, value in means.items()}
        for name, value in logged.items():
            self.log(name, value, prog_bar=stage == "val")
        return logged

    def on_train_epoch_start(self) -> None:
        self.reset_metrics("train")
        self.nonfinite_losses = 0

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if stepped and self.global_step % every == 0:
            # NaN, of steps without images, is logged too: without a value, Lightning would log the previous one again
            for name, value in self.sums["train"].window_means().items():
                self.log(f"train/{name}_step", value, prog_bar=True)

    def on_train_epoch_end(self) -> None:
        self.share_buffers()  # for last.ckpt, as not every epoch is validated
        self.log_metrics("train")

    def on_validation_epoch_start(self) -> None:
        self.reset_metrics("val")
        self.share_buffers()

    def on_validation_epoch_end(self) -> None:
        """Log the metrics and compare them with the best. Callbacks cannot do this, because their hooks run before."""
        self.share_skipped()
        logged = self.log_metrics("val")
        if self.trainer.sanity_checking:
            return
        self.compare_with_best(logged)
        for name, value in self.best.items():
            self.log(f"{name}_best", value)

    def on_test_epoch_start(self) -> None:
        self.reset_metrics("test")
        if self.one_class_per_image:
            self.confusion = MulticlassConfusionMatrix(len(self.class_names), validate_args=False).to(self.device)

    def on_test_epoch_end(self) -> None:
        self.log_metrics("test")
        if self.one_class_per_image:
            self.confusion_matrix = self.confusion.compute().cpu()


def adopt(module: pl.LightningModule, augment: BatchAugment, run: RunInfo) -> RunModule:
    """Make a LightningModule of any kind fit into a run.

    The module's steps get (images, targets): float32 (B, C, H, W), augmented in training and normalized, and targets.
    The module logs the metrics, among them `monitor`. Batches without a readable image are skipped.

    Raises:
        UserError: the module has no `net`, or has attributes or hooks that only the run may set.
    """
    taken = [name for name in OF_THE_RUN if name in vars(module) or name in module._modules]
    taken += [name for name in OURS if getattr(type(module), name) is not getattr(pl.LightningModule, name)]
    if taken:
        raise UserError(
            f"{type(module).__name__} has {', '.join(taken)}, which a run sets itself: give them another name, "
            "or derive the class from alexlab.tasks.base.BaseTask."
        )
    if not isinstance(getattr(module, "net", None), nn.Module):
        raise UserError(
            f"{type(module).__name__} keeps no network as `self.net`, which checkpoints, eval and export need: take "
            "`net` in the constructor, and set self.net = net."
        )
    module.__class__ = type(type(module).__name__, (Adopted, type(module)), {"__module__": type(module).__module__})
    cast(RunModule, module).set_up(augment, run)
    return cast(RunModule, module)


class Adopted(RunModule):
    """The first base of what `adopt` returns; the second is the user's class."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if not len(batch.targets):
            return self.zero_loss()
        images = self.augmented(batch.images, batch.targets, batch_idx)
        return super().training_step(images, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> Any:
        if len(batch.targets):
            super().validation_step((self.normalized(batch.images), batch.targets), batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> Any:
        if len(batch.targets):
            super().test_step((self.normalized(batch.images), batch.targets), batch_idx)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.share_buffers()

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.share_skipped()

    def on_train_epoch_end(self) -> None:
        self.share_buffers()
        super().on_train_epoch_end()


def reseed(seed: int, device: torch.device) -> None:
    """Seed the generators that dropout and mixing use. torch.manual_seed takes 131 microseconds for it."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
