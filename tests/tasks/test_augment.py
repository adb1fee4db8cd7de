"""Augmentation of batches, against torchvision and the documented formulas."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from alexlab.tasks.augment import PCA_EIGENVALUES, PCA_EIGENVECTORS, BatchAugment

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def test_normalize_equals_torchvision() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = v2.Normalize(MEAN, STD)(v2.ToDtype(torch.float32, scale=True)(images))
    torch.testing.assert_close(BatchAugment(MEAN, STD, 5).normalize(images), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("settings", [{"pca": 0.1}, {"erase": 0.7}])
def test_an_image_is_augmented_alike_on_any_number_of_ranks(settings: dict[str, float]) -> None:
    augment = BatchAugment(MEAN, STD, 5, **settings)  # type: ignore[arg-type]
    images, targets = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), torch.zeros(8, dtype=torch.int64)
    whole, _ = augment(images, targets, seed=7)
    for ends in ([0, 4, 8], [0, 2, 5, 8]):
        parts = [
            augment(images[first:end], targets[first:end], 7, rank, first, 8)[0]
            for rank, (first, end) in enumerate(pairwise(ends))
        ]
        assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, augment(images, targets, seed=8)[0])


@pytest.mark.parametrize(
    ("pca_by", "lengths"), [("eigenvalues", PCA_EIGENVALUES), ("deviations", np.sqrt(PCA_EIGENVALUES))]
)
def test_pca_noise_has_the_documented_covariance(pca_by: str, lengths: tuple[float, ...]) -> None:
    count = 20_000
    gray = torch.full((count, 3, 1, 1), 128, dtype=torch.uint8)
    augment = BatchAugment([0.0] * 3, [1.0] * 3, 5, pca=0.1, pca_by=pca_by)
    noise = (augment(gray, torch.zeros(count, dtype=torch.int64), seed=0)[0] - 128 / 255).view(count, 3).numpy()
    axes = np.array(PCA_EIGENVECTORS) * np.array(lengths) * 0.1
    np.testing.assert_allclose(np.cov(noise.T), axes @ axes.T, rtol=0.06)


def test_erasing_covers_the_documented_area() -> None:
    images = torch.full((2000, 3, 32, 32), 255, dtype=torch.uint8)
    erased, _ = BatchAugment([0.0] * 3, [1.0] * 3, 5, erase=0.5)(images, torch.zeros(2000, dtype=torch.int64), seed=0)
    fraction = (erased[:, 0] == 0).float().mean((1, 2))
    assert 0.46 < (fraction > 0).float().mean() < 0.54
    assert 0.13 < fraction[fraction > 0].mean() < 0.22  # the middle of 0.02 and 0.33
    assert fraction.max() < 0.4


def test_mixing_gives_class_probabilities() -> None:
    augment = BatchAugment(MEAN, STD, 5, mixup=0.2, cutmix=1.0)
    images, labels = torch.zeros(6, 3, 8, 8, dtype=torch.uint8), torch.arange(6) % 5
    _, targets = augment(images, labels, seed=1)
    assert targets.shape == (6, 5)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    for whole in ({"mixup": 1}, {"cutmix": 1}):  # an int, as `augment.mixup=1` gives
        _, targets = BatchAugment(MEAN, STD, 5, **whole)(images, labels, seed=1)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
