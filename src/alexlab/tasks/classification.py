"""START HERE: the LightningModule that trains an image classifier. Copy this file to change the loss or a step."""

from typing import Any

from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassConfusionMatrix

from alexlab.data.dataset import Batch
from alexlab.tasks.augment import BatchAugment
from alexlab.tasks.base import BaseTask, RunInfo, Stage
from alexlab.tasks.losses import CrossEntropy
from alexlab.tasks.optimizers import OptimizerSettings, build_optimizer, build_schedulers


class ImageClassifier(BaseTask):
    """Train `net` on images that belong to one class each.

    A batch has uint8 images (B, 3, H, W), int64 targets (B,) and the paths of broken images that were skipped. The
    logged metrics are `loss`, `acc1`, `acc5` and those of `metrics`, each with the prefix `train/`, `val/` or `test/`.

    Args:
        net: float images (B, 3, H, W) -> logits (B, num_classes).
        criterion: (logits, targets) -> mean loss of the batch. Targets are int64 (B,), or class probabilities
            (B, num_classes) if mixup or cutmix mixed the images.
        augment: uint8 images -> float images, on the device.
        metrics: more torchmetrics, updated with logits (B, num_classes) and labels (B,); each must give one number.
        optimizer: settings of the optimizer and the learning rate schedule; None if the task only evaluates.
        run: seed, class names and so on, see `RunInfo`.
    """

    def __init__(
        self,
        net: nn.Module,
        augment: BatchAugment,
        criterion: nn.Module | None = None,
        metrics: MetricCollection | None = None,
        optimizer: OptimizerSettings | None = None,
        run: RunInfo | None = None,
    ) -> None:
        super().__init__(net, augment, metrics, run)
        self.criterion = criterion or CrossEntropy()
        self.optimizer_settings = optimizer

    def forward(self, images: Tensor) -> Tensor:
        """Classify uint8 images (B, 3, H, W): logits (B, num_classes)."""
        return self.net(self.normalized(images)).float()  # float32 logits, in mixed precision too

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if not len(batch.targets):  # all images of the batch are broken
            return self.zero_loss()
        images, targets = self.augmented(batch.images, batch.targets, batch_idx)
        logits = self.net(images).float()
        loss = self.criterion(logits, targets)
        self.update_metrics("train", logits, targets, loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor] | None:
        logits = self._evaluate("test", batch)
        if logits is None:
            return None
        self.confusion.update(logits, batch.targets)
        return {"logits": logits}

    def _evaluate(self, stage: Stage, batch: Batch) -> Tensor | None:
        """Update the metrics of `stage`, and return the logits, or None for a batch without images.

        All ranks have the same number of batches. The last may be empty, because each image is evaluated once.
        """
        if not len(batch.targets):
            return None
        logits = self(batch.images)
        self.update_metrics(stage, logits, batch.targets, self.criterion(logits, batch.targets))
        return logits

    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        self.confusion = MulticlassConfusionMatrix(len(self.class_names), validate_args=False).to(self.device)

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self.confusion_matrix = self.confusion.compute().cpu()  # summed over the ranks; rows are the true classes

    def configure_optimizers(self) -> Any:
        settings = self.optimizer_settings
        assert settings is not None, "the task was built to evaluate only"
        optimizer = build_optimizer(
            self.net, settings.optimizer, settings.images_per_step, may_fuse=not self.clips_scaled_gradients
        )
        schedulers = build_schedulers(
            optimizer,
            settings.scheduler,
            settings.steps,
            settings.steps_per_epoch,
            self.trainer.check_val_every_n_epoch or 1,
        )
        return [optimizer], schedulers
