"""Distillation: the network also learns from the outputs of a trained one (Hinton et al. 2015)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexlab.data.dataset import Batch
from alexlab.tasks.classification import ImageClassifier


class Distillation(ImageClassifier):
    """Train `net` on (1 - weight) * criterion + weight * T^2 * KL(teacher / T, net / T).

    Args:
        teacher: a trained network with the same classes, which gets the same images; None to evaluate only.
        temperature: T; larger values show more of the teacher's smaller probabilities.
        weight: of the teacher, from 0 to 1.
    """

    def __init__(self, *args: Any, teacher: nn.Module | None, temperature: float, weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.temperature, self.weight = temperature, weight
        self.teacher = [] if teacher is None else [teacher.eval()]  # a list, so that checkpoints skip the teacher

    def on_fit_start(self) -> None:
        self.teacher[0].to(self.device, next(self.net.parameters()).dtype)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if not len(batch.targets):
            return self.zero_loss()
        images, targets = self.augmented(batch.images, batch.targets, batch_idx)
        logits = self.net(images).float()
        with torch.no_grad():
            taught = self.teacher[0](images).float()
        t = self.temperature
        soft = F.kl_div(
            (logits / t).log_softmax(1), (taught / t).log_softmax(1), reduction="batchmean", log_target=True
        )
        loss = (1 - self.weight) * self.criterion(logits, targets) + self.weight * t**2 * soft
        self.update_metrics("train", logits, targets, loss)
        return loss
