"""Losses against torch's, timm's and torchvision's own, and formulas of the papers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from alexlab.tasks.losses import Asymmetric, BinaryCrossEntropy, CrossEntropy, Focal


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1)) * 3


LABELS = torch.tensor([0, 1, 2, 3, 3, 0])
WEIGHTS = [0.5, 1.0, 2.0, 4.0]


def soft() -> Tensor:
    return torch.rand(6, 4, generator=torch.Generator().manual_seed(2)).softmax(1)


def test_cross_entropy_smooths_and_weighs_in_training_only(logits: Tensor) -> None:
    loss = CrossEntropy(0.1, WEIGHTS)
    expected = F.cross_entropy(logits, LABELS, torch.tensor(WEIGHTS), label_smoothing=0.1, reduction="none").mean()
    torch.testing.assert_close(loss(logits, LABELS), expected)
    torch.testing.assert_close(loss.eval()(logits, LABELS), F.cross_entropy(logits, LABELS))


def test_weighted_losses_do_not_depend_on_how_batches_are_divided(logits: Tensor) -> None:
    loss = CrossEntropy(0.0, WEIGHTS)
    parts = (2 * loss(logits[:2], LABELS[:2]) + 4 * loss(logits[2:], LABELS[2:])) / 6
    torch.testing.assert_close(loss(logits, LABELS), parts)


def test_cross_entropy_takes_soft_targets(logits: Tensor) -> None:
    expected = -(soft() * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(CrossEntropy()(logits, soft()), expected)


def test_focal_loss_is_the_papers_formula(logits: Tensor) -> None:
    p = logits.softmax(1)[range(6), LABELS]
    torch.testing.assert_close(Focal(2.0)(logits, LABELS), (-((1 - p) ** 2) * p.log()).mean())
    torch.testing.assert_close(Focal(0.0)(logits, LABELS), F.cross_entropy(logits, LABELS))
    torch.testing.assert_close(Focal(2.0)(logits, F.one_hot(LABELS, 4).float()), Focal(2.0)(logits, LABELS))
    weighted = (-((1 - p) ** 2) * p.log() * torch.tensor(WEIGHTS)[LABELS]).mean()
    torch.testing.assert_close(Focal(2.0, WEIGHTS)(logits, LABELS), weighted)


def test_binary_cross_entropy_of_labels_and_of_many_classes(logits: Tensor) -> None:
    hot = F.one_hot(LABELS, 4).float()
    expected = sigmoid_focal_loss(logits, hot, alpha=-1, gamma=0, reduction="mean")  # torchvision's, without its focus
    torch.testing.assert_close(BinaryCrossEntropy()(logits, LABELS), expected)
    torch.testing.assert_close(BinaryCrossEntropy()(logits, hot), expected)
    weighted = F.binary_cross_entropy_with_logits(logits, hot, pos_weight=torch.tensor(WEIGHTS))
    torch.testing.assert_close(BinaryCrossEntropy(WEIGHTS)(logits, hot), weighted)


def test_asymmetric_loss_is_timms(logits: Tensor) -> None:
    timm = pytest.importorskip("timm.loss")
    hot = F.one_hot(LABELS, 4).float()
    theirs = timm.AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=1, clip=0.05)(logits, hot)
    torch.testing.assert_close(Asymmetric()(logits, hot), theirs)


def test_asymmetric_loss_without_its_asymmetry(logits: Tensor) -> None:
    loss = Asymmetric(0.0, 0.0, 0.0)(logits, LABELS)
    hot = F.one_hot(LABELS, 4).float()
    expected = F.binary_cross_entropy_with_logits(logits, hot, reduction="none").sum(1).mean()
    torch.testing.assert_close(loss, expected)


def test_weights_are_in_no_checkpoint() -> None:
    assert CrossEntropy(0.0, WEIGHTS).state_dict() == {}


def test_a_perfect_prediction_costs_nothing() -> None:
    sure = F.one_hot(LABELS, 4).float() * 200 - 100
    for loss in (CrossEntropy(), Focal(), BinaryCrossEntropy(), Asymmetric()):
        assert math.isclose(float(loss(sure, LABELS)), 0.0, abs_tol=1e-6), loss
