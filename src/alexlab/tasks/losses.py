"""Losses: modules from logits and targets to a scalar, the mean over the images of a batch."""

import torch.nn.functional as F
from torch import Tensor, nn


class CrossEntropy(nn.Module):
    """Cross entropy in nats, with label smoothing in training only, so that validation losses stay comparable.

    Args:
        label_smoothing: fraction of the target that is spread evenly over all classes, from 0 to below 1.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar.

        Args:
            logits: (B, num_classes).
            targets: int64 (B,), or class probabilities (B, num_classes) if mixup or cutmix mixed the images.
        """
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
