"""Crops on the device, compared with those of the CPU, and with torch's own resizing in floats."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from alexlab.data.decode import Pixels
from alexlab.data.fast.gpu_crop import CHUNK, crop
from alexlab.data.sample_rng import BatchRng, SampleRng
from alexlab.data.transforms import SampleTransform

CROPS = [
    SampleTransform(48, "random_resized", flip=0.5),
    SampleTransform(48, "random_resized", scale=(0.9, 1.0), ratio=(0.5, 3.0)),
    SampleTransform(48, "random", flip=0.5),
    SampleTransform(48, "random", crop_ratio=0.5, flip=1.0),
    SampleTransform(48, "center"),
    SampleTransform((24, 56), "random_resized", flip=0.5),
    SampleTransform((56, 24), "random", flip=0.5),
    SampleTransform((24, 56), "center"),
]
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
EXTENTS = [(64, 64), (85, 64), (64, 150), (200, 200), (40, 44)]  # the last are enlarged


def pictures(count: int, extent: tuple[int, int], channels: int = 3) -> torch.Tensor:
    """Return soft shapes with sharp noise: uint8 (N, C, H, W), channels-last."""
    width, height = extent
    rng = np.random.default_rng(width)
    soft = torch.from_numpy(rng.uniform(0, 200, (count, channels, 5, 5)).astype(np.float32))
    images = F.interpolate(soft, (height, width), mode="bicubic") + torch.from_numpy(
        rng.uniform(-60, 60, (count, channels, height, width)).astype(np.float32)
    )
    return images.round().clamp(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("transform", CROPS, ids=lambda t: f"{t.crop}-{t.crop_ratio}-{t.image_size}")
@pytest.mark.parametrize("extent", EXTENTS, ids=str)
def test_the_boxes_of_a_batch_are_those_of_its_images_one_by_one(
    transform: SampleTransform, extent: tuple[int, int]
) -> None:
    indices = np.arange(3000, dtype=np.int64)[::-1]
    boxes = transform.crop_boxes(*extent, BatchRng((3, 7), indices))
    assert boxes.dtype == np.int32
    for row in range(0, 3000, 7):
        rng = SampleRng(3, 7, int(indices[row]))
        one = transform.crop_box(*extent, rng)
        flipped = transform.flip > 0 and rng.uniform() < transform.flip
        assert tuple(boxes[row]) == (*one.box, *one.size, *one.at, int(flipped))


@pytest.mark.parametrize("transform", CROPS, ids=lambda t: f"{t.crop}-{t.crop_ratio}")
@pytest.mark.parametrize("extent", EXTENTS, ids=str)
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("channels", [3, 1])
def test_the_crop_of_the_device_is_that_of_the_cpu(
    transform: SampleTransform, extent: tuple[int, int], channels: int, device: str
) -> None:
    count, transform = 40, replace(transform, channels=channels)
    images = pictures(count, extent, channels)
    boxes = torch.from_numpy(transform.crop_boxes(*extent, BatchRng((1, 2), np.arange(count))))
    result = crop(images.to(device), boxes.to(device), transform.size).cpu()
    assert (result.dtype, result.shape) == (torch.uint8, (count, channels, *transform.size))
    assert result.is_contiguous(memory_format=torch.channels_last)
    one_by_one = [transform(Pixels(images[i].permute(1, 2, 0).numpy()), SampleRng(1, 2, i)) for i in range(count)]
    apart = (result.int() - torch.stack(one_by_one).int()).abs()
    assert apart.max() <= 2
    assert apart.float().mean() < 0.36


@pytest.mark.parametrize("extent", EXTENTS, ids=str)
def test_before_rounding_the_crop_equals_torchs_resizing_of_floats(extent: tuple[int, int]) -> None:
    images = pictures(30, extent)
    boxes = torch.from_numpy(CROPS[0].crop_boxes(*extent, BatchRng((5, 0), np.arange(30))))
    result = crop(images, boxes, (48, 48))
    for i, (left, top, right, bottom, *_, mirrored) in enumerate(boxes.tolist()):
        part = images[i : i + 1, :, top:bottom, left:right].float()
        expected = F.interpolate(part, (48, 48), mode="bilinear", antialias=True)[0]
        expected = expected.flip(-1) if mirrored else expected
        assert (result[i].float() - expected).abs().max() < 0.51


def test_large_and_empty_batches() -> None:
    images = pictures(CHUNK + 3, (20, 20))
    transform = SampleTransform(16, "random_resized", flip=0.5)
    boxes = torch.from_numpy(transform.crop_boxes(20, 20, BatchRng((0, 0), np.arange(CHUNK + 3))))
    whole = crop(images, boxes, (16, 16))
    assert torch.equal(whole[-5:], crop(images[-5:], boxes[-5:], (16, 16)))
    assert whole.is_contiguous(memory_format=torch.channels_last)
    assert crop(images[:0], boxes[:0], (16, 16)).shape == (0, 3, 16, 16)
