"""Sums that are exact over any split into batches and ranks, and steps that need no state."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from alexlab.tasks.augment import BatchAugment
from alexlab.tasks.classification import ImageClassifier, Sums, reseed

CPU = torch.device("cpu")


def sums_of(logits: Tensor, targets: Tensor, batches: list[int]) -> Sums:
    sums = Sums(CPU)
    for part, labels in zip(logits.split(batches), targets.split(batches), strict=True):
        sums.add(F.cross_entropy(part, labels), part, labels)
    return sums


def test_means_are_torchmetrics_over_ranks_with_uneven_shares() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(23, 12), torch.randint(0, 12, (23,))
    whole = sums_of(logits, targets, [10, 10, 3]).merged(lambda values: values)
    ranks = [sums_of(logits[:13], targets[:13], [8, 5]), sums_of(logits[13:], targets[13:], [8, 2]), Sums(CPU)]
    together = torch.stack([torch.cat([r.values, r.values.new_tensor([r.images])]) for r in ranks]).sum(0)
    split = ranks[0].merged(lambda values: together)
    assert split == pytest.approx(whole)
    assert whole["loss"] == pytest.approx(float(F.cross_entropy(logits, targets)))
    for k in (1, 5):
        expected = multiclass_accuracy(logits, targets, 12, average="micro", top_k=k)
        assert whole[f"acc{k}"] == pytest.approx(float(expected))


def test_of_equal_logits_the_first_counts_as_in_the_confusion_matrix() -> None:
    """bf16 has three digits, so two classes are often the same."""
    torch.manual_seed(0)
    logits, targets = torch.randint(0, 3, (500, 20)).bfloat16(), torch.randint(0, 20, (500,))
    matrix = multiclass_confusion_matrix(logits, targets, 20)
    sums = Sums(CPU)
    sums.add(torch.tensor(1.0), logits, targets)
    means = sums.merged(lambda values: values)
    assert means["acc1"] == matrix.diagonal().sum() / 500
    assert means["acc5"] >= means["acc1"]


def test_fewer_than_five_classes_and_mixed_targets() -> None:
    sums = Sums(CPU)
    sums.add(torch.tensor(1.0), torch.tensor([[2.0, 1, 0], [0, 1, 2]]), torch.tensor([[0.7, 0.3, 0], [0.6, 0.4, 0]]))
    assert sums.merged(lambda values: values) == {"loss": 1.0, "acc1": 0.5, "acc5": 1.0}
    assert Sums(CPU).merged(lambda values: values) == {}


def model_at(epoch: int, rank: int = 0) -> Any:
    model: Any = ImageClassifier(nn.Identity(), BatchAugment([0.5] * 3, [0.5] * 3, 4, mixup=0.2), list("abcd"), seed=9)
    model._trainer = type("T", (), {"current_epoch": epoch, "global_rank": rank, "world_size": 2})()
    return model


def test_a_steps_randomness_depends_on_nothing_before_it() -> None:
    images, targets = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.arange(4)

    def drawn(epoch: int, batch: int, rank: int = 0) -> tuple[Tensor, Tensor]:
        torch.rand(int(torch.randint(1, 50, ())))  # whatever went before
        seen, _ = model_at(epoch, rank).augmented(images, targets, batch)
        return seen, torch.rand(3)  # what dropout draws next

    first, again = drawn(1, 2), drawn(1, 2)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    for other in (drawn(1, 3), drawn(2, 2), drawn(1, 2, rank=1)):
        assert not torch.equal(first[1], other[1])


def test_reseed_is_torchs_own_seed() -> None:
    reseed(5, CPU)
    first = torch.rand(4)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_reseed_reaches_the_gpu() -> None:
    device = torch.device("cuda", 0)
    reseed(5, device)
    first = torch.rand(4, device=device)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(4, device=device))
