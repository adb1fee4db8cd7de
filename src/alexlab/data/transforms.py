"""What is done to each image on its own, on the CPU: which part is cut out, and policies that differ by image.

torchvision v2 draws the crops and does the policies; `decode.crop_resize` cuts and resizes in one pass. Parts that
can be done batch-wise (float, normalization, colour noise, erasing, mixup) are in `augment.py`, on the device.
"""

import functools
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torchvision.transforms import v2

from alexlab.data import decode


@dataclass(frozen=True)
class SampleTransform:
    """Image -> uint8 (3, image_size, image_size).

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

    def __call__(self, image: Image.Image) -> torch.Tensor:
        flip = self.flip > 0 and bool(torch.rand(()) < self.flip)
        pixels = decode.crop_resize(image, self.box(*decode.size_of(image)), (self.image_size, self.image_size), flip)
        if self.policy != "none":
            pixels = _policy(self.policy, self.policy_ops, self.policy_magnitude)(pixels)
        return pixels

    def box(self, width: int, height: int) -> decode.Box:
        """The part of a width x height image that is kept: (left, top, right, bottom) in pixels."""
        if self.crop == "random_resized":
            size_only = torch.empty(1, height, width, device="meta")  # get_params reads nothing but its size
            top, left, rows, columns = v2.RandomResizedCrop.get_params(size_only, list(self.scale), list(self.ratio))
            return (left, top, left + columns, top + rows)
        side = min(width, height) * self.crop_ratio
        if self.crop == "random":
            x, y = torch.rand(2).tolist()
        else:
            x = y = 0.5
        whole = min(width, height)
        left, top = (width - whole) / 2 + x * (whole - side), (height - whole) / 2 + y * (whole - side)
        return (left, top, left + side, top + side)


@functools.lru_cache(maxsize=4)
def _at(transform: SampleTransform, epoch: int) -> SampleTransform:
    side = [pixels for first, pixels in transform.sizes if first <= epoch + 1][-1]
    return replace(transform, image_size=side, sizes=())


@functools.cache
def _policy(name: str, ops: int, magnitude: int) -> v2.Transform:
    return v2.TrivialAugmentWide() if name == "trivial" else v2.RandAugment(ops, magnitude)
