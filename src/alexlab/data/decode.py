"""File -> pixels: decoded, cropped and resized in as few passes as possible, uint8 all the way."""

import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from alexlab.errors import UserError

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

ORIENTATION = 0x0112  # the EXIF tag


class BrokenImageError(UserError):
    """A file that is not a whole image; its path is in the text."""

    def __init__(self, text: str) -> None:
        # a loader's worker sends the whole traceback as the text, of which the user needs the last line
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2].strip())


def open_image(path: str) -> Image.Image:
    """Open `path` (its header alone is read).

    Raises:
        BrokenImageError: not an image, or not to be read.
    """
    try:
        return Image.open(path)
    except (OSError, Image.DecompressionBombError) as error:
        raise broken(path, error) from None


def read(path: str, transform: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    """What `transform` makes of the image at `path`.

    Raises:
        BrokenImageError: not an image, not a whole one, or not to be read.
    """
    with open_image(path) as image:
        try:
            return transform(image)
        # what Pillow raises for broken files
        except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
            raise broken(path, error) from None


def broken(path: str, error: Exception) -> BrokenImageError:
    reason = "Permission denied" if isinstance(error, PermissionError) else (str(error) or type(error).__name__)
    return BrokenImageError(
        f"{path} cannot be read as an image ({reason.replace(path, Path(path).name)}): replace or remove it, or leave "
        "such files out with data.on_error=skip (they are counted and listed)."
    )


def size_of(image: Image.Image) -> tuple[int, int]:
    """(width, height) as a viewer shows it, that is, after the EXIF rotation."""
    width, height = image.size
    return (height, width) if image.getexif().get(ORIENTATION, 1) >= 5 else (width, height)


def crop_resize(image: Image.Image, box: Box, size: tuple[int, int], flip: bool = False) -> torch.Tensor:
    """Decode `image`, cut out `box` and resize it, antialiased, to `size`.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its scale where the crop stays at least twice as large as `size`.

    Args:
        box: in pixels of the picture as a viewer shows it.
        size: (height, width) of the result.
        flip: mirror it left to right.

    Returns:
        uint8 (3, height, width), RGB, in channels-last memory.
    """
    height, width = size
    full = size_of(image)
    crop = (box[2] - box[0], box[3] - box[1])
    rotated = full != image.size
    if image.format == "JPEG":
        # draft() picks the smallest scale that is still at least as large as what it is asked for
        asked = (2 * width * full[0] / crop[0], 2 * height * full[1] / crop[1])
        image.draft("RGB", (int(asked[1]), int(asked[0])) if rotated else (int(asked[0]), int(asked[1])))
    image = _rgb(ImageOps.exif_transpose(image))
    scale = (image.size[0] / full[0], image.size[1] / full[1])
    scaled = (box[0] * scale[0], box[1] * scale[1], box[2] * scale[0], box[3] * scale[1])
    image = image.resize((width, height), Image.Resampling.BILINEAR, box=scaled)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits: convert() would clip instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "palette images with transparency should be converted to RGBA"
        return image.convert("RGB")
