"""START HERE: the LightningModule that trains an image classifier. To change a step, copy distillation.py."""

from typing import Any

from torch import Tensor, nn
from torchmetrics import MetricCollection

from alexlab.data.dataset import Batch
from alexlab.tasks.augment import BatchAugment
from alexlab.tasks.base import BaseTask, RunInfo, Stage
from alexlab.tasks.losses import CrossEntropy
from alexlab.tasks.metrics import LossAndAccuracy, MeanLoss
from alexlab.tasks.optimizers import OptimizerSettings


class ImageClassifier(BaseTask):
    """Train `net` on images that belong to one class each.

    A batch has uint8 images (B, C, H, W), int64 targets (B,) and the paths of broken images that were skipped. The
    logged metrics are `loss`, `acc1`, `acc5` and those of `metrics`, each with the prefix `train/`, `val/` or `test/`.

    Args:
        net: float images (B, C, H, W) -> logits (B, num_classes).
        augment: uint8 images -> float images, on the device.
        criterion: (logits, targets) -> mean loss of the batch. Targets are int64 (B,), or class probabilities
            (B, num_classes) if mixup or cutmix mixed the images.
        metrics: more torchmetrics, updated with probabilities (B, num_classes) and labels (B,); each must give one
            number, or one per class.
        optimizer: settings of the optimizer and the learning rate schedule; None if the task only evaluates.
        run: seed, class names and so on.
    """

    Sums: type[MeanLoss] = LossAndAccuracy
    one_class_per_image = True

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
        """Compute logits, float32 (B, num_classes) in mixed precision too, of uint8 images (B, C, H, W)."""
        return self.net(self.normalized(images)).float()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if not len(batch.targets):  # all images of the batch are broken
            return self.zero_loss()
        images, targets = self.augmented(batch.images, batch.targets, batch_idx)
        logits = self.net(images).float()
        loss = self.criterion(logits, targets)
        self.update_metrics("train", logits, targets, loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return self.evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return self.evaluate(batch, "test")

    def evaluate(self, batch: Batch, stage: Stage) -> Tensor | None:
        """Update the metrics, and return the logits for callbacks.

        Each image is evaluated once, and all ranks have the same number of batches, so the last batch of a rank may be
        empty.
        """
        if not len(batch.targets):
            return None
        logits = self(batch.images)
        self.update_metrics(stage, logits, batch.targets, self.criterion(logits, batch.targets))
        return logits

    def configure_optimizers(self) -> Any:
        """Build what conf/optimizer and conf/scheduler describe. Lightning takes torch's own optimizers here too."""
        assert self.optimizer_settings is not None, "the task was built to evaluate only"
        return self.optimizer_settings.build(self.net, self.trainer)
