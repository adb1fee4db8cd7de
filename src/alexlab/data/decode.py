"""From a file to pixels: decoded, cropped and resized in as few passes as possible, in uint8 throughout.

simplejpeg (libjpeg-turbo, without Python's lock) decodes JPEGs of eight bits, grey or in colour, at 1/2, 1/4 or 1/8 of
their size if that is enough. Pillow decodes all other files, and the JPEGs that simplejpeg refuses.
"""

import contextlib
import functools
import io
import os
import re
import stat
import struct
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from alexlab.engine.errors import UserError

T = TypeVar("T")
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

ORIENTATION, PHOTOMETRIC = 0x0112, 262  # tags of EXIF and TIFF
# values of the tag; for 5 to 8, rows and columns are exchanged first
MIRRORED, UPSIDE_DOWN = (2, 3, 6, 7), (3, 4, 7, 8)
FIRST_READ = 2**18  # bytes: most files are smaller
MAX_BYTES = 2**29  # larger files are not read
MAX_SCANS = 100  # of a JPEG, each of which decodes all pixels again; a progressive one has about ten
BLOCK = 16  # rows of the largest block of a JPEG, over the three colours
# Channels that a file can be decoded to, by Pillow's names and simplejpeg's. Grey is the luma, 0.299 R + 0.587 G +
# 0.114 B: a JPEG's own, else as Pillow computes it. Alpha is 255 if the file has none.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # what ends the pixels of a scan in a JPEG
DARK = 2**12  # 16-bit pixels that are all below it use 12 bits, as of microscopes and X-rays
JPEG_MODES = MODES | {1: "GRAY"}
FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended and progressive: what libjpeg-turbo decodes
# Pillow's formats that are common on the web; the rest start programs (EPS runs Ghostscript) or are rarely reviewed
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
EIGHT_BITS = "save it with eight bits per channel, from 0 to 255"
TOO_DARK = f"its 16-bit pixels are all below {DARK}, so it would be almost black: {EIGHT_BITS}"
# what Pillow was seen to raise for damaged files
PILLOW_ERRORS: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError)
PILLOW_ERRORS += (OverflowError, struct.error, Image.DecompressionBombError)

# Pillow warns, without the file's name, from half of the number of pixels on that it refuses
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# private to torch: F.interpolate(antialias=True) without the overhead, and with `out`; a test compares them
_resize: Callable[..., Tensor] = torch._C._nn._upsample_bilinear2d_aa


class BrokenImageError(UserError):
    """A file is not a complete image. `reason` is the path and what is wrong with the file, without advice."""

    def __init__(self, path: str, error: OSError) -> None:
        self.reason = f"{path} cannot be read as an image ({error.strerror or error})"
        super().__init__(
            f"{self.reason}: replace or remove it, or skip such files with data.on_error=skip (they are counted and "
            "listed)."
        )


