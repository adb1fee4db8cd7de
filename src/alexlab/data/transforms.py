"""What is done to each image on its own, on the CPU: which part is cut out, and policies that differ by image.

`decode.crop_resize` cuts and resizes in one pass, `policies.py` has TrivialAugment and RandAugment. Parts that can be
done batch-wise (float, normalization, colour noise, erasing, mixup) are in `augment.py`, on the device.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alexlab.data import decode, policies
from alexlab.data.sample_rng import Draws, ManyDraws

LONG = 8  # times what the net sees
TRIES = 10  # torchvision's, before a random resized crop takes the middle


class Cut(NamedTuple):
    """A box of the image in pixels (left, top, right, bottom), the (height, width) that it is resized to, and the (top,
    left) in that of the square that is kept."""

    box: decode.Box
    size: tuple[int, int]
    at: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class SampleTransform:
    """Picture -> uint8 (3, image_size, image_size).

    Attributes:
        image_size: side of the result in pixels.
        crop: "random_resized" (area and aspect drawn, as in Inception), "random" (as in the AlexNet paper: a random
            square of the middle square, which is scaled to a side of image_size / crop_ratio) or "center" (its middle).
        scale: least and largest share of the area that "random_resized" keeps.
        ratio: least and largest aspect (width / height) that "random_resized" draws.
        crop_ratio: image_size / short side for "random" and "center"; 0.875 = 224 / 256.
        flip: probability of mirroring left to right.
        policy: "none", "trivial" (TrivialAugmentWide) or "rand" (RandAugment).
        policy_ops, policy_magnitude: of RandAugment: operations an image, and their strength (0 to 30).
        sizes: (first epoch, counted from 1; pixels) of the sides that take the place of image_size, in growing order.
    """

    image_size: int
    crop: str = "center"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_ratio: float = 0.875
    flip: float = 0.0
    policy: str = "none"
    policy_ops: int = 2
    policy_magnitude: int = 9
    sizes: tuple[tuple[int, int], ...] = ()

    def at(self, epoch: int) -> "SampleTransform":
        """What it is in an epoch, counted from 0."""
        return _at(self, epoch) if self.sizes else self

    def __call__(self, picture: decode.AnyPicture, draws: Draws | None = None) -> Tensor:
        """
        Args:
            draws: of this image; None for transforms that draw nothing.
        """
        out = torch.empty((1, self.image_size, self.image_size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        self.write(picture, draws or Draws(0), out)
        return out[0]

    def write(self, picture: decode.AnyPicture, draws: Draws, out: Tensor) -> None:
        """Write the image into `out`: uint8 (1, 3, image_size, image_size) in channels-last memory."""
        decode.crop_resize(picture, *self.cut(picture.size[0], picture.size[1], draws), out)
        if self.flip > 0 and draws.uniform() < self.flip:
            out.copy_(out.flip(-1))
        if self.policy != "none":
            pixels = out[0].permute(1, 2, 0).numpy()
            np.copyto(pixels, policies.apply(pixels, self.policy, self.policy_ops, self.policy_magnitude, draws))

    def cut(self, width: int, height: int, draws: Draws) -> Cut:
        """The part of a width x height image that is kept."""
        side = self.image_size
        if self.crop == "random_resized":
            return Cut(random_box(width, height, self.scale, self.ratio, draws), (side, side))
        short = round(side / self.crop_ratio)
        # torchvision's Resize(short), whose long side is rounded down, and the middle of its CenterCrop
        size = (short, short * width // height) if height <= width else (short * height // width, short)
        if self.crop == "random":
            top, left = (round((edge - short) / 2) + draws.below(short - side + 1) for edge in size)
        else:
            top, left = (round((edge - side) / 2) for edge in size)
        if max(size) > LONG * side:
            return _middle_of_long(width, height, size, (top, left), side)
        return Cut((0, 0, width, height), size, (top, left))

    def cuts(self, width: int, height: int, draws: ManyDraws) -> np.ndarray:
        """The parts that are kept of images of one size, for `batch_crop.crop`: int32 (N, 9), each a `Cut`'s eight
        numbers and whether it is mirrored. They are those that `write` would take, draw by draw.

        Args:
            width, height: in pixels, neither more than LONG times the other.
        """
        count, side = len(draws.states), self.image_size
        found = np.empty((count, 9), np.int32)
        if self.crop == "random_resized":
            found[:, :4] = random_boxes(width, height, self.scale, self.ratio, draws)
            found[:, 4:8] = (side, side, 0, 0)
        else:
            box, size, at = replace(self, crop="center").cut(width, height, Draws(0))
            found[:, :8] = (*box, *size, *at)
            if self.crop == "random":
                short = min(size)
                for axis in (0, 1):
                    found[:, 6 + axis] = round((size[axis] - short) / 2) + draws.below(short - side + 1)
        found[:, 8] = draws.uniform() < self.flip if self.flip > 0 else 0
        return found


def _middle_of_long(width: int, height: int, size: tuple[int, int], at: tuple[int, int], side: int) -> Cut:
    """Of an image many times as long as it is wide the part around what is kept alone, to half a pixel: scaled as a
    whole, a strip of 4 x 20,000 pixels would take a gigabyte."""
    axis = 0 if height > width else 1
    source = (height, width)[axis]
    times = size[axis] / source
    first = max(0, math.floor(at[axis] / times) - 2)
    last = min(source, math.ceil((at[axis] + side) / times) + 2)
    long = max(side, round((last - first) * times))
    within = min(long - side, max(0, round(at[axis] - first * times)))
    if axis == 0:
        return Cut((0, first, width, last), (long, size[1]), (within, at[1]))
    return Cut((first, 0, last, height), (size[0], long), (at[0], within))


def random_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], draws: Draws
) -> decode.Box:
    """A box of torchvision's RandomResizedCrop: of an area between the shares `scale` of the whole, of an aspect
    between the bounds `ratio` (evenly by its logarithm), anywhere."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(TRIES):
        area = width * height * draws.uniform(*scale)
        aspect = math.exp(draws.uniform(low, high))
        columns, rows = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < columns <= width and 0 < rows <= height:
            top, left = draws.below(height - rows + 1), draws.below(width - columns + 1)
            return (left, top, left + columns, top + rows)
    return middle_box(width, height, ratio)


