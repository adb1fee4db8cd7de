"""Images that lie wholly on the device, from which its batches are taken without the CPU."""

import logging
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from alexlab.data.dataset import Batch, ImageDataset, Key
from alexlab.data.loader import Loader

PART = 512  # images that are moved at once

log = logging.getLogger("alexlab")


class InTurns(Sampler[list[Key]]):
    """All images in the index's order."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return -(-self.count // PART)

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, self.count, PART):
            yield [(i, 0) for i in range(start, min(start + PART, self.count))]


class OnDevice:
    """The whole images of a dataset, and their targets, in the device's memory.

    Raises:
        BrokenImageError: one cannot be read.
    """

    def __init__(
        self, dataset: ImageDataset, device: torch.device, num_workers: int, name: str, timeout: float | None = None
    ) -> None:
        """
        Args:
            dataset: of images of one size that are left whole.
            name: of the split, for what is told.
        """
        assert dataset.whole is not None
        width, height = dataset.whole
        began, count = time.monotonic(), len(dataset)
        reader = ImageDataset(dataset.index, dataset.transform, dataset.seed, "raise", dataset.whole)
        self.images = torch.empty((count, height, width, 3), dtype=torch.uint8, device=device)
        self.targets = torch.from_numpy(dataset.index.targets).to(device)
        done = 0
        for images, *_ in Loader(reader, InTurns(count), num_workers, device.type == "cuda", timeout):
            self.images[done : done + len(images)] = images.permute(0, 2, 3, 1)
            done += len(images)
        log.info(
            "data.cache=device: the %s images, %.2f GB, are on the device (%.0f s)",
            name, self.images.nbytes / 1e9, time.monotonic() - began,
        )  # fmt: skip

    def take(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, H, W) in channels-last memory, int64 (B,), both on the device."""
        places = torch.from_numpy(numbers).to(self.images.device, non_blocking=True)
        return self.images.index_select(0, places).permute(0, 3, 1, 2), self.targets.index_select(0, places)


class DeviceLoader:
    """What a `Loader` is, for images on the device."""

    def __init__(self, dataset: ImageDataset, batch_sampler: "Sampler[list[Key]]", held: OnDevice) -> None:
        self.dataset, self.batch_sampler, self.held = dataset, batch_sampler, held

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        for keys in self.batch_sampler:
            numbers = np.fromiter((i for i, _ in keys), np.int64, len(keys))
            images, targets = self.held.take(numbers)
            yield Batch(images, targets, {}, self.dataset.cuts(numbers, keys[0][1]) if keys else None)
