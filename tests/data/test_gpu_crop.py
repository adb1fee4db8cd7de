"""Crops on the device against those of the CPU, and against torch's own resizing in floats."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from alexlab.data.decode import Pixels
from alexlab.data.fast.gpu_crop import CHUNK, Cuts, crop
from alexlab.data.sample_rng import Draws, ManyDraws
from alexlab.data.transforms import SampleTransform

CROPS = [
    SampleTransform(48, "random_resized", flip=0.5),
    SampleTransform(48, "random_resized", scale=(0.9, 1.0), ratio=(0.5, 3.0)),
    SampleTransform(48, "random", flip=0.5),
    SampleTransform(48, "random", crop_ratio=0.5, flip=1.0),
    SampleTransform(48, "center"),
]
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
EXTENTS = [(64, 64), (85, 64), (64, 150), (200, 200), (40, 44)]  # the last are enlarged


def pictures(count: int, extent: tuple[int, int]) -> torch.Tensor:
    """Soft shapes below sharp noise: uint8 (N, 3, H, W), channels last."""
    width, height = extent
    rng = np.random.default_rng(width)
    soft = torch.from_numpy(rng.uniform(0, 200, (count, 3, 5, 5)).astype(np.float32))
    images = F.interpolate(soft, (height, width), mode="bicubic") + torch.from_numpy(
        rng.uniform(-60, 60, (count, 3, height, width)).astype(np.float32)
    )
    return images.round().clamp(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("transform", CROPS, ids=lambda t: f"{t.crop}-{t.crop_ratio}")
@pytest.mark.parametrize("extent", EXTENTS, ids=str)
def test_cuts_are_those_of_the_images_one_by_one(transform: SampleTransform, extent: tuple[int, int]) -> None:
    numbers = np.arange(3000, dtype=np.int64)[::-1]
    cuts = transform.cuts(*extent, ManyDraws((3, 7), numbers))
    assert cuts.dtype == np.int32
    for row in range(0, 3000, 7):
        draws = Draws(3, 7, int(numbers[row]))
        cut = transform.cut(*extent, draws)
        flipped = transform.flip > 0 and draws.uniform() < transform.flip
        assert tuple(cuts[row]) == (*cut.box, *cut.size, *cut.at, int(flipped))


@pytest.mark.parametrize("transform", CROPS, ids=lambda t: f"{t.crop}-{t.crop_ratio}")
@pytest.mark.parametrize("extent", EXTENTS, ids=str)
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_devices_crop_is_the_cpus(transform: SampleTransform, extent: tuple[int, int], device: str) -> None:
    count = 40
    images = pictures(count, extent)
    cuts = transform.cuts(*extent, ManyDraws((1, 2), np.arange(count)))
    found = crop(images.to(device), Cuts(torch.from_numpy(cuts).to(device), 48)).cpu()
    assert (found.dtype, found.shape) == (torch.uint8, (count, 3, 48, 48))
    assert found.is_contiguous(memory_format=torch.channels_last)
    one_by_one = [transform(Pixels(images[i].permute(1, 2, 0).numpy()), Draws(1, 2, i)) for i in range(count)]
    apart = (found.int() - torch.stack(one_by_one).int()).abs()
    assert apart.max() <= 2
    assert apart.float().mean() < 0.35


@pytest.mark.parametrize("extent", EXTENTS, ids=str)
def test_before_it_is_rounded_it_is_torchs_resizing_of_floats(extent: tuple[int, int]) -> None:
    images = pictures(30, extent)
    cuts = torch.from_numpy(CROPS[0].cuts(*extent, ManyDraws((5, 0), np.arange(30))))
    found = crop(images, Cuts(cuts, 48))
    for i, (left, top, right, bottom, *_, mirrored) in enumerate(cuts.tolist()):
        part = images[i : i + 1, :, top:bottom, left:right].float()
        expected = F.interpolate(part, (48, 48), mode="bilinear", antialias=True)[0]
        expected = expected.flip(-1) if mirrored else expected
        assert (found[i].float() - expected).abs().max() < 0.51


def test_large_and_empty_batches() -> None:
    images = pictures(CHUNK + 3, (20, 20))
    transform = SampleTransform(16, "random_resized", flip=0.5)
    cuts = torch.from_numpy(transform.cuts(20, 20, ManyDraws((0, 0), np.arange(CHUNK + 3))))
    whole = crop(images, Cuts(cuts, 16))
    assert torch.equal(whole[-5:], crop(images[-5:], Cuts(cuts[-5:], 16)))
    assert whole.is_contiguous(memory_format=torch.channels_last)
    assert crop(images[:0], Cuts(cuts[:0], 16)).shape == (0, 3, 16, 16)