def middle_box(width: int, height: int, ratio: tuple[float, float]) -> decode.Box:
    """The largest box of an aspect between the bounds `ratio`, in the middle."""
    columns, rows = width, height
    if width / height < ratio[0]:
        rows = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        columns = min(width, round(height * ratio[1]))
    left, top = (width - columns) // 2, (height - rows) // 2
    return (left, top, left + columns, top + rows)


def random_boxes(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], draws: ManyDraws
) -> np.ndarray:
    """`random_box` of each stream: int64 (N, 4)."""
    low, high = math.log(ratio[0]), math.log(ratio[1])
    left = np.arange(len(draws.states))
    # the middle, for those that never find a box
    boxes = np.tile(np.array(middle_box(width, height, ratio)), (len(left), 1))
    for _ in range(TRIES):
        area = width * height * draws.uniform(*scale, among=left)
        aspect = np.exp(draws.uniform(low, high, among=left))
        columns, rows = (np.rint(np.sqrt(part)).astype(np.int64) for part in (area * aspect, area / aspect))
        fits = (columns > 0) & (columns <= width) & (rows > 0) & (rows <= height)
        done, columns, rows = left[fits], columns[fits], rows[fits]
        top = draws.below(height - rows + 1, among=done)
        start = draws.below(width - columns + 1, among=done)
        boxes[done] = np.stack([start, top, start + columns, top + rows], 1)
        left = left[~fits]
        if not len(left):
            break
    return boxes


@functools.lru_cache(maxsize=4)
def _at(transform: SampleTransform, epoch: int) -> SampleTransform:
    side = [pixels for first, pixels in transform.sizes if first <= epoch + 1][-1]
    return replace(transform, image_size=side, sizes=())
