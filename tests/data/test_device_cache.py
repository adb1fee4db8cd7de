"""Images that the device crops or caches: the same batches as without."""

import os
import re
from pathlib import Path

import pytest
import torch
from conftest import composed, photo
from test_loader import same

from alexlab.commands.prepare import prepare
from alexlab.data.datamodule import ImageFolders
from alexlab.data.dataset import Batch
from alexlab.data.decode import BrokenImageError
from alexlab.data.fast.device_cache import check_fits
from alexlab.data.transforms import SampleTransform
from alexlab.data.user_transforms import UserTransforms
from alexlab.engine.errors import UserError
from alexlab.engine.schema import PrepareConfig

SIDE = 32
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw squares of 40 pixels in shards of a few images each."""
    root = tmp_path_factory.mktemp("squares")
    for split, count in (("train", 30), ("val", 11)):
        for i in range(count):
            photo(root / "photos" / split / f"{i % 3}" / f"{i}.jpg", (60 + i, 50), seed=i)
    words = [f"data.root={root / 'photos'}", f"out={root / 'out'}", "format=raw", "square=true", "short_side=40"]
    prepare(PrepareConfig.model_validate(composed(*words, "shard_mb=0.03", command="prepare")))
    assert len(list((root / "out").glob("train-*.shard"))) > 3
    return root / "out"


def data_of(
    root: Path,
    workers: int = 0,
    policy: str = "none",
    crop: str = "random_resized",
    size: int | tuple[int, int] = SIDE,
    user: UserTransforms | None = None,
    **more: object,
) -> ImageFolders:
    settings = {"batch_size": 5, "seed": 3, "num_workers": workers, "on_error": "skip"} | more
    train = SampleTransform(size, crop, flip=0.5, policy=policy, user=user)
    return ImageFolders(str(root), train_transform=train, eval_transform=SampleTransform(size), **settings).read()  # type: ignore[arg-type]


def batches(data: ImageFolders, epochs: int = 3) -> list[Batch]:
    """Return the batches of some epochs, and of a validation after each."""
    loader, val = data.train_dataloader(), data.val_dataloader()
    found = []
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        found += [batch.to(CPU) for each in (loader, val) for batch in each]
    return found


@pytest.mark.parametrize("cache", ["device", None])
@pytest.mark.parametrize("crop", ["random_resized", "random", "center"])
def test_batches_do_not_depend_on_the_cache_or_the_number_of_threads(
    squares: Path, cache: str | None, crop: str
) -> None:
    plain = batches(data_of(squares, crop_on="device", crop=crop))
    for workers in (0, 1, 5):
        assert same(plain, batches(data_of(squares, workers, crop_on="device", cache=cache, crop=crop)))


@pytest.mark.parametrize("size", [SIDE, (24, 36), (8, 70)])
def test_the_crops_of_device_and_cpu_differ_by_a_rounding(squares: Path, size: int | tuple[int, int]) -> None:
    on_cpu, on_device = batches(data_of(squares, size=size)), batches(data_of(squares, size=size, crop_on="device"))
    assert on_cpu[0].images.shape == (5, 3, *((size, size) if isinstance(size, int) else size))
    for a, b in zip(on_cpu, on_device, strict=True):
        assert torch.equal(a.targets, b.targets)
        assert (a.images.int() - b.images.int()).abs().max() <= 2
    whole = next(iter(data_of(squares, crop_on="device").train_dataloader()))
    assert whole.images.shape == (5, 3, 40, 40), "not cropped before"
    assert whole.crops is not None
    assert whole.crops[0].shape == (5, 9)


@pytest.mark.parametrize("crop_on", ["cpu", "device"])
def test_a_shard_that_is_cut_while_it_is_used_is_reported(squares: Path, tmp_path: Path, crop_on: str) -> None:
    """Reading past the end of its map would kill the process."""
    for file in squares.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = data_of(tmp_path, crop_on=crop_on, on_error="raise")
    batches(data, 1)
    shard = tmp_path / "train-00001.shard"
    os.truncate(shard, 100)
    with pytest.raises(BrokenImageError, match=f"{shard}:.* cannot be read as an image .its shard is shorter"):
        batches(data, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "device"}, "data.cache=device caches images that the device crops, but data.crop_on=auto crops"),
        ({"cache": "device", "crop_on": "cpu"}, "data.crop_on=cpu crops them on the CPU here: add data.crop_on=device"),
        ({"crop_on": "device", "policy": "trivial"}, "augment.policy=trivial works on cropped images, on the CPU: set"),
        (
            {"crop_on": "device", "user": UserTransforms([])},
            "augment.transforms work on single images, on the CPU:",
        ),
    ],
)
def test_what_the_device_cannot_do_is_refused(squares: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        data_of(squares, **settings)  # type: ignore[arg-type]


def test_files_cannot_be_cropped_on_the_device(shapes: Path) -> None:
    message = (
        f"data.crop_on=device cannot be used for the train images of {shapes}/train: the device crops only images of "
        "one size that are stored as pixels: prepare them with alexlab prepare data.root=PATH out=PATH format=raw "
        "square=true"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        data_of(shapes, crop_on="device")


def test_images_that_do_not_fit_the_device_are_refused() -> None:
    check_fits(5 * 10**9, 8 * 10**9)
    message = r"data.cache=device: the images take 6.0 GB, and may take at most 70% of the device's 8.0 GB: set"
    with pytest.raises(UserError, match=message):
        check_fits(6 * 10**9, 8 * 10**9)
