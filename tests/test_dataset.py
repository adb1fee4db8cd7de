"""A sample is a function of (seed, epoch, index); broken images are named or left out."""

from pathlib import Path

import pytest
import torch
from conftest import photo

from alexlab.data import decode
from alexlab.data.dataset import ImageDataset, collate, mix
from alexlab.data.index import scan
from alexlab.data.transforms import SampleTransform

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_broken_images_are_named(tmp_path: Path, damage: str) -> None:
    path = photo(tmp_path / "c" / "bad.jpg", (300, 300))
    raw = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": raw[: len(raw) // 3], "text": b"not an image"}[damage])
    photo(tmp_path / "c" / "good.jpg")
    index = scan(tmp_path)
    with pytest.raises(decode.BrokenImageError, match=r"bad.jpg cannot be read as an image .*data.on_error=skip"):
        ImageDataset(index, SampleTransform(32), 0)[0, 0]
    skipping = ImageDataset(index, SampleTransform(32), 0, "skip")
    images, targets, skipped = collate([skipping[0, 0], skipping[1, 0]])
    assert (len(images), len(targets), skipped) == (1, 1, [str(path)])
    assert len(collate([skipping[0, 0]])[1]) == 0


def test_augmentation_is_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    for i in range(2):
        photo(tmp_path / "c" / f"{i}.jpg", (200, 150), seed=i)
    data = ImageDataset(scan(tmp_path), SampleTransform(32, "random_resized", flip=0.5, policy="trivial"), seed=1)

    def pixels(i: int, epoch: int) -> torch.Tensor:
        sample = data[i, epoch]
        assert not isinstance(sample, str)
        return sample[0]

    first = pixels(0, 3)
    pixels(1, 3)
    torch.rand(5)
    assert torch.equal(first, pixels(0, 3))
    assert not torch.equal(first, pixels(0, 4))


def test_mix_spreads() -> None:
    seeds = {mix(s, e, i) for s in range(5) for e in range(20) for i in range(100)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_images_grow_with_the_epochs(shapes: Path) -> None:
    """The side follows from the epoch of the key alone, so that workers and resumed runs see the same."""
    transform = SampleTransform(48, "random_resized", sizes=((1, 16), (3, 32), (4, 48)))
    data = ImageDataset(scan(shapes / "train"), transform, seed=1)
    assert [data[0, epoch][0].shape[1] for epoch in (5, 0, 1, 2, 3)] == [48, 16, 16, 32, 48]
    fixed = ImageDataset(scan(shapes / "train"), SampleTransform(16, "random_resized"), seed=1)
    assert torch.equal(data[7, 1][0], fixed[7, 1][0])
    assert SampleTransform(48).at(9) == SampleTransform(48)
