"""A sample is a function of (seed, epoch, index); broken images are reported or skipped."""

from pathlib import Path

import pytest
import torch
from conftest import photo
from torch import Tensor

from alexlab.data import decode
from alexlab.data.dataset import ImageDataset
from alexlab.data.folder import scan
from alexlab.data.transforms import SampleTransform


def pixels(data: ImageDataset, i: int, epoch: int) -> Tensor:
    images = data.allocate([(i, epoch)])
    assert data.fill([(i, epoch)], images) == []
    return images[0]


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_broken_images_are_reported_or_skipped_with_their_path(tmp_path: Path, damage: str) -> None:
    path = photo(tmp_path / "c" / "bad.jpg", (300, 300))
    raw = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": raw[: len(raw) // 3], "text": b"not an image"}[damage])
    photo(tmp_path / "d" / "good.jpg")
    index = scan(tmp_path)
    keys = [(1, 0), (0, 0), (1, 1)]
    raising = ImageDataset(index, SampleTransform(32), 0)
    with pytest.raises(decode.BrokenImageError, match=r"bad.jpg cannot be read as an image .*data.on_error=skip"):
        raising.fill(keys, raising.allocate(keys))
    assert raising.reading == {}
    skipping = ImageDataset(index, SampleTransform(32), 0, "skip")
    images = skipping.allocate(keys)
    batch = skipping.to_batch(keys, images, skipping.fill(keys, images))
    assert batch.targets.tolist() == [1, 1]
    assert torch.equal(batch.images, torch.stack([pixels(skipping, 1, 0)] * 2))
    assert list(batch.skipped) == [str(path)]
    assert batch.skipped[str(path)].startswith(f"{path} cannot be read as an image (")
    nothing = skipping.to_batch(keys[1:2], images[1:2], [(0, "why")])
    assert (nothing.images.shape, len(nothing.targets)) == ((0, 3, 32, 32), 0)


def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    for i in range(2):
        photo(tmp_path / "c" / f"{i}.jpg", (200, 150), seed=i)
    data = ImageDataset(scan(tmp_path), SampleTransform(32, "random_resized", flip=0.5, policy="trivial"), seed=1)
    first = pixels(data, 0, 3)
    pixels(data, 1, 3)
    torch.rand(5)
    assert torch.equal(first, pixels(data, 0, 3))
    assert not torch.equal(first, pixels(data, 0, 4))
    assert not torch.equal(first, pixels(ImageDataset(data.index, data.transform, seed=2), 0, 3))


def test_half_of_the_images_are_mirrored(tmp_path: Path) -> None:
    photo(tmp_path / "c" / "0.jpg", (64, 64))
    index = scan(tmp_path)
    plain = pixels(ImageDataset(index, SampleTransform(64, crop_ratio=1.0), 0), 0, 0)
    data = ImageDataset(index, SampleTransform(64, crop_ratio=1.0, flip=0.5), seed=0)
    images = [pixels(data, 0, epoch) for epoch in range(400)]
    mirrored = sum(torch.equal(image, plain.flip(-1)) for image in images)
    assert mirrored + sum(torch.equal(image, plain) for image in images) == 400
    assert abs(mirrored - 200) < 4 * 10, "four standard deviations of 400 throws"


def test_images_grow_with_the_epochs(shapes: Path) -> None:
    """The side follows from the epoch of the key alone, so that threads and resumed runs see the same."""
    transform = SampleTransform(48, "random_resized", sizes=((1, 16), (3, 32), (4, 48)))
    data = ImageDataset(scan(shapes / "train"), transform, seed=1)
    assert [data.allocate([(0, epoch)]).shape[-1] for epoch in (5, 0, 1, 2, 3)] == [48, 16, 16, 32, 48]
    fixed = ImageDataset(scan(shapes / "train"), SampleTransform(16, "random_resized"), seed=1)
    assert torch.equal(pixels(data, 7, 1), pixels(fixed, 7, 1))
    assert SampleTransform(48).at(9) == SampleTransform(48)


def test_a_rank_without_images_in_the_last_batch_gets_an_empty_batch(tmp_path: Path) -> None:
    photo(tmp_path / "c" / "0.jpg")
    data = ImageDataset(scan(tmp_path), SampleTransform(32), seed=0)
    images = data.allocate([])
    assert data.fill([], images) == []
    batch = data.to_batch([], images, [])
    assert (len(batch.images), len(batch.targets)) == (0, 0)
