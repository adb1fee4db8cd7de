"""Crop images on the device (`data.crop_on`), and cache train and val in device memory (`data.cache=device`)."""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Sampler

from alexlab.data.dataset import Batch, ImageDataset, as_tensor
from alexlab.data.index import Index
from alexlab.data.loader import Loader
from alexlab.data.sampler import EvalBatchSampler, Key
from alexlab.data.transforms import SampleTransform
from alexlab.engine.errors import UserError

CACHED = ("train", "val")  # the test split is read once
MAX_FRACTION = 0.7  # largest fraction of the device's memory that the images may take
CHUNK = 512  # images that are moved to the device at once

log = logging.getLogger("alexlab")


def why_not_on_device(index: Index, transform: SampleTransform) -> str | None:
    """Return why the device cannot crop the images, and how to change that; None if it can."""
    if index.raw_size is None:
        return (
            "the device crops only images of one size that are stored as pixels: prepare them with "
            "alexlab prepare data.root=PATH out=PATH format=raw square=true"
        )
    if transform.policy != "none":
        return f"augment.policy={transform.policy} works on cropped images, on the CPU: set augment.policy=none"
    if transform.user is not None:
        return "augment.transforms work on single images, on the CPU: set augment.transforms=[]"
    return None


def check_device_input(
    crop_on: str,
    cache: str | None,
    device: str,
    splits: Mapping[str, Index],
    transforms: Mapping[str, SampleTransform],
) -> None:
    """Check that the device ("cuda", "mps" or "cpu") can crop and cache the images if the config demands it.

    Raises:
        UserError: the device cannot crop the images, or the cache does not fit into the device's memory.
    """
    if cache is None and crop_on != "device":
        return
    if crop_on == "cpu" or (crop_on == "auto" and device != "cuda"):
        raise UserError(
            f"data.cache=device caches images that the device crops, but data.crop_on={crop_on} crops them on the CPU "
            "here: add data.crop_on=device, or set data.cache=null."
        )
    key = "data.crop_on=device" if cache is None else "data.cache=device"
    for split in CACHED:
        reason = why_not_on_device(splits[split], transforms[split])
        if reason is not None:
            images = f"the {split} images of {splits[split].root}"
            raise UserError(f"{key} cannot be used for {images}: {reason}, or remove {key}.")
    if cache == "device" and device == "cuda":
        sizes = [(len(splits[split]), *(splits[split].raw_size or (0, 0))) for split in CACHED]
        needed = sum(3 * count * width * height for count, width, height in sizes)
        check_fits(needed, torch.cuda.get_device_properties(0).total_memory)


def check_fits(needed: int, memory: int) -> None:
    """Raise a UserError if `needed` bytes are too many for a device of `memory` bytes."""
    if needed > MAX_FRACTION * memory:
        raise UserError(
            f"data.cache=device: the images take {needed / 1e9:.1f} GB, and may take at most {MAX_FRACTION:.0%} of the "
            f"device's {memory / 1e9:.1f} GB: set data.cache=null, or prepare them with a smaller short_side."
        )


def cache_on_device(
    dataset: ImageDataset, device: torch.device, num_workers: int, split: str, timeout: float | None
) -> tuple[Tensor, Tensor]:
    """Return all images, uncropped uint8 (N, H, W, C), and their targets, int64 (N,), in the memory of a device.

    A broken image is an error.
    """
    assert dataset.raw_size is not None
    width, height = dataset.raw_size
    start, count = time.monotonic(), len(dataset)
    reader = ImageDataset(dataset.index, dataset.transform, dataset.seed, "raise", dataset.raw_size)
    images = torch.empty((count, height, width, dataset.transform.channels), dtype=torch.uint8, device=device)
    done = 0
    for batch in Loader(reader, EvalBatchSampler(count, CHUNK), num_workers, device.type == "cuda", timeout):
        images[done : done + len(batch.images)] = batch.images.permute(0, 2, 3, 1)
        done += len(batch.images)
    size, seconds = images.nbytes / 1e9, time.monotonic() - start
    log.info("data.cache=device: the %s images (%.2f GB) are on the device after %.0f s", split, size, seconds)
    return images, as_tensor(dataset.index.targets).to(device)


@dataclass(eq=False)
class DeviceLoader:
    """Like `Loader`, but for the images and targets that `cache_on_device` returned."""

    dataset: ImageDataset
    batch_sampler: "Sampler[list[Key]]"
    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        for keys in self.batch_sampler:
            rows = torch.from_numpy(self.dataset.indices(keys)).to(self.images.device, non_blocking=True)
            images, targets = self.images.index_select(0, rows), self.targets.index_select(0, rows)
            crops = self.dataset.crops(keys) if keys else None
            yield Batch(images.permute(0, 3, 1, 2), targets, {}, crops)
