"""Transforms of single images on the CPU: random crops and flips, and augmentation policies.

`decode.crop_resize` crops and resizes in one pass, `policies.py` has TrivialAugment and RandAugment, and
`user_transforms.py` calls transforms of your own. The transforms of whole batches on the device (normalization, colour
noise, erasing, mixup) are in `tasks/augment.py`.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alexlab.data import decode, policies
from alexlab.data.sample_rng import BatchRng, SampleRng, mix
from alexlab.data.user_transforms import UserTransforms

LONG = 8  # the crops "random" and "center" use only the middle of an image that is longer than this many crops
TRIES = 10  # attempts of torchvision's random resized crop, before it takes the middle


class CropBox(NamedTuple):
    """What is cropped from an image, in three steps."""

    box: decode.Box  #: (left, top, right, bottom) of the part of the image that is resized, in pixels
    size: tuple[int, int]  #: (height, width) that this part is resized to
    at: tuple[int, int] = (0, 0)  #: (top, left) of the rectangle in the resized part that is the result


def height_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) for a side in pixels or [height, width]."""
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])


@dataclass(frozen=True)
class SampleTransform:
    """Crop, resize, flip and augment one image: Picture -> uint8 (channels, height, width)."""

    image_size: int | Sequence[int]  # side of the result in pixels, or (height, width)
    # "random_resized" (random area and aspect, as in Inception), "random" (as in the AlexNet paper: a random square of
    # the middle square, which is resized to a side of image_size / crop_ratio; of a rectangle, both sides are divided),
    # "center" (the middle) or "none" (the whole image, which `user` must crop)
    crop: str = "center"
    scale: tuple[float, float] = (0.08, 1.0)  # smallest and largest fraction of the area that "random_resized" crops
    # smallest and largest aspect (width / height) that "random_resized" draws, relative to that of the result: how much
    # the image may be stretched
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_ratio: float = 0.875  # image_size / short side for "random" and "center"; 0.875 = 224 / 256
    flip: float = 0.0  # probability of mirroring left to right
    policy: str = "none"  # or "trivial" (TrivialAugmentWide) or "rand" (RandAugment)
    policy_ops: int = 2  # operations per image of RandAugment
    policy_magnitude: int = 9  # strength of these operations, 0 to 30
    sizes: tuple[tuple[int, int], ...] = ()  # (first epoch, from 1; side in pixels), which replace image_size
    channels: int = 3  # of the result, see `decode.MODES`
    user: UserTransforms | None = None  # transforms of your own, between the crop and the flip

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the result."""
        return height_width(self.image_size)

    @property
    def covered(self) -> tuple[int, int]:
        """(height, width) that the resized image just covers, for "random" and "center"."""
        height, width = self.size
        return round(height / self.crop_ratio), round(width / self.crop_ratio)

    def at(self, epoch: int) -> "SampleTransform":
        """Return the transform of an epoch, counted from 0."""
        return _at(self, epoch) if self.sizes else self

    def __call__(self, picture: decode.AnyPicture, rng: SampleRng | None = None) -> Tensor:
        """Transform one image; `rng` is None for transforms without randomness."""
        out = torch.empty((1, *self.size, self.channels), dtype=torch.uint8).permute(0, 3, 1, 2)
        self.write(picture, rng or SampleRng(0), out)
        return out[0]

    def write(self, picture: decode.AnyPicture, rng: SampleRng, out: Tensor) -> None:
        """Write the transformed image into `out`: uint8 (1, channels, height, width) in channels-last memory."""
        seed = rng.state
        if self.crop != "none":
            decode.crop_resize(picture, *self.crop_box(picture.size[0], picture.size[1], rng), out)
        if self.user is not None:
            image = decode.whole(picture, self.channels) if self.crop == "none" else out[0]
            out[0].copy_(self.user(image, out.shape[2:], mix(seed)))
        if self.flip > 0 and rng.uniform() < self.flip:
            out.copy_(out.flip(-1))
        if self.policy != "none":
            pixels = out[0].permute(1, 2, 0).numpy()
            np.copyto(pixels, policies.apply(pixels, self.policy, self.policy_ops, self.policy_magnitude, rng))

    def crop_box(self, width: int, height: int, rng: SampleRng) -> CropBox:
        """Choose what is cropped from an image of width x height pixels."""
        result = self.size
        if self.crop == "random_resized":
            return CropBox(self.random_box(width, height, rng), result)
        high, wide = covered = self.covered
        # of a long image, the middle: resized as a whole, a strip of 4 x 20,000 pixels would take a gigabyte
        left = max(0, width - math.ceil(LONG * height * wide / high)) // 2
        top = max(0, height - math.ceil(LONG * width * high / wide)) // 2
        box = (left, top, width - left, height - top)
        width, height = width - 2 * left, height - 2 * top
        # for a square, as torchvision's Resize, which rounds the long side down, and CenterCrop
        size = (high, high * width // height) if height * wide <= width * high else (wide * height // width, wide)
        if self.crop == "random":
            edges = zip(size, covered, result, strict=True)
            top, left = (round((edge - part) / 2) + rng.below(part - side + 1) for edge, part, side in edges)
        else:
            top, left = (round((edge - side) / 2) for edge, side in zip(size, result, strict=True))
        return CropBox(box, size, (top, left))

    def crop_boxes(self, width: int, height: int, rng: BatchRng) -> np.ndarray:
        """Choose what is cropped from each of N images of one size, for `gpu_crop.crop`.

        The numbers are those that `crop_box` and `write` would draw for each image.

        Returns:
            int32 (N, 9): the eight numbers of a `CropBox`, and 1 if the image is mirrored.
        """
        result = self.size
        boxes = np.empty((len(rng.states), 9), np.int32)
        if self.crop == "random_resized":
            boxes[:, :4] = self.random_boxes(width, height, rng)
            boxes[:, 4:8] = (*result, 0, 0)
        else:
            box, size, at = replace(self, crop="center").crop_box(width, height, SampleRng(0))
            boxes[:, :8] = (*box, *size, *at)
            if self.crop == "random":
                for axis, part in enumerate(self.covered):
                    boxes[:, 6 + axis] = round((size[axis] - part) / 2) + rng.below(part - result[axis] + 1)
        boxes[:, 8] = rng.uniform() < self.flip if self.flip > 0 else 0
        return boxes

    def random_box(self, width: int, height: int, rng: SampleRng) -> decode.Box:
        """Draw a box as torchvision's RandomResizedCrop does: area, aspect (log-uniform) and place."""
        low, high = map(math.log, self._aspects)
        for _ in range(TRIES):
            area = width * height * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(low, high))
            columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < columns <= width and 0 < rows <= height:
                top, left = rng.below(height - rows + 1), rng.below(width - columns + 1)
                return (left, top, left + columns, top + rows)
        return self.middle_box(width, height)

    @property
    def _aspects(self) -> tuple[float, float]:
        height, width = self.size
        return self.ratio[0] * (width / height), self.ratio[1] * (width / height)

    def middle_box(self, width: int, height: int) -> decode.Box:
        """Return the largest box in the middle whose aspect is within `ratio`."""
        columns, rows = width, height
        low, high = self._aspects
        if width / height < low:
            rows = min(height, round(width / low))
        elif width / height > high:
            columns = min(width, round(height * high))
        left, top = (width - columns) // 2, (height - rows) // 2
        return (left, top, left + columns, top + rows)

    def random_boxes(self, width: int, height: int, rng: BatchRng) -> np.ndarray:
        """Draw the `random_box` of each stream: int64 (N, 4)."""
        low, high = map(math.log, self._aspects)
        open_rows = np.arange(len(rng.states))  # rows that have no box yet
        boxes = np.tile(np.array(self.middle_box(width, height)), (len(open_rows), 1))
        for _ in range(TRIES):
            area = width * height * rng.uniform(*self.scale, rows=open_rows)
            aspect = np.exp(rng.uniform(low, high, rows=open_rows))
            columns, rows = (np.rint(np.sqrt(part)).astype(np.int64) for part in (area * aspect, area / aspect))
            fits = (columns > 0) & (columns <= width) & (rows > 0) & (rows <= height)
            done, columns, rows = open_rows[fits], columns[fits], rows[fits]
            top = rng.below(height - rows + 1, rows=done)
            left = rng.below(width - columns + 1, rows=done)
            boxes[done] = np.stack([left, top, left + columns, top + rows], 1)
            open_rows = open_rows[~fits]
            if not len(open_rows):
                break
        return boxes


@functools.lru_cache(maxsize=4)
def _at(transform: SampleTransform, epoch: int) -> SampleTransform:
    side = [pixels for first, pixels in transform.sizes if first <= epoch + 1][-1]
    return replace(transform, image_size=side, sizes=())
