"""TrivialAugment and RandAugment of one image by Pillow, equal to torchvision's on a PIL image.

torchvision draws from the generator that all threads share, and takes three to ten times as long on tensors.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from alexlab.data.sample_rng import SampleRng

BINS = 31  # number of strengths, as in torchvision


def apply(pixels: np.ndarray, policy: str, ops: int, magnitude: int, rng: SampleRng) -> np.ndarray:
    """Augment one image: uint8 (H, W, 3) -> uint8 (H, W, 3).

    Args:
        policy: "trivial" (Mueller and Hutter 2021, the wide space: one operation of any strength) or "rand" (Cubuk et
            al. 2020: `ops` operations of strength `magnitude`, 0 to 30).
    """
    image = Image.fromarray(pixels)
    for _ in range(1 if policy == "trivial" else ops):
        name, amount = draw(policy, magnitude, image.size, rng)
        image = OPERATIONS[name](image, amount)
    return np.asarray(image)


def draw(policy: str, magnitude: int, size: tuple[int, int], rng: SampleRng) -> tuple[str, float]:
    """Draw an operation, and the amount, for an image of `size` (width, height)."""
    is_trivial = policy == "trivial"
    name = NAMES[rng.below(len(NAMES))]
    strength = (rng.below(BINS) if is_trivial else magnitude) / (BINS - 1)
    if name in SIGNED:
        moved = 150 / 331  # of 331 pixels, the image size of Cubuk et al.
        largest = {"translate_x": moved * size[0], "translate_y": moved * size[1], "rotate": 30.0}
        largest |= {"shear_x": 0.3, "shear_y": 0.3}
        if is_trivial:
            largest = {"translate_x": 32.0, "translate_y": 32.0, "rotate": 135.0}
        return name, largest.get(name, 0.99 if is_trivial else 0.9) * strength * (-1 if rng.below(2) else 1)
    if name == "posterize":
        return name, 8 - round(strength * (6 if is_trivial else 4))
    return name, 255 * (1 - strength) if name == "solarize" else 0.0


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, _: image,
    "shear_x": lambda image, amount: _affine(image, 1, amount, 0, 0, 1, 0),
    "shear_y": lambda image, amount: _affine(image, 1, 0, 0, amount, 1, 0),
    "translate_x": lambda image, amount: _affine(image, 1, 0, -int(amount), 0, 1, 0),
    "translate_y": lambda image, amount: _affine(image, 1, 0, 0, 0, 1, -int(amount)),
    "rotate": lambda image, amount: image.rotate(amount, Image.Resampling.NEAREST),
    "brightness": lambda image, amount: ImageEnhance.Brightness(image).enhance(1 + amount),
    "color": lambda image, amount: ImageEnhance.Color(image).enhance(1 + amount),
    "contrast": lambda image, amount: ImageEnhance.Contrast(image).enhance(1 + amount),
    "sharpness": lambda image, amount: ImageEnhance.Sharpness(image).enhance(1 + amount),
    "posterize": lambda image, amount: ImageOps.posterize(image, int(amount)),
    "solarize": lambda image, amount: ImageOps.solarize(image, amount),  # type: ignore[arg-type]
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
}
NAMES = tuple(OPERATIONS)
SIGNED = frozenset(NAMES[1:10])
