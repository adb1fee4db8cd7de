"""Loss and accuracy over the images of an epoch: exact over any split into batches and ranks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from alexlab.tasks.losses import CrossEntropy
from alexlab.tasks.metrics import LossAndAccuracy


def metric_of(logits: Tensor, labels: Tensor, batches: list[int]) -> LossAndAccuracy:
    metric = LossAndAccuracy()
    for part, part_labels in zip(logits.split(batches), labels.split(batches), strict=True):
        metric.update(part, part_labels, F.cross_entropy(part, part_labels))
    return metric


def test_means_equal_torchmetrics_over_ranks_with_different_numbers_of_images() -> None:
    """A rank may have none at all."""
    torch.manual_seed(0)
    logits, labels = torch.randn(23, 12), torch.randint(0, 12, (23,))
    expected = {"loss": float(F.cross_entropy(logits, labels))}
    for k in (1, 5):
        expected[f"acc{k}"] = float(multiclass_accuracy(logits, labels, 12, average="micro", top_k=k))
    ranks = [metric_of(logits[:13], labels[:13], [8, 5]), metric_of(logits[13:], labels[13:], [8, 2])]
    ranks.append(LossAndAccuracy())
    for first, *others in (ranks, ranks[::-1]):
        total = first.clone()
        for other in others:
            total.merge_state(other)
        assert total.compute() == pytest.approx(expected)
    assert metric_of(logits, labels, [10, 10, 3]).compute() == pytest.approx(expected)


def test_window_means_are_of_the_images_since_the_last_call() -> None:
    torch.manual_seed(1)
    logits, labels = torch.randn(20, 6), torch.randint(0, 6, (20,))
    metric = metric_of(logits[:12], labels[:12], [12])
    assert metric.window_means()["loss"] == pytest.approx(float(F.cross_entropy(logits[:12], labels[:12])))
    metric.update(logits[12:], labels[12:], F.cross_entropy(logits[12:], labels[12:]))
    second = metric.window_means()
    assert second["loss"] == pytest.approx(float(F.cross_entropy(logits[12:], labels[12:])))
    assert second["acc1"] == pytest.approx(float((logits[12:].argmax(1) == labels[12:]).float().mean()))
    assert all(map(math.isnan, metric.window_means().values())), "no images since then"
    assert metric.compute()["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)))


def test_top1_of_equal_logits_counts_as_in_the_confusion_matrix() -> None:
    """bfloat16 has three digits, so two logits are often equal."""
    torch.manual_seed(0)
    logits, labels = torch.randint(0, 3, (500, 20)).bfloat16(), torch.randint(0, 20, (500,))
    matrix = multiclass_confusion_matrix(logits, labels, 20)
    means = metric_of(logits, labels, [500]).compute()
    assert means["acc1"] == matrix.diagonal().sum() / 500
    assert means["acc5"] >= means["acc1"]


def test_top5_of_fewer_than_five_classes_is_1() -> None:
    metric = LossAndAccuracy()
    metric.update(torch.tensor([[2.0, 1, 0], [0, 1, 2]]), torch.tensor([0, 0]), torch.tensor(1.0))
    assert metric.compute() == {"loss": 1.0, "acc1": 0.5, "acc5": 1.0}


def test_an_epoch_without_images_has_no_means() -> None:
    assert LossAndAccuracy().compute() == {}
    assert LossAndAccuracy().state_dict() == {}, "states are in no checkpoint of weights"


def test_a_million_images_are_counted_exactly() -> None:
    """float32 sums would lose small losses behind large ones."""
    metric = LossAndAccuracy()
    logits, labels = torch.zeros(1, 10), torch.zeros(1, dtype=torch.int64)
    metric.past += torch.tensor([1e9, 0, 0, 1e6 - 1], dtype=torch.float64)
    for _ in range(16):
        metric.update(logits, labels, torch.tensor(1.0))
    assert metric.past[0] + metric.window[0] == 1e9 + 16
    assert metric.compute()["loss"] == (1e9 + 16) / (1e6 + 15)


def test_labels_are_smoothed_in_training_only() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    criterion = CrossEntropy(label_smoothing=0.1)
    log_probabilities = logits.log_softmax(1)
    plain = -log_probabilities[range(4), labels].mean()
    torch.testing.assert_close(criterion(logits, labels), 0.9 * plain - 0.1 * log_probabilities.mean())
    torch.testing.assert_close(criterion.eval()(logits, labels), plain)
    mixed = torch.tensor([[0.3, 0.7, 0.0]]).expand(4, 3)
    torch.testing.assert_close(criterion(logits, mixed), -(mixed * log_probabilities).sum(1).mean())
