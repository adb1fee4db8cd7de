"""File -> pixels: decoded, cropped and resized in as few passes as possible, uint8 all the way.

JPEGs of eight bits, grey or in colour, are decoded by simplejpeg (libjpeg-turbo without the GIL, at 1/2, 1/4 or 1/8 of
their scale where that is enough); all others, and those that it refuses, by Pillow.
"""

import contextlib
import functools
import io
import os
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from alexlab.engine.errors import UserError

T = TypeVar("T")
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

ORIENTATION = 0x0112  # the EXIF tag
MIRRORED, UPSIDE_DOWN = (2, 3, 6, 7), (3, 4, 7, 8)  # of its values, once 5 to 8 have rows and columns exchanged
USUAL = 2**18  # bytes: most files have less
LARGEST = 2**29  # bytes of a file that is read at all
SCANS = 100  # of a JPEG, which repeats its pixels in each; a progressive one has about ten
BLOCK = 16  # the most rows that a JPEG's blocks of all three colours take
FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended and progressive: what libjpeg-turbo decodes
# of Pillow's many formats those of images on the web: others start programs (EPS, Ghostscript) or are seldom looked at
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# what Pillow was seen to raise for damaged files
BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, struct.error,
    Image.DecompressionBombError,
)  # fmt: skip

# of more than half of the pixels that it refuses, which it would tell without the file's name
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# what interpolate(antialias=True) calls, which has no `out`
_resize: Callable[..., Tensor] = torch._C._nn._upsample_bilinear2d_aa


class BrokenImageError(UserError):
    """A file that is not a whole image; its path is in the text.

    Attributes:
        what: its path and what is wrong, without advice.
    """

    def __init__(self, path: str, error: OSError) -> None:
        self.what = f"{path} cannot be read as an image ({error.strerror or error})"
        super().__init__(
            f"{self.what}: replace or remove it, or leave such files out with data.on_error=skip (they are counted and "
            "listed)."
        )


