"""From images of an index to rows of a batch: uint8, each cropped by (seed, epoch, index)."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from alexlab.data import decode
from alexlab.data.fast import gpu_crop
from alexlab.data.fast.prepared import PreparedIndex
from alexlab.data.index import Index
from alexlab.data.sample_rng import BatchRng, SampleRng
from alexlab.data.sampler import Key
from alexlab.data.transforms import SampleTransform

BrokenRows = list[tuple[int, str]]  # (row of a batch, what is wrong with the image)


class Batch(NamedTuple):
    """A batch of images."""

    images: Tensor  #: uint8 (B, C, H, W) in channels-last memory
    targets: Tensor  #: int64 (B,), or float32 (B, num_classes) of 0 and 1 if an image has any number of classes
    skipped: dict[str, str]  #: path -> what is wrong, of each broken image; these images are not in the batch
    #: the boxes and (height, width) for `gpu_crop.crop`; None for images that are cropped already
    crops: tuple[Tensor, tuple[int, int]] | None = None

    def to(self, device: torch.device) -> "Batch":
        """Move the batch to `device`, which crops the images if they are not cropped yet."""
        images, targets = (part.to(device, non_blocking=True) for part in (self.images, self.targets))
        if self.crops is not None:
            boxes, size = self.crops
            images = gpu_crop.crop(images, boxes.to(device, non_blocking=True), size)
        return Batch(images, targets, self.skipped)


@dataclass(eq=False)
class ImageDataset:
    """The images of an index, written into the memory of a batch."""

    index: Index
    transform: SampleTransform
    seed: int
    on_error: str = "raise"  # or "skip": what to do about a broken image
    # (width, height) of all images if the device crops them: then whole images of a `PreparedIndex` are copied. If it
    # is None, each image is cropped by the thread that decodes it.
    raw_size: tuple[int, int] | None = None
    reading: dict[int, int] = field(default_factory=dict, init=False)  # by thread, the index of the image it is reading

    def __len__(self) -> int:
        return len(self.index.targets)

    def allocate(self, keys: Sequence[Key], pinned: bool = False) -> Tensor:
        """Return memory for the images of a batch: uint8 (B, C, H, W), channels-last, uninitialized."""
        height, width = self.transform.at(keys[0][1]).size if keys else (1, 1)
        width, height = self.raw_size or (width, height)
        shape = (len(keys), height, width, self.transform.channels)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=pinned).permute(0, 3, 1, 2)

    def fill(self, keys: Sequence[Key], images: Tensor, stop: threading.Event | None = None) -> BrokenRows:
        """Write the image of keys[i] to images[i], and return the rows of broken images.

        Args:
            images: as `allocate` returns; the rows of broken images are undefined afterwards.
            stop: once it is set, the remaining rows are not written.

        Raises:
            BrokenImageError: a broken image, if `on_error` is "raise".
        """
        if not keys:  # a rank without images in the last batch
            return []
        if self.raw_size is not None:
            try:
                self._copy(self.indices(keys), images)
                return []
            except OSError:
                pass  # copied one by one below, to see which image is broken
        broken: BrokenRows = []
        thread = threading.get_ident()
        try:
            self.reading[thread] = keys[0][0] % len(self)
            self.index.ahead(self.indices(keys))
            for row, ((draw, epoch), image) in enumerate(zip(keys, images.split(1), strict=True)):
                if stop is not None and stop.is_set():
                    break
                i = draw % len(self)
                self.reading[thread] = i
                try:
                    if self.raw_size is None:
                        self.transform.at(epoch).write(self.index.picture(i), SampleRng(self.seed, epoch, draw), image)
                    else:
                        self._copy(np.array([i]), image)
                except OSError as error:
                    broken_image = decode.BrokenImageError(self.index.path(i), error)
                    if self.on_error == "raise":
                        raise broken_image from None
                    broken.append((row, broken_image.reason))
                except Exception as error:
                    error.add_note(f"while {self.index.path(i)} was read")
                    raise
        finally:
            self.reading.pop(thread, None)
        return broken

    def _copy(self, indices: np.ndarray, images: Tensor) -> None:
        cast(PreparedIndex, self.index).copy(indices, images.permute(0, 2, 3, 1))

    def to_batch(self, keys: Sequence[Key], images: Tensor, broken: BrokenRows) -> Batch:
        """Make a batch of `images`, as `fill` wrote them, without the rows that are `broken`."""
        targets = as_tensor(self.index.targets[self.indices(keys)])
        crops = self.crops(keys) if self.raw_size is not None and keys else None
        if not broken:
            return Batch(images, targets, {}, crops)
        rows = sorted(set(range(len(keys))) - {row for row, _ in broken})
        if crops is not None:
            crops = crops[0][rows], crops[1]
        skipped = {self.index.path(keys[row][0] % len(self)): reason for row, reason in broken}
        return Batch(images[rows], targets[rows], skipped, crops)

    def crops(self, keys: Sequence[Key]) -> tuple[Tensor, tuple[int, int]]:
        """Choose what the device crops from the images of a batch, as `Batch.crops`."""
        assert self.raw_size is not None
        epoch = keys[0][1]
        transform = self.transform.at(epoch)
        draws = np.fromiter((draw for draw, _ in keys), np.int64, len(keys))
        boxes = transform.crop_boxes(*self.raw_size, BatchRng((self.seed, epoch), draws))
        return torch.from_numpy(boxes), transform.size

    def indices(self, keys: Sequence[Key]) -> np.ndarray:
        """Return the index of the image of each key, int64 (B,)."""
        return np.fromiter((draw for draw, _ in keys), np.int64, len(keys)) % len(self)


def as_tensor(targets: np.ndarray) -> Tensor:
    """Return the targets of an index as those of a batch."""
    return torch.from_numpy(targets).float() if targets.ndim == 2 else torch.from_numpy(targets)
