"""Metrics over the images of an epoch. Sums stay on the device, so that no training step waits for the device."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

TOP_K = 5


class LossAndAccuracy(Metric):
    """Mean loss, top-1 and top-5 accuracy (0 to 1), exact over any split of the images into batches and ranks.

    With fewer than five classes, top-5 is top-`num_classes`, which is 1. `window_means` gives the means since the
    previous call, for the curves within an epoch.

    Each step calls `add`, which is `update` without torchmetrics' bookkeeping.
    """

    NAMES = ("loss", "acc1", "acc5")
    full_state_update = False
    past: Tensor  # the sums up to the last window_means: loss x images, top-1 hits, top-5 hits, images
    window: Tensor  # the same sums since then

    def __init__(self) -> None:
        super().__init__(compute_with_cache=False)  # `add` does not clear a cache
        self.add_state("past", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("window", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """See `add`."""
        self.add(logits, labels, loss)

    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Add a batch: logits (B, num_classes), labels int64 (B,), and the mean loss of the batch."""
        logits, loss = logits.detach(), loss.detach()
        # argmax, as in the confusion matrix: topk may put any of several equal logits first, and bf16 has many
        top1 = logits.argmax(1) == labels
        top_k = logits.topk(min(TOP_K, logits.shape[1]), dim=1).indices
        top5 = top1 | (top_k == labels[:, None]).any(1)
        images = len(labels)
        sums = [loss * images, top1.sum(), top5.sum(), loss.new_full((), images)]
        self.window.add_(torch.stack(sums))

    def window_means(self) -> dict[str, float]:
        """Return loss and top-1 accuracy of this rank since the previous call; NaN without an image."""
        loss, top1, _, images = self.window.tolist()
        self.past.add_(self.window)
        self.window.zero_()
        return {"loss": loss / images, "acc1": top1 / images} if images else {"loss": math.nan, "acc1": math.nan}

    def compute(self) -> dict[str, float]:
        """Return the means over the images of all ranks; empty without an image."""
        loss, top1, top5, images = (self.past + self.window).tolist()
        return {"loss": loss / images, "acc1": top1 / images, "acc5": top5 / images} if images else {}
