"""Sums over images, from which the means of an epoch come."""

from collections.abc import Callable

import torch
from torch import Tensor


class Sums:
    """Kept on the device so that no step waits for it: loss, top-1 and top-5 hits, images."""

    def __init__(self, device: torch.device, values: Tensor | None = None) -> None:
        """
        Args:
            values: (4,), what was summed up before, and of how many images.
        """
        self.values = torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        self.images = 0
        self.left_out: Tensor | int = 0  # of them
        if values is not None:
            self.values += values[:3].to(self.values)
            self.images = int(values[3])

    def counted(self) -> Tensor:
        """(1,), the images."""
        return self.values.new_tensor([self.images]) - self.left_out

    def add(self, loss: Tensor, logits: Tensor, targets: Tensor, finite_only: bool = False) -> None:
        """loss: mean of the batch; logits (B, C); targets int64 (B,), or (B, C) where images were mixed.

        Args:
            finite_only: leaves out a batch whose loss is no number.
        """
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        # argmax, as the confusion matrix and the predictions: of equal logits, which bf16 has, topk puts any one first
        first = logits.detach().argmax(1) == labels
        among = (logits.detach().topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).any(1)
        more = torch.stack([loss.detach() * len(labels), first.sum(), (first | among).sum()])
        if finite_only:
            finite = loss.detach().isfinite()
            more = torch.where(finite, more, 0)
            self.left_out = self.left_out + torch.where(finite, 0, len(labels))
        self.values += more
        self.images += len(labels)

    def take(self, other: "Sums") -> None:
        """Add what `other` has summed up, which begins anew."""
        self.values += other.values
        self.images += other.images
        self.left_out = self.left_out + other.left_out
        other.values, other.images, other.left_out = torch.zeros_like(other.values), 0, 0

    def any_left_out(self, reduce: Callable[[Tensor], Tensor]) -> bool:
        """Whether any rank has left an image out."""
        return bool(reduce(self.values.new_zeros(1) + self.left_out) > 0)

    def merged(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means over all ranks' images, after a `reduce` that sums a tensor over the ranks."""
        together = torch.cat([self.values, self.counted()])
        loss, acc1, acc5, count = reduce(together).tolist()
        return {"loss": loss / count, "acc1": acc1 / count, "acc5": acc5 / count} if count else {}
