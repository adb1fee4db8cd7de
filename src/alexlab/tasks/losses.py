"""Losses: modules from logits and targets to a scalar, the mean over the images of a batch."""

import torch.nn.functional as F
from torch import Tensor, nn


class CrossEntropy(nn.Module):
    """Cross entropy in nats, with label smoothing in training only, so that validation losses stay comparable.

    Args:
        label_smoothing: 0 to below 1, the part of the target that is spread evenly over all classes.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (B, C); targets int64 (B,), or class probabilities (B, C) of images that mixup or cutmix mixed."""
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)