class Picture:
    """An encoded image, which is decoded when `pixels` is called.

    `orientation` is that of the stored pixels, 1 to 8 as in EXIF. `size` is (width, height) after the rotation.
    """

    def __init__(self, source: "bytes | Image.Image") -> None:
        """Read the header of a file's bytes, or of an image that Pillow has opened. Raises OSError if it cannot."""
        self.image: Image.Image | None = None  # once Pillow has opened it
        self.has_16_bits = False  # whether Pillow takes the upper eight of 16 bits per channel
        self.jpeg = b""  # the file's bytes if simplejpeg decodes it
        if isinstance(source, bytes):
            if (
                source[:2] == b"\xff\xd8"
                and source.count(b"\xff\xda") > MAX_SCANS
                and (scans := scans_of(source)) > MAX_SCANS
            ):
                raise OSError(f"it has {scans} scans, and at most {MAX_SCANS} are decoded")
            header = parse_jpeg(source)
            if header is not None:
                self.jpeg, (self.stored, self.orientation, self.frame) = source, header
        if not self.jpeg:
            with pillow_errors():
                self.image = pillow_open(source) if isinstance(source, bytes) else source
                for tile in getattr(self.image, "tile", ())[:1]:  # gone once the image is loaded, as for a PNG's EXIF
                    stored = tile[3][0] if isinstance(tile[3], tuple) and tile[3] else tile[3]  # as in "RGB;16B"
                    self.has_16_bits = isinstance(stored, str) and "16" in stored
                self.stored, self.orientation = self.image.size, exif_orientation(self.image)
        self.size = self.stored[::-1] if self.orientation >= 5 else self.stored

    def pixels(self, factor: int = 1, bottom: int | None = None, channels: int = 3) -> tuple[np.ndarray, int]:
        """Decode to uint8 (height, width, C) as stored, without the rotation; also return how many times smaller it is.

        Args:
            factor: 1, 2, 4 or 8: how much smaller the result may be; 1 if simplejpeg does not decode the image.
            bottom: number of stored rows that are needed; the result may have more. None is all.
            channels: C, one of MODES.

        Raises:
            OSError: the file is not a complete image.
        """
        if self.image is None:
            jpeg, rows = self._top(bottom)
            height, width = -(-rows // factor), -(-self.stored[0] // factor)
            try:
                mode, strict = JPEG_MODES[channels], jpeg is self.jpeg
                pixels = simplejpeg.decode_jpeg(
                    jpeg, mode, min_height=height, min_width=width, min_factor=factor, strict=strict
                )
                return pixels, factor
            except ValueError:  # Pillow decides whether the file is damaged or only has small errors
                with pillow_errors():
                    self.image = pillow_open(self.jpeg)
        with pillow_errors():
            pixels = np.array(_converted(self.image, MODES[channels], self.has_16_bits))
            return pixels[..., None] if channels == 1 else pixels, 1

    def _top(self, bottom: int | None) -> tuple[bytes, int]:
        """Return the JPEG with a header that declares only the rows that are needed, and their number.

        A decoder then skips the rows below. The rows above stay the same bit for bit, because the header declares one
        more row of blocks, which the smoothing of colours reads. Such a decoder cannot see if the file is complete.
        So the header is changed only if the last bytes of the file show that it is.
        """
        rows = self.stored[1]
        if bottom is None or b"\xff\xd9" not in self.jpeg[-64:]:
            return self.jpeg, rows
        needed = -(-bottom // BLOCK) * BLOCK + BLOCK
        if needed >= rows:
            return self.jpeg, rows
        at = self.frame + 5
        return b"".join((self.jpeg[:at], needed.to_bytes(2, "big"), self.jpeg[at + 2 :])), needed


class Pixels:
    """An image that is decoded already, uint8 (height, width, C), with the interface of a `Picture`.

    C may be any number. Those of MODES are converted to each other, as in files. `pixels` raises OSError for the rest.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self.array, self.orientation = pixels, 1
        self.size = (pixels.shape[1], pixels.shape[0])

    def pixels(self, factor: int = 1, bottom: int | None = None, channels: int = 3) -> tuple[np.ndarray, int]:
        own = self.array.shape[2]
        if own == channels:
            return self.array, 1
        if not {own, channels} <= MODES.keys():
            raise OSError(f"it has {own} channels, but model.in_channels is {channels}")
        return Picture(Image.fromarray(self.array[..., 0] if own == 1 else self.array)).pixels(channels=channels)


AnyPicture = Picture | Pixels


# -- files


def read(path: str, transform: Callable[[Picture], T]) -> T:
    """Return `transform` of the image at `path`. Raises BrokenImageError if the file is not a complete image."""
    try:
        return transform(open_picture(path))
    except OSError as error:
        raise BrokenImageError(path, error) from None


def open_picture(path: str) -> Picture:
    """Read a file, and parse the header of the image. Raises OSError if it is not an image.

    This function makes three system calls. Python's open and read make ten, between which other threads may take over.
    """
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # opening a pipe called .jpg would block
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISFIFO(status.st_mode):
            raise OSError("it is a device or a folder, not a file")
        if status.st_size > MAX_BYTES:
            raise OSError(f"it has {status.st_size:,} bytes, and an image may have at most {MAX_BYTES:,}")
        content = os.read(file, FIRST_READ)
        if len(content) == FIRST_READ:
            parts = [content]
            while part := os.read(file, 16 * FIRST_READ):
                parts.append(part)
            content = b"".join(parts)
    finally:
        os.close(file)
    return Picture(content)


# -- headers


def parse_jpeg(encoded: bytes) -> tuple[tuple[int, int], int, int] | None:
    """Return ((width, height), EXIF orientation, offset of the frame header) of a JPEG that simplejpeg can decode.

    Such a JPEG has eight bits, and is grey or has three colours. The result is None for everything else. Walking over
    the segments before the pixels takes 3 microseconds; Pillow's open takes 60.
    """
    at, orientation, frame = 2, 1, 0
    if encoded[:2] != b"\xff\xd8":
        return None
    try:
        while encoded[at] == 0xFF:
            marker, length = encoded[at + 1], encoded[at + 2] << 8 | encoded[at + 3]
            if marker in FRAMES:
                frame = at
            elif marker == 0xDA:  # the pixels
                break
            elif marker == 0xE1:  # EXIF or XMP
                segment = encoded[at + 4 : at + 2 + length]
                if b"\x01\x12" in segment or b"\x12\x01" in segment or b"tiff:Orientation" in segment:
                    with pillow_errors(), pillow_open(encoded) as image:
                        orientation = exif_orientation(image)
            at += 2 + length
        if not frame or encoded[at + 1] != 0xDA:
            return None
    except IndexError:
        return None
    height, width = (encoded[frame + n] << 8 | encoded[frame + n + 1] for n in (5, 7))
    limit = Image.MAX_IMAGE_PIXELS  # of which Pillow refuses twice as many; None is no limit
    too_large = limit is not None and width * height > 2 * limit
    if encoded[frame + 4] != 8 or encoded[frame + 9] not in (1, 3) or not width or not height or too_large:
        return None
    return (width, height), orientation, frame


def scans_of(encoded: bytes) -> int:
    """Count the scans of the first picture of a JPEG, without thumbnails within it and what phones add behind it."""
    at, scans = 2, 0
    while at < len(encoded) - 3 and encoded[at] == 0xFF and encoded[at + 1] != 0xD9:
        is_scan = encoded[at + 1] == 0xDA
        at += 2 + (encoded[at + 2] << 8 | encoded[at + 3])
        if is_scan:
            scans += 1
            marker = MARKER.search(encoded, at)
            at = marker.start() if marker else len(encoded)
    return scans


@contextlib.contextmanager
def pillow_errors() -> Iterator[None]:
    """Turn whatever Pillow raises for a damaged file into an OSError."""
    try:
        yield
    except Image.UnidentifiedImageError:  # Pillow's text would name a buffer in memory
        raise OSError("no image of a known format") from None
    except PILLOW_ERRORS as error:
        raise OSError(str(error) or type(error).__name__) from None


# the first bytes of files that are often called .jpg, and what to do about them
NO_IMAGES = {
    b"version https://git-lfs": "a pointer of Git LFS: run `git lfs pull`",
    b"<!doctype html": "a page of a website, as a failed download leaves it: download the image again",
    b"<html": "a page of a website, as a failed download leaves it: download the image again",
    b"<svg": "an SVG drawing: convert it to PNG",
    b"%pdf": "a PDF document: convert it to PNG",
}


def pillow_open(encoded: bytes) -> Image.Image:
    """Open an image with Pillow, which reads the header only."""
    head = encoded[:200].lstrip().lower()
    if named := [reason for start, reason in NO_IMAGES.items() if head.startswith(start)]:
        raise OSError(named[0])
    if encoded[4:12] in (b"ftypheic", b"ftypheix"):
        raise OSError("an HEIC image, as iPhones write them: convert it to JPEG")
    return Image.open(io.BytesIO(encoded), formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8. Other values count as 1, as in Pillow's exif_transpose."""
    if image.format == "TIFF":  # Pillow rotates it by itself
        return 1
    value = image.getexif().get(ORIENTATION)
    return value if isinstance(value, int) and 2 <= value <= 8 else 1


# -- crop and resize


def crop_resize(picture: AnyPicture, box: Box, size: tuple[int, int], at: tuple[int, int], out: Tensor) -> None:
    """Crop `box` from `picture`, resize it with antialiasing, and write a part of the result into `out`.

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the box then still has at least `size` pixels; the edges of the
    box are rounded to whole pixels of that scale.

    Args:
        box: in pixels of the picture as a viewer shows it.
        size: (height, width) of the resized box.
        at: (top, left) of the part of the resized box that is written.
        out: uint8 (1, C, H, W) in channels-last memory; the image is decoded to C channels.
    """
    orientation = picture.orientation
    left, top, right, bottom = _stored_box(box, picture.size, orientation)
    high, wide = size[::-1] if orientation >= 5 else size
    wanted = 1
    while wanted < 8 and right - left >= 2 * wanted * wide and bottom - top >= 2 * wanted * high:
        wanted *= 2
    pixels, factor = picture.pixels(wanted, bottom, out.shape[1])
    x, y = round(left / factor), round(top / factor)
    part = pixels[None, y : y - (top - bottom) // factor, x : x - (left - right) // factor]  # rounded up
    source = torch.from_numpy(part.transpose(0, 3, 1, 2))
    # exact, so that the rounding does not stretch the picture
    scales = (high * factor / (bottom - top), wide * factor / (right - left))
    rows, columns = out.shape[-2:]
    if orientation == 1 and size == (rows, columns):
        _resize(source, size, False, *scales, out=out)
        return
    resized = _rotate(_resize(source, (high, wide), False, *scales), orientation)
    out.copy_(resized[..., at[0] : at[0] + rows, at[1] : at[1] + columns])


def whole(picture: AnyPicture, channels: int = 3) -> Tensor:
    """Return all pixels as a viewer shows them: uint8 (channels, height, width)."""
    pixels, _ = picture.pixels(channels=channels)
    return _rotate(torch.from_numpy(pixels.transpose(2, 0, 1)[None]), picture.orientation)[0]


def _stored_box(box: Box, size: tuple[int, int], orientation: int) -> Box:
    """Convert a box of the picture as a viewer shows it, of `size` (width, height), to the stored pixels."""
    left, top, right, bottom = box
    if orientation in MIRRORED:
        left, right = size[0] - right, size[0] - left
    if orientation in UPSIDE_DOWN:
        top, bottom = size[1] - bottom, size[1] - top
    return (top, left, bottom, right) if orientation >= 5 else (left, top, right, bottom)


def _rotate(images: Tensor, orientation: int) -> Tensor:
    """Rotate stored images (B, C, H, W) to what a viewer shows (EXIF 2.32, tag Orientation: 1 to 8)."""
    if orientation >= 5:
        images = images.transpose(2, 3)
    if orientation in UPSIDE_DOWN:
        images = images.flip(2)
    return images.flip(3) if orientation in MIRRORED else images


def _converted(image: Image.Image, mode: str, has_16_bits: bool) -> Image.Image:
    if image.mode == "F":
        raise ValueError(f"its pixels are floating-point numbers: {EIGHT_BITS}")
    if image.mode == "I" and image.format != "PPM":  # of a PPM, Pillow scales the values to 16 bits
        raise ValueError(f"its pixels are 32-bit integers: {EIGHT_BITS}")
    if image.mode.startswith("I"):  # 16 bits: convert() would clip instead of scaling
        values = np.asarray(image).astype(np.int64)
        if 0 < values.max() < DARK:
            raise ValueError(TOO_DARK)
        if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == 0:  # type: ignore[attr-defined]
            values = 65535 - values  # 0 is white
        image = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    elif has_16_bits and np.max(image.convert("RGB").getextrema()) < DARK >> 8:
        raise ValueError(TOO_DARK)
    if image.mode == mode:
        return image
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "palette images with transparency should be converted to RGBA"
        return image.convert(mode)
