"""Figures that Pillow draws pixel by pixel: tiles of images with captions, filters, a confusion matrix.

Unlike `plots.py` this does not import Matplotlib, which takes half a second.
"""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 4  # pixels between tiles
TEXT = 12  # font size in pixels
INK, PAPER = (20, 20, 20), (255, 255, 255)
FULL = np.array([8, 69, 148])  # colour of a cell of the confusion matrix that contains all images of the row


def tiles(images: Sequence[np.ndarray], captions: Sequence[Sequence[str]] = (), columns: int = 4) -> Image.Image:
    """Draw images side by side, each above the lines of a caption.

    Args:
        images: uint8 (H, W, C), all of one size; small ones are enlarged by a whole factor.
        captions: the lines of each image, equally many for all; empty for no captions.
    """
    height, width = images[0].shape[:2]
    times = max(1, 144 // max(height, width))
    height, width = height * times, width * times
    lines = len(captions[0]) if captions else 0
    step = height + GAP + lines * (TEXT + 3)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (step + GAP) + GAP), PAPER)
    draw, font = ImageDraw.Draw(sheet), _font()
    for i, image in enumerate(images):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (step + GAP)
        sheet.paste(Image.fromarray(as_rgb(image)).resize((width, height), Image.Resampling.NEAREST), (x, y))
        for n, line in enumerate(captions[i] if captions else ()):
            draw.text((x, y + height + 2 + n * (TEXT + 3)), _fitting(line, width, font), INK, font)
    return sheet


def as_rgb(image: np.ndarray) -> np.ndarray:
    """Return uint8 (H, W, 3) of an image (H, W, C): RGBA is laid over white; 1, 2, 5, ... channels become grey."""
    if image.shape[2] == 4:
        alpha = image[..., 3:] / 255
        return (image[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return image if image.shape[2] == 3 else image.mean(2, keepdims=True).astype(np.uint8).repeat(3, 2)


def confusion(
    counts: np.ndarray, names: Sequence[str], totals: np.ndarray | None = None, classes: int = 0, of: str | None = None
) -> Image.Image:
    """Draw a confusion matrix as squares. A darker square contains a larger fraction of the row's images.

    Args:
        counts: int (C, C), how many images of the row's class were predicted as the column's class.
        names: of the C classes.
        totals: int (C,), images per class, if the matrix is a part of a larger one.
        classes: the number of classes of that larger matrix.
        of: the images and weights, for the title, such as "test, best.ckpt".
    """
    font = _font()
    cell = max(16, min(44, 880 // len(names)))
    margin = int(min(170, 12 + max(font.getlength(name) for name in names)))
    left, top = margin + TEXT + 10, margin + TEXT + 10
    side = cell * len(names)
    sheet = Image.new("RGB", (left + side + 12, top + side + 12), PAPER)
    draw = ImageDraw.Draw(sheet)
    fraction = counts / np.maximum(counts.sum(1) if totals is None else totals, 1)[:, None]
    for row, name in enumerate(names):
        y = top + row * cell
        label = _fitting(name, margin - 8, font)
        draw.text((left - 6, y + cell / 2), label, INK, font, anchor="rm")
        _upright(sheet, label, left + row * cell + cell // 2, top - 6, font)
        for column in range(len(names)):
            x = left + column * cell
            colour = tuple(int(value) for value in 255 + (FULL - 255) * fraction[row, column] ** 0.6)
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), colour if counts[row, column] else (246, 246, 246))
            number = str(counts[row, column])
            if counts[row, column] and font.getlength(number) < cell - 2:
                ink = PAPER if fraction[row, column] > 0.4 else INK
                draw.text((x + cell / 2 - 1, y + cell / 2 - 1), number, ink, font, anchor="mm")
    notes = [of] if of else []
    if classes > len(names):
        notes.append(f"{len(names)} of {classes:,} classes, those confused most")
    title = f"predicted ({'; '.join(notes)})" if notes else "predicted"
    draw.text((sheet.width / 2, 4), _fitting(title, sheet.width - 8, font), INK, font, anchor="mt")
    _upright(sheet, "true", 4 + TEXT // 2, top + side // 2, font)
    return sheet


def filters(weights: np.ndarray, groups: int = 1) -> Image.Image:
    """Draw the filters of a first convolution as tiles: zero is grey, and each is scaled by the largest weight in it.

    Args:
        weights: float (maps, channels, H, W); the first three of three or four channels are drawn as red, green and
            blue, another number as the mean.
        groups: number of groups of maps, which are drawn below each other with a gap.
    """
    weights = weights[:, :3] if weights.shape[1] in (3, 4) else weights.mean(1, keepdims=True).repeat(3, 1)
    largest = np.abs(weights).max((1, 2, 3), keepdims=True)
    pixels = 127.5 + 127.5 * weights / np.where(largest > 0, largest, 1)
    images = list(pixels.round().astype(np.uint8).transpose(0, 2, 3, 1))
    of_group = -(-len(images) // groups)
    columns = 16 if of_group >= 32 else 8
    times = max(2, 48 // weights.shape[-1])
    size = times * np.array(weights.shape[:1:-1])
    rows = -(-of_group // columns)
    height = rows * (size[1] + GAP) + 3 * GAP
    sheet = Image.new("RGB", (columns * (size[0] + GAP) + GAP, groups * height - GAP), PAPER)
    for i, image in enumerate(images):
        group, place = divmod(i, of_group)
        at = (GAP + place % columns * (size[0] + GAP), GAP + group * height + place // columns * (size[1] + GAP))
        sheet.paste(Image.fromarray(image).resize(tuple(size), Image.Resampling.NEAREST), (int(at[0]), int(at[1])))
    return sheet


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which comes with Matplotlib: Pillow's default font lacks most letters beyond ASCII."""
    spec = importlib.util.find_spec("matplotlib")  # does not import it
    assert spec is not None
    assert spec.origin is not None
    return ImageFont.truetype(str(Path(spec.origin).with_name("mpl-data") / "fonts/ttf/DejaVuSans.ttf"), TEXT)


def _fitting(line: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """Return `line`, or as much of its start as fits into `width` pixels."""
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"


def _upright(sheet: Image.Image, line: str, x: int, bottom: int, font: ImageFont.FreeTypeFont) -> None:
    """Write `line` upwards from `bottom`, centred on `x`."""
    strip = Image.new("L", (int(font.getlength(line)) + 2, TEXT + 4), 0)
    ImageDraw.Draw(strip).text((0, 0), line, 255, font)
    turned = strip.rotate(90, expand=True)
    sheet.paste(INK, (x - turned.width // 2, bottom - turned.height), turned)
