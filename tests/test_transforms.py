"""Which part of an image is kept, against torchvision."""

import numpy as np
import torch
from torchvision.transforms import v2

from alexlab.data.transforms import SampleTransform

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def test_random_resized_crop_has_torchvisions_distribution() -> None:
    ours, theirs = SampleTransform(64, "random_resized"), v2.RandomResizedCrop(64)
    torch.manual_seed(0)
    boxes = np.array([ours.box(500, 375) for _ in range(1500)])
    drawn = [theirs.make_params([torch.empty(3, 375, 500, device="meta")]) for _ in range(1500)]
    reference = np.array([(d["left"], d["top"], d["left"] + d["width"], d["top"] + d["height"]) for d in drawn])
    for edge in range(4):  # two-sample Kolmogorov-Smirnov; 1.95 * sqrt(2 / n) is the bound for p = 0.001
        a, b = np.sort(boxes[:, edge]), np.sort(reference[:, edge])
        grid = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, grid, "right") - np.searchsorted(b, grid, "right")).max() / 1500
        assert distance < 1.95 * (2 / 1500) ** 0.5


def test_paper_crop_is_a_224_of_256() -> None:
    left, top, right, bottom = SampleTransform(224, "random").box(400, 256)
    assert (right - left, bottom - top) == (224, 224)
    lefts = [SampleTransform(224, "random").box(400, 256)[0] for _ in range(200)]
    assert 72 <= min(lefts) < 76 < 100 < max(lefts) <= 104  # within the middle square, as the paper has it
    assert 0 <= top <= 32
    assert SampleTransform(224).box(256, 256) == (16, 16, 240, 240)
