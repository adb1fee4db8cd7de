"""Losses: modules from logits and targets to a scalar, the mean over the images of a batch.

A constructor that names `num_classes`, `class_names` or `class_weights` gets them; `class_weights` of a yaml (auto, a
list or a file) arrives as a list of one number per class.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Weighted(nn.Module):
    """A loss with class weights, which act in training only, so that validation losses stay comparable."""

    weights: Tensor | None

    def __init__(self, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("weights", weights, persistent=False)


class CrossEntropy(Weighted):
    """Cross entropy in nats. Label smoothing, too, acts in training only.

    Args:
        label_smoothing: fraction of the target that is spread evenly over all classes, from 0 to below 1.
        class_weights: factor on the loss of each class. The sum over the images is divided by their number, and not by
            the sum of their weights as in torch: so the loss does not depend on how images are divided into batches.
    """

    def __init__(self, label_smoothing: float = 0.0, class_weights: Sequence[float] | None = None) -> None:
        super().__init__(class_weights)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar.

        Args:
            logits: (B, num_classes).
            targets: int64 (B,), or class probabilities (B, num_classes) if mixup or cutmix mixed the images.
        """
        smoothing, weights = (self.label_smoothing, self.weights) if self.training else (0.0, None)
        if weights is None:
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        return F.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction="none").mean()


class Focal(Weighted):
    """Focal loss of softmax probabilities p: the mean of (1 - p)^gamma * -log(p) of the true class (Lin et al. 2017).

    Args:
        gamma: 0 is the cross entropy; larger values give less weight to images that are classified well.
        class_weights: factor on the loss of each class, in training only.
    """

    def __init__(self, gamma: float = 2.0, class_weights: Sequence[float] | None = None) -> None:
        super().__init__(class_weights)
        self.gamma = gamma

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch: logits (B, num_classes); targets int64 (B,), or probabilities (B, C)."""
        logs = logits.log_softmax(1)
        losses = -((1 - logs.exp()) ** self.gamma) * logs
        if self.training and self.weights is not None:
            losses = losses * self.weights
        if targets.ndim == 1:
            return losses.gather(1, targets[:, None]).mean()
        return (losses * targets).sum(1).mean()


class BinaryCrossEntropy(Weighted):
    """Binary cross entropy of the sigmoid of each logit: the mean over classes and images, in nats.

    Args:
        class_weights: factor on the loss of each class where the target is 1, in training only.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch: logits (B, num_classes); targets int64 (B,), or from 0 to 1 (B, C)."""
        return F.binary_cross_entropy_with_logits(
            logits, one_hot(targets, logits), pos_weight=self.weights if self.training else None
        )


class Asymmetric(nn.Module):
    """Asymmetric loss (Ridnik et al. 2021), for many classes of which few are present: summed over classes, mean over
    images.

    Args:
        gamma_negative, gamma_positive: as `gamma` of the focal loss, where the target is 0 and where it is 1.
        shift: probabilities of absent classes below it have no loss, 0 to 1.
    """

    def __init__(self, gamma_negative: float = 4.0, gamma_positive: float = 1.0, shift: float = 0.05) -> None:
        super().__init__()
        self.gamma_negative, self.gamma_positive, self.shift = gamma_negative, gamma_positive, shift

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch: logits (B, num_classes); targets int64 (B,), or from 0 to 1 (B, C)."""
        targets, present = one_hot(targets, logits), logits.float().sigmoid()
        absent = (1 - present + self.shift).clamp(max=1)
        positive = targets * (1 - present) ** self.gamma_positive * F.logsigmoid(logits.float())
        negative = (1 - targets) * (1 - absent) ** self.gamma_negative * absent.clamp(min=1e-8).log()
        return -(positive + negative).sum(1).mean()


def one_hot(targets: Tensor, logits: Tensor) -> Tensor:
    """Turn labels int64 (B,) into 0 and 1 (B, num_classes). Targets (B, num_classes) stay as they are."""
    return F.one_hot(targets, logits.shape[1]).to(logits.dtype) if targets.ndim == 1 else targets.to(logits.dtype)