class Picture:
    """An image that is decoded where its pixels are asked for.

    Attributes:
        size: (width, height) in pixels, as a viewer shows it, that is, after the EXIF rotation.
        orientation: of what is stored, 1 to 8 as in EXIF.
    """

    def __init__(self, source: "bytes | Image.Image") -> None:
        """Of a file's bytes, of which the header alone is read, or of what Pillow has opened.

        Raises:
            OSError: it is not an image, or a monstrous one.
        """
        self.image: Image.Image | None = None
        self.jpeg = b""
        plain = plain_jpeg(source) if isinstance(source, bytes) else None
        if isinstance(source, bytes) and source[:2] == b"\xff\xd8" and source.count(b"\xff\xda") > SCANS:
            raise OSError(
                f"it has {source.count(bytes([0xFF, 0xDA]))} scans, and {SCANS} are the most that are decoded"
            )
        if plain is not None:
            assert isinstance(source, bytes)
            self.jpeg, self.stored, self.orientation, self.frame = source, *plain
        else:
            with pillow():
                self.image = opened(source) if isinstance(source, bytes) else source
                self.stored, self.orientation = self.image.size, orientation_of(self.image)
        self.size = self.stored[::-1] if self.orientation >= 5 else self.stored

    def pixels(self, factor: int = 1, bottom: int | None = None) -> tuple[np.ndarray, int]:
        """uint8 (height, width, 3) as they are stored, not yet turned; and the factor by which they are smaller.

        Args:
            factor: 1, 2, 4 or 8; what is not a plain JPEG stays as large as it is, with factor 1.
            bottom: stored rows that are needed; more may come. None is all.

        Raises:
            OSError: it is not a whole image.
        """
        if self.image is None:
            jpeg, rows = self._top(bottom)
            height, width = -(-rows // factor), -(-self.stored[0] // factor)
            try:
                pixels = simplejpeg.decode_jpeg(
                    jpeg, "RGB", min_height=height, min_width=width, min_factor=factor, strict=jpeg is self.jpeg
                )
                return pixels, factor
            except ValueError:  # it is cut off or worse, or has mere blemishes: Pillow tells
                with pillow():
                    self.image = opened(self.jpeg)
        with pillow():
            return np.array(_rgb(self.image)), 1

    def _top(self, bottom: int | None) -> tuple[bytes, int]:
        """The JPEG with a header that tells of no more rows than are needed, and their number.

        A decoder then leaves out the rows below, and all others are bit for bit the same: a row of blocks more is kept,
        which the smoothing of colours looks at. It cannot tell whether the file is whole, which its last bytes must.
        """
        rows = self.stored[1]
        if bottom is None or b"\xff\xd9" not in self.jpeg[-64:]:
            return self.jpeg, rows
        needed = -(-bottom // BLOCK) * BLOCK + BLOCK
        if needed >= rows:
            return self.jpeg, rows
        at = self.frame + 5
        return b"".join((self.jpeg[:at], needed.to_bytes(2, "big"), self.jpeg[at + 2 :])), needed


class AnyPicture(Protocol):
    """What `crop_resize` needs of a `Picture`."""

    size: tuple[int, int]
    orientation: int

    def pixels(self, factor: int = 1, bottom: int | None = None) -> tuple[np.ndarray, int]: ...


class Pixels:
    """An image that was decoded before, with the same words as a `Picture`."""

    def __init__(self, pixels: np.ndarray) -> None:
        """uint8 (height, width, 3)."""
        self.array, self.orientation = pixels, 1
        self.size = (pixels.shape[1], pixels.shape[0])

    def pixels(self, factor: int = 1, bottom: int | None = None) -> tuple[np.ndarray, int]:
        return self.array, 1


@contextlib.contextmanager
def pillow() -> Iterator[None]:
    """Whatever Pillow raises for a damaged file is an OSError."""
    try:
        yield
    except Image.UnidentifiedImageError:  # whose own text names a buffer in memory
        raise OSError("no image of a known format") from None
    except BROKEN as error:
        raise OSError(str(error) or type(error).__name__) from None


def opened(encoded: bytes) -> Image.Image:
    """By Pillow, its header alone."""
    return Image.open(io.BytesIO(encoded), formats=formats())


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def orientation_of(image: Image.Image) -> int:
    """1 to 8, the EXIF orientation; 1 also where it is nonsense, as for Pillow's exif_transpose."""
    if image.format == "TIFF":  # which Pillow turns by itself
        return 1
    told = image.getexif().get(ORIENTATION)
    return told if isinstance(told, int) and 2 <= told <= 8 else 1


def plain_jpeg(encoded: bytes) -> tuple[tuple[int, int], int, int] | None:
    """(width, height), EXIF orientation and the place of the frame's header of a JPEG of eight bits, grey or in three
    colours; None for all else.

    Walks over the segments before the pixels: 3 microseconds, where Pillow's open takes 60.
    """
    at, orientation, frame = 2, 1, 0
    try:
        if encoded[:2] != b"\xff\xd8":
            return None
        while encoded[at] == 0xFF:
            kind, length = encoded[at + 1], encoded[at + 2] << 8 | encoded[at + 3]
            if kind in FRAMES:
                frame = at
            elif kind == 0xDA:  # the pixels
                break
            elif kind == 0xE1:  # EXIF or XMP
                told = encoded[at + 4 : at + 2 + length]
                if b"\x01\x12" in told or b"\x12\x01" in told or b"tiff:Orientation" in told:
                    with pillow(), opened(encoded) as image:
                        orientation = orientation_of(image)
            at += 2 + length
        if not frame or encoded[at + 1] != 0xDA:
            return None
    except IndexError:
        return None
    height, width = (encoded[frame + n] << 8 | encoded[frame + n + 1] for n in (5, 7))
    plain = encoded[frame + 4] == 8 and encoded[frame + 9] in (1, 3) and width and height
    limit = Image.MAX_IMAGE_PIXELS
    known = plain and (limit is None or width * height <= 2 * limit)
    return ((width, height), orientation, frame) if known else None


def _stored(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Where a box of the picture that a viewer shows, of (width, height) `size`, lies in what is stored."""
    left, top, right, bottom = box
    if orientation in MIRRORED:
        left, right = size[0] - right, size[0] - left
    if orientation in UPSIDE_DOWN:
        top, bottom = size[1] - bottom, size[1] - top
    return (top, left, bottom, right) if orientation >= 5 else (left, top, right, bottom)


def _turned(images: Tensor, orientation: int) -> Tensor:
    """Stored images (B, 3, H, W) as a viewer shows them (EXIF 2.32, tag Orientation: 1 to 8)."""
    if orientation >= 5:
        images = images.transpose(2, 3)
    if orientation in UPSIDE_DOWN:
        images = images.flip(2)
    return images.flip(3) if orientation in MIRRORED else images


def read(path: str, transform: Callable[[Picture], T]) -> T:
    """What `transform` makes of the picture at `path`.

    Raises:
        BrokenImageError: not an image, not a whole one, or not to be read.
    """
    try:
        return transform(open_picture(path))
    except OSError as error:
        raise BrokenImageError(path, error) from None


def open_picture(path: str) -> Picture:
    """
    Raises:
        OSError: it cannot be read, or is not an image.
    """
    return Picture(_content(path))


def _content(path: str) -> bytes:
    """Of a file: in three calls, where Python's open and read make ten, between which other threads may take over."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe called .jpg would be waited for
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISFIFO(found.st_mode):
            raise OSError("it is a device or a folder, and no file")
        if found.st_size > LARGEST:
            raise OSError(f"it has {found.st_size:,} bytes, and {LARGEST:,} are the most that an image may have")
        content = os.read(file, USUAL)
        if len(content) == USUAL:
            parts = [content]
            while part := os.read(file, 16 * USUAL):
                parts.append(part)
            content = b"".join(parts)
        return content
    finally:
        os.close(file)


def crop_resize(picture: AnyPicture, box: Box, size: tuple[int, int], at: tuple[int, int], out: Tensor) -> None:
    """Cut `box` out of `picture`, resize it, antialiased, and write a part of that into `out`.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its scale where the box stays at least as large as `size`; its edges then
    lie at whole pixels of that scale.

    Args:
        box: in pixels of the picture as a viewer shows it.
        size: (height, width) of the resized box.
        at: (top, left) in it of the part that is kept.
        out: uint8 (1, 3, H, W) in channels-last memory.
    """
    turn = picture.orientation
    left, top, right, bottom = _stored(box, picture.size, turn)
    high, wide = size[::-1] if turn >= 5 else size
    wanted = 1
    while wanted < 8 and right - left >= 2 * wanted * wide and bottom - top >= 2 * wanted * high:
        wanted *= 2
    pixels, factor = picture.pixels(wanted, bottom)
    x, y = round(left / factor), round(top / factor)
    part = pixels[None, y : y - (top - bottom) // factor, x : x - (left - right) // factor]  # rounded up
    source = torch.from_numpy(part.transpose(0, 3, 1, 2))
    # exact, so that what was rounded does not stretch the picture
    scales = (high * factor / (bottom - top), wide * factor / (right - left))
    rows, columns = out.shape[-2:]
    if turn == 1 and size == (rows, columns):
        _resize(source, size, False, *scales, out=out)
        return
    resized = _turned(_resize(source, (high, wide), False, *scales), turn)
    out.copy_(resized[..., at[0] : at[0] + rows, at[1] : at[1] + columns])


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers: save it with eight bits a channel")
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits: convert() would clip instead of scaling
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "palette images with transparency should be converted to RGBA"
        return image.convert("RGB")
